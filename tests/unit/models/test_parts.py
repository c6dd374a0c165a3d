import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from colfolio.errors import ColfolioError, RecipeError
from colfolio.models import Retriever
from colfolio.models.adapters import LoraSettings, add_lora, merge
from colfolio.models.families import FAMILIES, family_of, position_scheme_of
from colfolio.models.generator_base import generator_from_shape
from colfolio.models.parts import inventory
from colfolio.models.selectors import PARTS

SHAPES = sorted((Path(__file__).parents[2] / "parity" / "shapes").glob("*.json"))
# By the name of a parameter alone, for every family; the first that fits.
PLAIN = {
    r"backbone\.visual\.(patch_embed|pos_embed)\.": "vision 0",
    r"backbone\.visual\.blocks\.(\d+)\.": "vision",
    r"backbone\.visual\.(merger|deepstack_merger_list)\.": "merger",
    r"backbone\.language_model\.embed_tokens\.": "embedding",
    r"backbone\.language_model\.layers\.(\d+)\.": "layers",
    r"backbone\.language_model\.norm\.": "norm",
    r"projection\.": "projection",
}
EVERYWHERE = LoraSettings(rank=2, vision=("attn.qkv", "attn.proj"))


def plain_place(name):
    for pattern, part in PLAIN.items():
        if found := re.match(pattern, name):
            if part == "vision 0":
                return "vision", 0
            return part, int(found[1]) if part in ("vision", "layers") else None
    raise AssertionError(name)


