"""Grafted decoders give what the text decoders of Qwen2-VL and Qwen3-VL give with their weights."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

from colfolio.mrope.graft import graft
from colfolio.mrope.positions import padded_position_ids

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
# ours, theirs, scheme, sections
PAIRS = {
    "Llama": (LlamaModel, LlamaConfig, Qwen2VLTextModel, Qwen2VLTextConfig, "qwen2_vl", (2, 3, 3)),
    "Llama, other sections": (
        *(LlamaModel, LlamaConfig, Qwen2VLTextModel, Qwen2VLTextConfig),
        *("qwen2_vl", (1, 5, 2)),
    ),
    "Qwen2": (Qwen2Model, Qwen2Config, Qwen2VLTextModel, Qwen2VLTextConfig, "qwen2_vl", (2, 3, 3)),
    "Qwen3": (Qwen3Model, Qwen3Config, Qwen3VLTextModel, Qwen3VLTextConfig, "qwen3_vl", (4, 2, 2)),
}


def pair_of(name, dtype=torch.float32):
    """A grafted decoder and the library's multimodal one with the same weights."""
    mine_of, mine_config, theirs_of, theirs_config, scheme, sections = PAIRS[name]
    head = {"head_dim": 16} if name == "Qwen3" else {}
    torch.manual_seed(0)
    mine = mine_of(mine_config(**SIZES, **head, rope_parameters=ROPE))
    for key, value in mine.named_parameters():
        if key.endswith("bias"):  # zero in a fresh model, where a lost one would not be seen
            torch.nn.init.normal_(value)
    rope = ROPE | {"mrope_section": list(sections)}
    theirs = theirs_of(theirs_config(**SIZES, **head, rope_parameters=rope))
    missing, unexpected = theirs.load_state_dict(mine.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith("_proj.bias") for key in missing)  # Llama has none
    for key in missing:
        torch.nn.init.zeros_(theirs.get_parameter(key))
    return graft(mine, scheme, sections).to(dtype), theirs.to(dtype)


def batch():
    """Rows with an image, with a clip or two images, and of text; padded on the left."""
    rows = [
        [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    length = max(map(len, rows))
    types = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    grids = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 4, 4]])
    ids = torch.randint(1, 64, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return ids, mask, padded_position_ids(types, mask, grids)


@pytest.fixture(params=PAIRS)
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_give_the_outputs_of_the_multimodal_decoder(name, dtype):
    mine, theirs = pair_of(name, dtype)
    ids, mask, rows = batch()
    found, expected = (
        model(ids, attention_mask=mask, position_ids=rows).last_hidden_state[mask.bool()]
        for model in (mine, theirs)
    )
    assert torch.equal(found, expected)
    flat = mine(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (flat - found).abs().max() > 1e-2


def test_images_give_the_gradients_of_the_multimodal_decoder(name):
    mine, theirs = pair_of(name)
    ids, mask, rows = batch()
    for model in (mine, theirs):
        hidden = model(ids, attention_mask=mask, position_ids=rows).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden * weights * mask[..., None]).sum().backward()
    gradients = {key: value.grad for key, value in theirs.named_parameters()}
    for key, value in mine.named_parameters():
        scale = gradients[key].abs().max()
        torch.testing.assert_close(value.grad, gradients[key], rtol=0, atol=1e-5 * scale.item())


def test_text_ids_first_pack_as_in_the_multimodal_decoder(name):
    mine, theirs = pair_of(name)
    ids, _, rows = batch()
    length = ids.shape[1]
    text = torch.arange(length).repeat(len(ids))
    packed = torch.cat([text[None], rows.reshape(3, -1)])[:, None]  # [4, 1, 3 L]
    found, expected = (
        model(ids.reshape(1, -1), position_ids=packed, use_cache=False).last_hidden_state
        for model in (mine, theirs)
    )
    assert torch.equal(found, expected)
    alone = mine(ids, position_ids=rows).last_hidden_state
    torch.testing.assert_close(found.view_as(alone), alone, rtol=1e-4, atol=1e-4)


def test_steps_behind_a_cache_equal_the_multimodal_decoder(name):
    mine, theirs = pair_of(name)
    ids, mask, rows = batch()
    outputs = []
    for model in (mine, theirs):
        start = model(
            ids[:, :8], attention_mask=mask[:, :8], position_ids=rows[..., :8], use_cache=True
        )
        steps, cache = [start.last_hidden_state], start.past_key_values
        for place in (8, 9):
            step = slice(place, place + 1)
            seen, at = mask[:, : place + 1], rows[..., step]
            out = model(ids[:, step], attention_mask=seen, position_ids=at, past_key_values=cache)
            steps.append(out.last_hidden_state)
        outputs.append(torch.cat(steps, 1)[mask.bool()])
    assert torch.equal(*outputs)
