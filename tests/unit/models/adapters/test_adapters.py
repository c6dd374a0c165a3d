import sys

import pytest
import torch
from adapters import (
    PROJECTIONS,
    SMALL,
    VISION,
    Q,
    assert_close_to,
    assert_same_state,
    change_open_weights,
    exact_vectors,
    state_of,
    vectors_of,
)
from safetensors.torch import load_file

from colfolio.errors import ColfolioError
from colfolio.models import Retriever
from colfolio.models.adapters import (
    LoraSettings,
    add_lora,
    has_adapter,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
)
from colfolio.models.border import frozen_border
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.gradient_checkpointing import checkpoint_layers


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("family", VISION)
def test_a_fresh_adapter_changes_no_bit_of_any_vector(
    family, projection, make_family_retriever, texts, pages
):
    retriever = make_family_retriever(family)
    before, drawn = vectors_of(retriever, texts, pages), torch.random.get_rng_state()
    settings = LoraSettings(rank=2, vision=VISION[family], projection=projection)
    add_lora(retriever, settings, seed=1)
    assert has_adapter(retriever)
    assert torch.equal(vectors_of(retriever, texts, pages), before)
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_adapters_and_the_chosen_projection_train_and_nothing_else(make_retriever):
    for projection, own in [
        ("full", {"weight", "bias"}),
        ("adapter", {"lora_A.default.weight", "lora_B.default.weight"}),
        ("frozen", set()),
    ]:
        retriever = make_retriever()
        add_lora(retriever, SMALL.model_copy(update={"projection": projection}), seed=1)
        layers = 2 * 7 * 2  # two layers, seven products in each, A and B
        trained = {name for name, weight in retriever.named_parameters() if weight.requires_grad}
        last = {name.removeprefix("projection.") for name in trained if "projection" in name}
        assert last == own
        assert (
            sum(".lora_" in name for name in trained - {f"projection.{x}" for x in own}) == layers
        )


def test_a_model_in_evaluation_stays_so_whatever_is_done_to_its_adapter(adapted, saved, base):
    loaded = Retriever.from_pretrained(base)
    load_adapter(loaded, saved)
    for retriever in (adapted(), loaded):
        for act in (lambda one: merge(one, keeps_adapter=True), unmerge, remove):
            assert not any(module.training for module in retriever.modules())
            act(retriever)
        assert not any(module.training for module in retriever.modules())


def test_equal_seeds_draw_a_layer_alike_whatever_else_is_adapted(make_retriever):
    def first(seed, **values):
        retriever = make_retriever()
        add_lora(retriever, LoraSettings(**values), seed)
        return retriever.backbone.get_submodule(Q).lora_A["default"].weight

    alone = first(1, text=("layers.0.self_attn.q_proj",), projection="frozen")
    assert torch.equal(alone, first(1))
    assert not torch.equal(alone, first(2))
    assert abs(float(alone.detach().std()) * 32 - 1) < 0.1  # 1 / rank


def test_a_name_that_is_of_no_linear_layer_is_refused_with_those_that_are(retriever):
    before = state_of(retriever)
    for values, words in [
        ({"text": ("q_prj",)}, r"language_model has no .*'q_prj'; it has .*self_attn.q_proj"),
        ({"text": ("layers.9.mlp.up_proj",)}, "layers.9.mlp.up_proj"),
        ({"text": ("proj",)}, "'proj'"),  # the end of a word is not a name
        ({"vision": ("patch_embed.proj",)}, r"visual has no .*; it has .*attn.qkv"),
        ({"text": (), "projection": "full"}, "no layer is adapted"),
    ]:
        with pytest.raises(ColfolioError, match=words):
            add_lora(retriever, LoraSettings(**values), seed=1)
    assert_same_state(retriever, before)
    assert all(weight.requires_grad for weight in retriever.parameters())


def test_adapters_of_half_precision_weights_are_held_in_float32(make_retriever, texts, pages):
    retriever = make_retriever(dtype="bfloat16")
    before = vectors_of(retriever, texts, pages)
    add_lora(retriever, SMALL, seed=1)
    dtypes = {name: weight.dtype for name, weight in retriever.named_parameters()}
    assert {dtypes[name] for name in dtypes if ".lora_" in name} == {torch.float32}
    assert {dtypes[name] for name in dtypes if ".lora_" not in name} == {torch.bfloat16}
    assert torch.equal(vectors_of(retriever, texts, pages), before)
    exact = make_retriever().to(torch.float64)
    add_lora(exact, SMALL, seed=1)
    assert {weight.dtype for weight in exact.parameters()} == {torch.float64}