@pytest.fixture
def full_size(tiny_tokenizer, shared_retriever):
    """Builds a published shape with a projection, on the meta device."""

    def make(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        family = family_of(values["model_type"], path.stem)
        config = family.config.from_dict(copy.deepcopy(values))
        with torch.device("meta"):
            backbone = family.backbone(config)
            projection = nn.Linear(config.get_text_config().hidden_size, 128)
        kept = {
            "dim": 128,
            "pixel_budget": family.pixel_budget,
            "position_scheme": position_scheme_of(config, path.stem),
        }
        contract = shared_retriever.contract.model_copy(update=kept)
        return Retriever(backbone, projection, tiny_tokenizer, contract)

    return make


def assert_all_in_their_parts(retriever):
    places = inventory(retriever).places
    assert list(places) == [name for name, _ in retriever.named_parameters()]
    assert {name: (at.part, at.layer) for name, at in places.items()} == {
        name: plain_place(name) for name in places
    }
    assert {at.part for at in places.values()} == set(PARTS) - {"adapters"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_is_in_exactly_one_part(make_family_retriever, family):
    assert_all_in_their_parts(make_family_retriever(family))


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_every_parameter_of_a_full_size_shape_is_in_exactly_one_part(full_size, path):
    retriever = full_size(path)
    assert_all_in_their_parts(retriever)
    found, total = inventory(retriever), sum(w.numel() for w in retriever.parameters())
    sizes = {name: weight.numel() for name, weight in retriever.named_parameters()}
    taken = [found.select([part]) for part in PARTS if part != "adapters"]
    assert sum(sizes[name] for names in taken for name in names) == total
    text, visual = retriever.backbone.language_model, retriever.backbone.visual
    assert found.existing() == (
        f"vision[0:{len(visual.blocks)}], merger, embedding, layers[0:{len(text.layers)}], "
        "norm, projection"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_a_part_and_all_else_stays_where_it_was(make_family_retriever, family):
    retriever = make_family_retriever(family)
    before = inventory(retriever).places
    add_lora(retriever, EVERYWHERE, seed=1)
    after = inventory(retriever)
    hosts = {name.replace(".base_layer.", "."): at for name, at in after.places.items()}
    assert {name: at for name, at in hosts.items() if at.part != "adapters"} == before
    adapters = {name: at for name, at in after.places.items() if at.part == "adapters"}
    trained = {name for name, weight in retriever.named_parameters() if weight.requires_grad}
    assert adapters.keys() == trained == after.select(["adapters"])
    for name, place in adapters.items():
        host = re.sub(r"\.lora_[AB]\.default\.weight$", ".weight", name)
        assert (place.layer, place.depth) == (None, before[host].depth)
    assert after.select(["vision[0]"]) | after.select(["vision[1:]"]) == after.select(["vision"])
    assert not after.select(["vision", "layers", "projection"]) & adapters.keys()


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_of_a_generator_is_its_projection(tiny_shape, tiny_tokenizer, is_tied):
    backbone = tiny_shape.backbone | {"tie_word_embeddings": is_tied}
    shape = tiny_shape.model_copy(update={"backbone": backbone})
    found = inventory(generator_from_shape(shape, tiny_tokenizer, 0))
    parts = {place.part for place in found.places.values()}
    assert parts == set(PARTS) - {"adapters"} - ({"projection"} if is_tied else set())


def test_a_projection_trained_beside_adapters_is_the_projection(retriever):
    add_lora(retriever, EVERYWHERE.model_copy(update={"projection": "full"}), seed=1)
    trained = {name for name, weight in retriever.named_parameters() if weight.requires_grad}
    assert inventory(retriever).label(trained) == "projection, adapters"


def test_merged_layers_are_where_their_layers_were(retriever):
    before = inventory(retriever).places
    add_lora(retriever, EVERYWHERE, seed=1)
    adapters = {n for n, at in inventory(retriever).places.items() if at.part == "adapters"}
    merge(retriever, keeps_adapter=True)
    kept = {
        name: (name.replace(".adapted.", ".").replace(".base_layer.", "."), at)
        for name, at in inventory(retriever).places.items()
    }
    for plain, place in kept.values():
        assert place == before[plain] if place.part != "adapters" else plain in adapters
    assert {plain for plain, _ in kept.values()} == before.keys() | adapters


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("backbone.visual", "backbone.visual.extra.weight"),
        ("backbone.language_model", "backbone.language_model.extra.weight"),
        ("backbone", "backbone.extra.weight"),
        ("", "extra.weight"),
    ],
)
def test_a_parameter_of_no_part_is_an_error_that_names_it(retriever, where, name):
    retriever.get_submodule(where).extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ColfolioError, match=rf"these to none: {re.escape(name)}; "):
        inventory(retriever)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_rises_on_the_way_of_a_page(make_family_retriever, family, pages):
    retriever = make_family_retriever(family)
    found = inventory(retriever)
    depths = {}
    for name, place in found.places.items():
        depths.setdefault(name.rpartition(".")[0], place.depth)
    run = []
    for name, module in retriever.named_modules():
        if name in depths:
            module.register_forward_hook(lambda *_, name=name: run.append(depths[name]))
    retriever(retriever.collator.documents(pages))
    # the towers' first modules and deepstack's mergers run out of turn
    text, visual = retriever.backbone.language_model, retriever.backbone.visual
    mergers = len(visual.blocks)
    assert [d for d in run if d != mergers] == sorted(d for d in run if d != mergers)
    assert set(run) == set(range(mergers + len(text.layers) + 3))
    by_part = {at.part: at.depth for at in found.places.values()}
    assert by_part["merger"] == by_part["embedding"] == mergers
    assert by_part["projection"] == max(by_part.values()) == by_part["norm"] + 1


def test_what_embeds_patches_counts_with_block_0(make_family_retriever):
    names = inventory(make_family_retriever("qwen3_vl")).select(["vision[0]"])
    assert {name.split(".")[2] for name in names} == {"patch_embed", "pos_embed", "blocks"}


def test_deepstack_mergers_are_merger(make_family_retriever):
    names = inventory(make_family_retriever("qwen3_vl")).select(["merger"])
    assert {name.split(".")[2] for name in names} == {"merger", "deepstack_merger_list"}


def test_an_adapter_that_is_not_there_cannot_be_selected(retriever):
    with pytest.raises(RecipeError, match=r"there are no adapters\. This model has vision"):
        inventory(retriever).select(["adapters"])
