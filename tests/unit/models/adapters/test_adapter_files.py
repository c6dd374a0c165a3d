import json
import re

import pytest
import torch
from adapters import (
    CONFIG,
    PROJECTIONS,
    SMALL,
    VISION,
    WEIGHTS,
    as_foreign,
    assert_close_to,
    assert_same_state,
    change_config,
    change_open_weights,
    change_weights,
    exact_vectors,
    state_of,
    vectors_of,
)
from safetensors.torch import load_file

from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models import Retriever, hub
from colfolio.models.adapters import (
    LoraSettings,
    add_lora,
    is_adapter_folder,
    load_adapter,
    merge,
    save_adapter,
)
from colfolio.models.formats import AssumedWarning


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("family", VISION)
def test_an_adapter_saved_and_opened_gives_the_same_bits(
    family, projection, make_family_retriever, texts, pages, tmp_path
):
    retriever = make_family_retriever(family)
    retriever.save_pretrained(tmp_path / "base")
    before = vectors_of(retriever, texts, pages)
    settings = LoraSettings(rank=2, vision=VISION[family], projection=projection)
    add_lora(retriever, settings, seed=1)
    change_open_weights(retriever)
    expected = vectors_of(retriever, texts, pages)
    assert (expected - before).abs().max() > 1e-2
    save_adapter(retriever, tmp_path / "one", "../base")
    opened = Retriever.from_pretrained(tmp_path / "one")
    assert torch.equal(vectors_of(opened, texts, pages), expected)
    assert opened.fingerprint() == retriever.fingerprint()
    save_adapter(opened, tmp_path / "two", "../base")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
    put_in = Retriever.from_pretrained(tmp_path / "base")
    load_adapter(put_in, tmp_path / "one")
    assert_same_state(put_in, state_of(opened))
    assert torch.equal(vectors_of(put_in, texts, pages), expected)


def test_an_adapter_of_some_layers_is_saved_by_their_names(adapted, tmp_path, texts, pages):
    settings = LoraSettings(rank=2, text=("layers.1.mlp.up_proj",), projection="frozen")
    retriever = adapted(settings)
    save_adapter(retriever, tmp_path / "adapter", "../base")
    asked = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    assert asked == ["language_model.layers.1.mlp.up_proj"]
    opened = Retriever.from_pretrained(tmp_path / "adapter")
    assert torch.equal(vectors_of(opened, texts, pages), vectors_of(retriever, texts, pages))


def test_save_load_merge_save_load_gives_the_same_vectors(saved, tmp_path, texts, pages):
    opened = Retriever.from_pretrained(saved)
    expected, exact = vectors_of(opened, texts, pages), exact_vectors(opened, texts, pages)
    merge(opened)
    merged = vectors_of(opened, texts, pages)
    opened.save_pretrained(tmp_path / "merged")
    again = vectors_of(Retriever.from_pretrained(tmp_path / "merged"), texts, pages)
    assert torch.equal(again, merged)
    assert_close_to(again, expected, exact)


def test_a_second_adapter_stands_on_the_merged_first(saved, tmp_path, texts, pages):
    first = Retriever.from_pretrained(saved)
    merge(first)
    first.save_pretrained(tmp_path / "merged")
    add_lora(first, SMALL, seed=2)
    change_open_weights(first)
    save_adapter(first, tmp_path / "second", str(tmp_path / "merged"))
    opened = Retriever.from_pretrained(tmp_path / "second")
    assert torch.equal(vectors_of(opened, texts, pages), vectors_of(first, texts, pages))
    with pytest.raises(CheckpointError, match="is an adapter of other weights"):
        Retriever.from_pretrained(tmp_path / "second", base=tmp_path / "base")