def test_a_fingerprint_tells_adapters_and_their_scale_apart(adapted, base):
    plain = Retriever.from_pretrained(base)
    add_lora(plain, SMALL, seed=1)
    other_scale = SMALL.model_copy(update={"alpha": 7.0})
    found = [
        Retriever.from_pretrained(base).fingerprint(),
        plain.fingerprint(),
        adapted().fingerprint(),
        adapted(other_scale).fingerprint(),
    ]
    assert len(set(found)) == 4
    assert adapted().fingerprint() == found[2]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_weights_are_those_of_the_base_and_saving_them_alone_is_refused(
    projection, adapted, base, tmp_path
):
    retriever = adapted(SMALL.model_copy(update={"projection": projection}))
    plain = Retriever.from_pretrained(base).weights()
    found = retriever.weights()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    with pytest.raises(ColfolioError, match=r"has an adapter.*merge it.*save_adapter"):
        retriever.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_merging_changes_no_vector_and_undoing_it_no_bit(projection, adapted, texts, pages):
    retriever = adapted(SMALL.model_copy(update={"projection": projection}))
    before, expected = state_of(retriever), vectors_of(retriever, texts, pages)
    exact = exact_vectors(retriever, texts, pages)
    trained = {name for name, weight in retriever.named_parameters() if weight.requires_grad}
    merge(retriever, keeps_adapter=True)
    assert has_adapter(retriever)
    assert_close_to(vectors_of(retriever, texts, pages), expected, exact)
    unmerge(retriever)
    assert_same_state(retriever, before)
    assert {n for n, weight in retriever.named_parameters() if weight.requires_grad} == trained
    assert torch.equal(vectors_of(retriever, texts, pages), expected)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_merging_for_good_leaves_a_plain_model_that_opens_alike(
    projection, adapted, texts, pages, tmp_path, base
):
    retriever = adapted(SMALL.model_copy(update={"projection": projection}))
    expected = vectors_of(retriever, texts, pages)
    exact = exact_vectors(retriever, texts, pages)
    merge(retriever)
    plain = Retriever.from_pretrained(base)
    assert not has_adapter(retriever)
    assert retriever.state_dict().keys() == plain.state_dict().keys()
    assert all(weight.requires_grad for weight in retriever.parameters())
    assert [type(each) for each in retriever.modules()] == [type(each) for each in plain.modules()]
    merged = vectors_of(retriever, texts, pages)
    assert_close_to(merged, expected, exact)
    retriever.save_pretrained(tmp_path / "merged")
    opened = Retriever.from_pretrained(tmp_path / "merged")
    assert torch.equal(vectors_of(opened, texts, pages), merged)


