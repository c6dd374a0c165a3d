"""What was trained in float32 beside a base in half precision is not rounded until it is merged."""

import pytest
import torch
from adapters import (
    CONFIG,
    SMALL,
    WEIGHTS,
    assert_same_state,
    change_open_weights,
    state_of,
    vectors_of,
)
from safetensors.torch import load_file

from colfolio.models import Retriever
from colfolio.models.adapters import (
    adapter_in,
    add_lora,
    has_adapter,
    merge,
    merge_layers,
    remove,
    save_adapter,
    unmerge,
)
from colfolio.models.checkpoint import cast_parameters


@pytest.fixture
def half(base, tmp_path):
    """A base in bf16 and, beside it, an adapter that was trained on it in float32."""
    plain = Retriever.from_pretrained(base)
    cast_parameters(plain, torch.bfloat16)
    plain.save_pretrained(tmp_path / "half")
    retriever = Retriever.from_pretrained(tmp_path / "half")
    told = retriever.weights_hash()
    cast_parameters(retriever, torch.float32)
    add_lora(retriever, SMALL.model_copy(update={"projection": "full"}), seed=1)
    change_open_weights(retriever)
    save_adapter(retriever, tmp_path / "adapter", "../half", base_hash=told)
    return tmp_path / "half", tmp_path / "adapter"


def test_a_projection_that_was_trained_in_float32_is_not_rounded_on_a_base_in_half_precision(
    half, tmp_path, texts, pages
):
    base, adapter = half
    opened = Retriever.from_pretrained(adapter)
    stored = load_file(adapter / WEIGHTS)["base_model.model.custom_text_proj.weight"]
    assert torch.equal(opened.projection.weight, stored)
    assert opened.projection.weight.dtype == torch.float32
    assert {tensor.dtype for tensor in opened.weights().values()} == {torch.bfloat16}
    save_adapter(opened, tmp_path / "again", "../half")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()
    before = vectors_of(opened, texts, pages)
    merge(opened, keeps_adapter=True)
    assert {tensor.dtype for tensor in opened.weights().values()} == {torch.bfloat16}
    merged = vectors_of(opened, texts, pages)
    assert (merged - before).abs().max() < 0.05
    unmerge(opened)
    assert torch.equal(vectors_of(opened, texts, pages), before)
    merge(opened)
    assert {tensor.dtype for tensor in opened.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(vectors_of(opened, texts, pages), merged)
    opened = Retriever.from_pretrained(adapter)
    remove(opened)
    assert_same_state(opened, state_of(Retriever.from_pretrained(base)))


def test_folding_every_layer_leaves_a_projection_in_the_dtype_of_its_base(half):
    opened = Retriever.from_pretrained(half[1])
    kept = opened.projection.weight
    merge_layers(opened, set(adapter_in(opened)[0].ranks))
    assert not has_adapter(opened)
    assert opened.projection.weight is kept
    assert {tensor.dtype for tensor in opened.state_dict().values()} == {torch.bfloat16}