def test_an_adapter_opens_in_another_dtype(saved, texts, pages):
    half = Retriever.from_pretrained(saved, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    whole = vectors_of(Retriever.from_pretrained(saved), texts, pages)
    assert (vectors_of(half, texts, pages) - whole).abs().max() < 0.1


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_adapter_trained_on_a_cast_base_opens_on_the_base_as_its_folder_has_it(
    projection, base, tmp_path, texts, pages
):
    half = Retriever.from_pretrained(base, dtype=torch.bfloat16)
    add_lora(half, SMALL.model_copy(update={"projection": projection}), seed=1)
    change_open_weights(half)
    save_adapter(half, tmp_path / "adapter", "../base")
    opened = Retriever.from_pretrained(tmp_path / "adapter")
    assert {tensor.dtype for tensor in opened.weights().values()} == {torch.float32}
    again = Retriever.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    assert (vectors_of(again, texts, pages) - vectors_of(half, texts, pages)).abs().max() < 0.05
    save_adapter(again, tmp_path / "second", "../base")
    Retriever.from_pretrained(tmp_path / "second")
    put_in = Retriever.from_pretrained(base, dtype=torch.bfloat16)
    load_adapter(put_in, tmp_path / "adapter")
    merge(put_in)
    assert {tensor.dtype for tensor in put_in.weights().values()} == {torch.bfloat16}


def test_an_adapter_on_a_base_that_was_cast_and_then_changed_is_one_of_what_it_is_now(
    base, tmp_path
):
    half = Retriever.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        half.projection.weight[0, 0] += 1
    half.save_pretrained(tmp_path / "changed")
    add_lora(half, SMALL, seed=1)
    save_adapter(half, tmp_path / "adapter", "../changed")
    Retriever.from_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is an adapter of other weights"):
        Retriever.from_pretrained(tmp_path / "adapter", base=base)


def test_an_adapter_is_not_saved_where_the_hash_of_its_base_is_not_known(adapted, tmp_path):
    retriever = adapted().to(torch.bfloat16)
    with pytest.raises(ColfolioError, match="were cast since they were read"):
        save_adapter(retriever, tmp_path / "adapter", "../base")
    assert not (tmp_path / "adapter").exists()


def test_a_scale_by_the_root_of_the_rank_survives_saving(saved, tmp_path, texts, pages):
    as_foreign(saved)
    with pytest.warns(AssumedWarning):
        plain = Retriever.from_pretrained(saved)
    change_config(saved, use_rslora=True)
    with pytest.warns(AssumedWarning):
        opened = Retriever.from_pretrained(saved)
    expected = vectors_of(opened, texts, pages)
    assert (expected - vectors_of(plain, texts, pages)).abs().max() > 1e-3
    save_adapter(opened, tmp_path / "again", "../base")
    again = Retriever.from_pretrained(tmp_path / "again")
    assert again.fingerprint() == opened.fingerprint()
    assert torch.equal(vectors_of(again, texts, pages), expected)


def test_an_adapter_beside_a_configuration_of_its_base_is_an_adapter(saved, base, texts, pages):
    expected = vectors_of(Retriever.from_pretrained(saved), texts, pages)
    (saved / "config.json").write_bytes((base / "config.json").read_bytes())
    assert is_adapter_folder(saved)
    opened = Retriever.from_pretrained(saved)
    assert torch.equal(vectors_of(opened, texts, pages), expected)


def test_a_model_beside_a_configuration_of_an_adapter_is_a_model(saved, base):
    expected = Retriever.from_pretrained(base).fingerprint()
    (base / CONFIG).write_bytes((saved / CONFIG).read_bytes())
    assert not is_adapter_folder(base)
    assert Retriever.from_pretrained(base).fingerprint() == expected
    (base / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(WEIGHTS)):
        Retriever.from_pretrained(base)


def test_where_a_base_lies_may_be_edited_and_what_means_nothing(saved, base):
    change_config(saved, base_model_name_or_path=str(base), revision="v1", task_type="FEATURES")
    Retriever.from_pretrained(saved)


def test_the_base_is_found_beside_the_adapter_or_where_it_is_named(
    saved, base, tmp_path, texts, pages, monkeypatch
):
    assert is_adapter_folder(saved)
    assert not is_adapter_folder(base)
    expected = vectors_of(Retriever.from_pretrained(saved), texts, pages)
    monkeypatch.chdir(tmp_path)
    for name in (str(base), "base"):
        change_config(saved, base_model_name_or_path=name)
        opened = Retriever.from_pretrained(saved)
        assert torch.equal(vectors_of(opened, texts, pages), expected)
    change_config(saved, base_model_name_or_path=str(tmp_path / "gone"))
    advice = re.escape("Retriever.from_pretrained(adapter, base=...)")
    with pytest.raises(CheckpointError, match=f"gone: no such folder.*{advice}"):
        Retriever.from_pretrained(saved)
    opened = Retriever.from_pretrained(saved, base=base)
    assert torch.equal(vectors_of(opened, texts, pages), expected)
    change_config(saved, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=f"names no base.*{advice}"):
        Retriever.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="is an adapter too; merge"):
        Retriever.from_pretrained(saved, base=saved)
    with pytest.raises(CheckpointError, match="whole model, which has no base"):
        Retriever.from_pretrained(base, base=base)


def test_a_base_on_the_hub_is_read_at_the_revision_that_the_adapter_names(
    saved, base, texts, pages, monkeypatch
):
    expected = vectors_of(Retriever.from_pretrained(saved), texts, pages)
    change_config(saved, base_model_name_or_path="someone/base", revision="v1")
    asked = []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr(hub, "snapshot_download", download)
    opened = Retriever.from_pretrained(saved)
    assert set(asked) == {("someone/base", "v1")}
    assert torch.equal(vectors_of(opened, texts, pages), expected)

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"base cannot be opened: someone/base.*no network"):
        Retriever.from_pretrained(saved)


