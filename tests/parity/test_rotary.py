"""Rotation equals that of `transformers`: Qwen2-VL, Qwen3-VL, and on text one-dimensional RoPE."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from colfolio.mrope import cos_sin, inverse_frequencies, rotate
from colfolio.mrope.rotary import interleaved, sectioned, spatial_first

BATCH, HEADS, KEY_HEADS, LENGTH = 2, 4, 2, 33
THETA = 10_000.0
QWEN2 = (qwen2_vl, qwen2_vl.Qwen2VLRotaryEmbedding, Qwen2VLTextConfig, sectioned)
QWEN3 = (qwen3_vl, qwen3_vl.Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig, interleaved)
FAMILIES = [
    pytest.param(*QWEN2, (16, 24, 24), id="qwen2_vl"),
    pytest.param(*QWEN2, (2, 1, 1), id="qwen2_vl, heads of 8"),
    pytest.param(*QWEN2, (4, 7, 5), id="qwen2_vl, uneven"),
    pytest.param(*QWEN3, (24, 20, 20), id="qwen3_vl"),
    pytest.param(*QWEN3, (7, 4, 5), id="qwen3_vl, uneven"),
]


def config_of(kind, head, sections=None):
    rope = {"rope_type": "default", "rope_theta": THETA}
    if sections:
        rope["mrope_section"] = list(sections)
    return kind(
        hidden_size=HEADS * head,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=head,
        rope_parameters=rope,
    )


def states_of(head, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(BATCH, heads, LENGTH, head) for heads in (HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(outputs, inputs):
    """Outputs, and the gradients of one random sum over them."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def both(library, positions, angles, dtype, head):
    """Results of the library and of ours for the same states."""
    module, rotary = library
    states = states_of(head, dtype)
    theirs = module.apply_rotary_pos_emb(*states, *rotary(states[0], positions))
    return with_gradients(theirs, states), with_gradients(rotate(*states, *angles), states)


@pytest.mark.parametrize(("module", "rotary", "config", "layout", "sections"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_and_gradients_equal_the_library(module, rotary, config, layout, sections, dtype):
    head = 2 * sum(sections)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 5000, (3, BATCH, LENGTH), generator=generator)
    angles = cos_sin(positions, inverse_frequencies(head, THETA), layout(sections))
    library = (module, rotary(config_of(config, head, sections)))
    for theirs, ours in zip(*both(library, positions, angles, dtype, head), strict=True):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", [sectioned, interleaved, spatial_first])
@pytest.mark.parametrize("head", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_is_turned_to_the_bits_of_one_dimensional_rope(layout, head, dtype):
    rows = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) + 3000])
    sections = (head // 4, head // 8, head // 8)
    angles = cos_sin(rows.expand(3, -1, -1), inverse_frequencies(head, THETA), layout(sections))
    library = (llama, llama.LlamaRotaryEmbedding(config_of(LlamaConfig, head)))
    for theirs, ours in zip(*both(library, rows, angles, dtype, head), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("head", [8, 64, 80, 128])
def test_frequencies_are_those_of_the_library_to_the_bit(head, theta):
    config = config_of(LlamaConfig, head)
    config.rope_parameters["rope_theta"] = theta
    assert torch.equal(
        inverse_frequencies(head, theta), llama.LlamaRotaryEmbedding(config).inv_freq
    )
