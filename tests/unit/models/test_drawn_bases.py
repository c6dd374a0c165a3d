"""Bases out of a shape are equal to the bit on every machine."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from colfolio.errors import CheckpointError
from colfolio.models import Shape, base_from_shape, train_tokenizer
from colfolio.models.contract import hash_weights
from colfolio.models.drawing import draw_weights
from colfolio.models.families import FAMILIES
from colfolio.models.shape import TokenizerSettings

ROWS = 300  # of the embedding, whatever the tokenizer's size
# One machine cannot see that another draws other weights; a value written down can. Nothing but a
# change of the draw, of the shapes, or of the names in `transformers` may change these.
PINNED = {
    "qwen2_vl": "491b7d3db6367249ac1fcfa0b58af8ec4145746e5a15ab5bf1c08ecce4210e4d",
    "qwen2_5_vl": "ee017c062f88cdc6a106d7fdf9520c573dc61fbb48b32e636cf0dab3024064e5",
    "qwen3_vl": "a447a56ea7513c49e4a3992f04e71926cf5292e76c5062e10a5e49e1bf668cf3",
    # the same names, shapes and draws as Qwen2-VL
    "colfolio_grafted": "491b7d3db6367249ac1fcfa0b58af8ec4145746e5a15ab5bf1c08ecce4210e4d",
}
ELSEWHERE = """
import json, sys, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)
torch.manual_seed(7)
from colfolio.models import Shape, base_from_shape, train_tokenizer
from colfolio.models.shape import TokenizerSettings
tokenizer = train_tokenizer(["a page of text"], TokenizerSettings(vocab_size=290))
for shape in json.load(sys.stdin):
    base = base_from_shape(Shape.model_validate(shape), tokenizer, 3)
    print(base.contract.base_hash, base.contract.projection_hash)
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a page of text"], TokenizerSettings(vocab_size=290))


@pytest.fixture
def shape_of(tiny_shape_of):
    def shape_of(family, **text):
        values = tiny_shape_of(family).model_dump()
        values["backbone"]["text_config"] |= {"vocab_size": ROWS, "pad_token_id": 5} | text
        return Shape.model_validate(values)

    return shape_of


def test_every_family_has_a_pinned_base():
    assert set(PINNED) == set(FAMILIES)


@pytest.mark.parametrize("family", PINNED)
def test_a_base_has_the_hash_that_it_has_on_every_machine(shape_of, tokenizer, family):
    base = base_from_shape(shape_of(family), tokenizer, 3)
    assert hash_weights(base.weights()) == base.contract.base_hash == PINNED[family]


def test_vector_units_threads_and_defaults_never_change_a_base(shape_of, tokenizer):
    shapes = [shape_of(family) for family in PINNED]
    shapes += [shape.model_copy(update={"dtype": "bfloat16"}) for shape in shapes]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps([shape.model_dump(mode="json") for shape in shapes]),
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    for shape, line in zip(shapes, done.stdout.splitlines(), strict=True):
        contract = base_from_shape(shape, tokenizer, 3).contract
        assert line.split() == [contract.base_hash, contract.projection_hash], shape.family


@pytest.mark.parametrize("family", PINNED)
def test_weights_are_distributed_as_those_of_transformers(shape_of, family):
    """Per tensor: constants equal, normal ones of the deviation that the library draws with."""
    values = shape_of(family, initializer_range=0.05).model_dump()
    values["backbone"]["vision_config"]["initializer_range"] = 0.3
    config = FAMILIES[family].config(**values["backbone"])
    theirs = FAMILIES[family].backbone(config).state_dict()
    with torch.device("meta"):
        empty = FAMILIES[family].backbone(config)
    ours = draw_weights(empty, 0, torch.float32)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        if tensor.unique().numel() == 1:
            assert torch.equal(ours[name], tensor), name
            continue
        expected = 0.3 if name.startswith("visual.") else 0.05
        drawn = ours[name][ours[name] != 0]
        margin = 5 * expected / drawn.numel() ** 0.5
        for weights in (drawn, tensor[tensor != 0]):
            assert abs(weights.std() - expected) < margin, name
            assert abs(weights.mean()) < margin, name


def test_the_row_of_a_padding_token_is_zero(shape_of, tokenizer):
    base = base_from_shape(shape_of("qwen2_vl"), tokenizer, 0)
    embedding = base.backbone.language_model.embed_tokens
    assert embedding.padding_idx == 5
    assert not embedding.weight[5].any()
    assert embedding.weight[4].any()


def test_every_tensor_is_drawn_by_its_name(shape_of, tokenizer):
    """Equal shapes do not get equal numbers, and a layer more changes no other."""
    few = base_from_shape(shape_of("qwen2_vl"), tokenizer, 0).weights()
    more = base_from_shape(shape_of("qwen2_vl", num_hidden_layers=3), tokenizer, 0).weights()
    assert set(few) < set(more)
    assert all(torch.equal(tensor, more[name]) for name, tensor in few.items())
    drawn = [tensor for tensor in more.values() if tensor.unique().numel() > 1]
    assert len({tensor.flatten()[:8].numpy().tobytes() for tensor in drawn}) == len(drawn)


def test_a_parameter_whose_beginning_is_not_known_is_named(retriever):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.ones(1))

    retriever.backbone.visual.gate = Gate()
    with pytest.raises(CheckpointError, match=r"visual\.gate\.level.*Gate"):
        draw_weights(retriever.backbone, 0, torch.float32)


def test_a_norm_begins_as_its_class_makes_it(retriever):
    class CentredNorm(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(dim))

    retriever.backbone.language_model.norm = CentredNorm(32)
    drawn = draw_weights(retriever.backbone, 0, torch.float32)
    assert not drawn["language_model.norm.weight"].any()
    assert (drawn["language_model.layers.0.input_layernorm.weight"] == 1).all()


@pytest.mark.parametrize(("dim", "seed"), [(0, 0), (-1, 0), (8, -1)])
def test_no_dimensions_and_negative_seeds_are_refused(shape_of, tokenizer, dim, seed):
    shape = shape_of("qwen2_vl").model_copy(update={"dim": dim})
    with pytest.raises(CheckpointError, match=f"received dim {dim} and seed {seed}"):
        base_from_shape(shape, tokenizer, seed)


def test_what_a_shape_leaves_out_is_as_in_the_familys_table(shape_of, tokenizer):
    for family, row in FAMILIES.items():
        values = shape_of(family).model_dump(exclude={"templates", "pixel_budget"})
        contract = base_from_shape(Shape.model_validate(values), tokenizer, 0).contract
        assert (contract.templates, contract.pixel_budget) == (row.templates, row.pixel_budget)
        values["pixel_budget"] = {"min_pixels": 2048}
        contract = base_from_shape(Shape.model_validate(values), tokenizer, 0).contract
        assert contract.pixel_budget == row.pixel_budget.model_copy(update={"min_pixels": 2048})