def test_an_adapter_keeps_the_contract_that_it_was_trained_with(adapted, tmp_path, base, texts):
    retriever = adapted()
    templates = retriever.contract.templates.model_copy(update={"query": "Query: {query}"})
    retriever.contract = retriever.contract.model_copy(update={"templates": templates})
    save_adapter(retriever, tmp_path / "adapter", "../base")
    opened = Retriever.from_pretrained(tmp_path / "adapter")
    assert opened.contract.templates == templates
    plain = Retriever.from_pretrained(base)
    assert min(opened.encode_queries(texts).lengths - plain.encode_queries(texts).lengths) > 0
    before = state_of(plain)
    with pytest.raises(CheckpointError, match=r"another contract.*templates.*Query: "):
        load_adapter(plain, tmp_path / "adapter")
    assert_same_state(plain, before)


def test_templates_beside_those_of_the_adapter_are_refused(saved, shared_retriever):
    templates = shared_retriever.contract.templates
    Retriever.from_pretrained(saved, templates=templates)
    with pytest.raises(CheckpointError, match="its contract says the templates"):
        Retriever.from_pretrained(
            saved, templates=templates.model_copy(update={"query": "Query: {query}"})
        )


def test_adapters_of_other_libraries_load_under_old_and_new_names(saved, texts, pages):
    expected = vectors_of(Retriever.from_pretrained(saved), texts, pages)
    as_foreign(saved)
    for old, new in [
        ("language_model.", "model."),
        ("model.layers.", "vlm.language_model.layers."),
    ]:
        with pytest.warns(AssumedWarning, match="names no hash of its base"):
            opened = Retriever.from_pretrained(saved)
        assert torch.equal(vectors_of(opened, texts, pages), expected)
        assert any("no hash of its base" in told for told in opened.contract.assumed)
        as_foreign(
            saved,
            lambda name, old=old, new=new: name.replace(old, new).replace(
                "custom_text_proj",
                "custom_text_proj" if new == "model." else "embedding_proj_layer",
            ),
        )
        engine = r"(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|"
        change_config(saved, target_modules=engine + r".*(custom_text_proj|embedding_proj).*$)")
    with pytest.warns(AssumedWarning):
        opened = Retriever.from_pretrained(saved)
    assert torch.equal(vectors_of(opened, texts, pages), expected)


@pytest.mark.parametrize("old_names", [False, True])
def test_ranks_and_scales_of_single_layers_are_honoured(old_names, saved, base):
    prefix = "model" if old_names else "language_model"
    as_foreign(saved, lambda name: name.replace("language_model", prefix))
    other = f"base_model.model.{prefix}.layers.1.mlp.up_proj"

    def widen(weights):
        for side, dim in (("A", 0), ("B", 1)):
            name = f"{other}.lora_{side}.weight"
            weights[name] = torch.cat([weights[name], weights[name]], dim).contiguous()

    change_weights(saved, widen)
    change_config(
        saved,
        use_rslora=True,
        target_modules=[*LoraSettings().text, "custom_text_proj"],
        rank_pattern={f"{prefix}.layers.1.mlp.up_proj": 6},
        alpha_pattern={"mlp.up_proj": 9, f"^{prefix}.layers.0.self_attn.q_proj": 5},
    )
    with pytest.warns(AssumedWarning):
        opened = Retriever.from_pretrained(saved)
    stored = load_file(saved / WEIGHTS)
    plain = Retriever.from_pretrained(base).weights()
    merge(opened)
    for name, alpha, rank in [
        ("layers.1.mlp.up_proj", 9, 6),
        ("layers.0.mlp.up_proj", 9, 3),
        ("layers.0.self_attn.q_proj", 5, 3),
        ("layers.0.self_attn.k_proj", 6, 3),
    ]:
        a, b = (stored[f"base_model.model.{prefix}.{name}.lora_{x}.weight"].double() for x in "AB")
        expected = plain[f"language_model.{name}.weight"] + alpha / rank**0.5 * b @ a
        merged = opened.weights()[f"language_model.{name}.weight"].double()
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-7)


def test_unequal_ranks_survive_saving(saved, tmp_path):
    as_foreign(saved)
    name = "base_model.model.language_model.layers.1.mlp.up_proj.lora_{}.weight"

    def narrow(weights):
        weights[name.format("A")] = weights[name.format("A")][:2].contiguous()
        weights[name.format("B")] = weights[name.format("B")][:, :2].contiguous()

    change_weights(saved, narrow)
    change_config(saved, rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"q_proj": 2.5})
    with pytest.warns(AssumedWarning):
        opened = Retriever.from_pretrained(saved)
    save_adapter(opened, tmp_path / "again", "../base")
    again = Retriever.from_pretrained(tmp_path / "again")
    assert again.fingerprint() == opened.fingerprint()


def test_saving_over_another_folder_is_refused(adapted, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="choose another folder"):
        save_adapter(adapted(), tmp_path / "taken", "../base")
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    for _ in range(2):  # over itself it may be
        save_adapter(adapted(), tmp_path / "adapter", "../base")