def test_a_merged_model_that_can_be_undone_is_saved_as_one_that_cannot(adapted, tmp_path):
    for name, keeps in (("one", True), ("two", False)):
        retriever = adapted()
        merge(retriever, keeps_adapter=keeps)
        retriever.save_pretrained(tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_merging_in_float64_is_exact(make_retriever):
    exact = make_retriever().to(torch.float64)
    add_lora(exact, SMALL, seed=1)
    change_open_weights(exact)
    layer = exact.backbone.get_submodule(Q)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer.weight + 2.0 * b @ a).detach()
    merge(exact)
    torch.testing.assert_close(
        exact.backbone.get_submodule(Q).weight.detach(), expected, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("is_adapter_half_too", [False, True])
def test_merging_in_half_precision_rounds_once(is_adapter_half_too, make_retriever):
    half = make_retriever(dtype="bfloat16")
    add_lora(half, SMALL, seed=1)
    change_open_weights(half, size=0.2)
    if is_adapter_half_too:
        cast_parameters(half, torch.bfloat16)
    layer = half.backbone.get_submodule(Q)
    a, b = (layer.get_submodule(f"lora_{x}.default").weight.double() for x in "AB")
    expected = layer.base_layer.weight.double() + 2.0 * b @ a
    merge(half)
    merged = half.backbone.get_submodule(Q).weight
    assert merged.dtype == torch.bfloat16
    # half a unit in the last of 8 bits, and what float32 adds to it
    assert ((merged - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-12).all()


@pytest.mark.parametrize("is_merged", [False, True])
def test_removing_gives_the_base_back_to_the_bit(is_merged, adapted, base):
    for projection in PROJECTIONS:
        retriever = adapted(SMALL.model_copy(update={"projection": projection}))
        if is_merged:
            merge(retriever, keeps_adapter=True)
        remove(retriever)
        assert not has_adapter(retriever)
        assert_same_state(retriever, state_of(Retriever.from_pretrained(base)))
        assert all(weight.requires_grad for weight in retriever.parameters())


def test_merged_vectors_of_weights_of_usual_size_are_within_a_millionth(
    make_retriever, texts, pages
):
    usual = {"initializer_range": 0.02}
    retriever = make_retriever(text=usual, vision=usual)
    before = vectors_of(retriever, texts, pages)
    add_lora(retriever, SMALL, seed=1)
    change_open_weights(retriever)
    expected = vectors_of(retriever, texts, pages)
    assert (expected - before).abs().max() > 1e-2
    merge(retriever)
    torch.testing.assert_close(vectors_of(retriever, texts, pages), expected, rtol=0, atol=1e-6)


def test_merging_changes_no_vector_but_by_rounding(adapted, texts, pages):
    retriever = adapted(SMALL.model_copy(update={"vision": ("attn.qkv", "mlp.fc1")}))
    retriever.to(torch.float64)
    expected = exact_vectors(retriever, texts, pages)
    merge(retriever)
    merged = exact_vectors(retriever, texts, pages)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-13)


def test_what_cannot_be_done_in_a_state_is_refused(adapted, retriever, tmp_path):
    for act in (merge, remove, lambda one: save_adapter(one, tmp_path / "x", "base")):
        with pytest.raises(ColfolioError, match="has no adapter: add_lora"):
            act(retriever)
    for state in (retriever, adapted()):
        with pytest.raises(ColfolioError, match="nothing to set apart"):
            unmerge(state)
    one = adapted()
    with pytest.raises(ColfolioError, match="has an adapter: merge it, or remove it"):
        add_lora(one, SMALL, seed=1)
    merge(one, keeps_adapter=True)
    for act in (merge, lambda one: save_adapter(one, tmp_path / "x", "base")):
        with pytest.raises(ColfolioError, match="is merged: unmerge"):
            act(one)
    assert not (tmp_path / "x").exists()


def test_without_peft_models_open_and_adapters_say_what_to_install(monkeypatch, base, saved, texts):
    monkeypatch.setitem(sys.modules, "peft", None)
    retriever = Retriever.from_pretrained(base)
    assert not has_adapter(retriever)
    retriever.encode_queries(texts)
    retriever.fingerprint()
    for act in (lambda: add_lora(retriever, SMALL, 1), lambda: Retriever.from_pretrained(saved)):
        with pytest.raises(ColfolioError, match=r"package peft.*colfolio\[lora\]"):
            act()


def test_vision_lies_below_the_border_while_text_alone_is_adapted(make_retriever):
    for settings, tower in [
        (SMALL, "text"),
        (SMALL.model_copy(update={"vision": ("attn.qkv",)}), None),
        (SMALL.model_copy(update={"vision": ("blocks.1.attn.qkv",)}), "vision"),
    ]:
        retriever = make_retriever()
        add_lora(retriever, settings, seed=1)
        border = frozen_border(retriever.backbone, is_visual=True)
        assert (border and border.tower) == tower


def test_gradient_checkpointing_never_changes_the_gradient_of_an_adapter(adapted, pages):
    gradients = []
    for which in ("none", "all"):
        retriever = adapted(SMALL.model_copy(update={"dropout": 0.0, "vision": ("attn.qkv",)}))
        checkpoint_layers(retriever.backbone, which)
        vectors = retriever.train()(retriever.collator.documents(pages)).vectors
        (vectors * torch.linspace(-1, 1, vectors.numel()).view(vectors.shape)).sum().backward()
        gradients.append({n: w.grad for n, w in retriever.named_parameters() if w.requires_grad})
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)
