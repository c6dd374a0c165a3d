"""Models of every library pass what is sound about them, and fail where a fault is planted."""

import pytest
import torch
from exports import CONTRACT, WEIGHTS, change, change_weights, written

from colfolio.data.prompts import Templates
from colfolio.diagnosis.preflight import check_model, library_model, vector_checks
from colfolio.diagnosis.preflight import model_checks as asked
from colfolio.diagnosis.preflight.subject import Subject, merged_weights, probe_rows
from colfolio.models import Retriever
from colfolio.models.adapters import LoraSettings, add_lora, save_adapter
from colfolio.models.lora.placing import lora_layers, named_modules

OTHERS = ["colpali-engine", "transformers", "sentence-transformers"]
ENGINE = Templates()


@pytest.fixture
def model(make_retriever):
    """As wide as colpali-engine's, with its strings."""
    return make_retriever(dim=128, templates=ENGINE).eval()


@pytest.fixture
def folder_of(model, tmp_path):
    """The model as files of a library, without our contract beside those of others."""

    def folder_of(target, *, with_contract=False):
        folder = written(model, tmp_path / target, target)
        if target != "colfolio" and not with_contract:
            (folder / CONTRACT).unlink()
        return folder

    return folder_of


def checks_of(folder):
    return {check.name: check for check in check_model(str(folder), device="cpu")}


def failed(folder):
    return {name: each.cause for name, each in checks_of(folder).items() if not each.passed}


@pytest.mark.parametrize("target", ["colfolio", "colpali-engine", "sentence-transformers"])
def test_a_sound_model_passes(target, folder_of):
    checks = checks_of(folder_of(target))
    assert list(checks) == [
        *(asked.LOADS, asked.POSITIONS, asked.TEMPLATE, asked.APART, asked.ALONE, asked.SAVED)
    ]
    assert [check for check in checks.values() if not check.passed] == []
    assert "colpali-engine from 0.3.11" in checks[asked.TEMPLATE].told


def test_the_retrieval_class_of_transformers_flattens_positions_and_is_sound_otherwise(folder_of):
    checks = checks_of(folder_of("transformers"))
    assert [name for name, check in checks.items() if not check.passed] == [asked.POSITIONS]
    assert checks[asked.POSITIONS].cause == "positions_flattened"
    assert "transformers 5" in checks[asked.TEMPLATE].told


def test_strings_that_no_file_tells_are_said_to_be_assumed(folder_of):
    told = checks_of(folder_of("colpali-engine"))[asked.TEMPLATE].told
    assert "0.3.10" in told


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("colfolio", "custom_text_proj.weight"),
        ("colpali-engine", "custom_text_proj.bias"),
        ("transformers", "embedding_proj_layer.weight"),
        ("sentence-transformers", "visual.merger.mlp.0.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(target, name, folder_of):
    folder = folder_of(target)
    change_weights(folder / WEIGHTS, lambda weights: weights.pop(name))
    checks = checks_of(folder)
    assert list(checks) == [asked.LOADS]
    assert (checks[asked.LOADS].passed, checks[asked.LOADS].cause) == (False, "fresh_tensors")
    assert name.rsplit(".", 1)[1] in checks[asked.LOADS].told


def test_a_tensor_of_another_shape_is_named(folder_of):
    folder = folder_of("colpali-engine")

    def cut(weights):
        weights["language_model.norm.weight"] = weights["language_model.norm.weight"][:-1].clone()

    change_weights(folder / WEIGHTS, cut)
    check = checks_of(folder)[asked.LOADS]
    assert not check.passed
    assert "language_model.norm.weight (31,) instead of (32,)" in check.told


def test_weights_that_differ_between_two_loads_are_found(folder_of, monkeypatch):
    folder, own = folder_of("colpali-engine"), Retriever.from_pretrained

    def fresh(*given, **options):
        loaded = own(*given, **options)
        with torch.no_grad():
            loaded.projection.weight.normal_()
        return loaded

    monkeypatch.setattr(Retriever, "from_pretrained", fresh)
    check = checks_of(folder)[asked.LOADS]
    assert (check.passed, check.cause) == (False, "fresh_tensors")
    assert "custom_text_proj.weight" in check.told


def test_strings_other_than_the_library_writes_are_found(make_retriever, tmp_path):
    other = Templates(query="Query: {query}")
    model = make_retriever(dim=128, templates=other).eval()
    assert failed(written(model, tmp_path / "out", "colpali-engine")) == {
        asked.TEMPLATE: "wrong_template"
    }


def test_a_prefix_of_the_processor_is_its_own(folder_of):
    folder = folder_of("transformers")
    change(folder / "processor_config.json", query_prefix="Ask: ")
    told = checks_of(folder)[asked.TEMPLATE].told
    assert "'Ask: {query}" in told
    assert "none of the known" in told


@pytest.mark.parametrize("is_retrieval", [False, True])
def test_the_side_of_padding_changes_no_vector_of_a_sound_model(is_retrieval, model):
    library = library_model.library_model(model, merged_weights(model), is_retrieval=is_retrieval)
    rows = probe_rows(model)
    for packed in (rows.queries, rows.documents):
        for side in library_model.SIDES:
            assert asked._padding_effect(library, packed, side) < 1e-5


@pytest.mark.parametrize("target", OTHERS)
def test_padding_that_is_seen_is_found(target, folder_of, monkeypatch):
    own = library_model._padded

    def unmasked(*given):
        ids, mask = own(*given)
        return ids, mask.clone().fill_(1)

    def rows(self, packed, side, padding):
        found = real(self, packed, side, padding)
        return [
            each[-length:] if side == "left" else each[:length]
            for each, length in zip(found, packed.lengths.tolist(), strict=True)
        ]

    real = library_model.LibraryModel.rows
    monkeypatch.setattr(library_model, "_padded", unmasked)
    monkeypatch.setattr(library_model.LibraryModel, "rows", rows)
    assert failed(folder_of(target))[asked.ALONE] == "padding_side"


def test_the_library_gives_our_vectors_of_queries(model):
    rows = probe_rows(model)
    with torch.no_grad():
        ours = list(model(rows.queries))
    for is_retrieval in (False, True):
        made = library_model.library_model(
            model, merged_weights(model), is_retrieval=is_retrieval
        ).rows(rows.queries, "left", 2)
        for mine, theirs in zip(ours, made, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_save_that_loses_weights_is_found(folder_of, model, monkeypatch):
    folder = folder_of("colpali-engine")
    own = asked.write

    def lossy(found, place, target):
        found.weights["custom_text_proj.weight"] = -found.weights["custom_text_proj.weight"]
        return own(found, place, target)

    monkeypatch.setattr(asked, "write", lossy)
    assert failed(folder) == {asked.SAVED: "fresh_tensors"}


@pytest.fixture
def adapter_of(model, tmp_path):
    """An adapter on the model, whose matrices B are not zero, or are."""

    def adapter_of(*, is_trained, with_contract=True):
        model.save_pretrained(tmp_path / "base")
        adapted = Retriever.from_pretrained(tmp_path / "base")
        add_lora(adapted, LoraSettings(rank=2), 0)
        if is_trained:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for _, layer in lora_layers(named_modules(adapted.backbone, adapted.projection)):
                    layer.lora_B["default"].weight.normal_(std=0.1, generator=generator)
        save_adapter(adapted, tmp_path / "adapter", str(tmp_path / "base"))
        if not with_contract:
            (tmp_path / "adapter" / CONTRACT).unlink()
        return tmp_path / "adapter"

    return adapter_of


@pytest.mark.parametrize("with_contract", [True, False])
def test_a_trained_adapter_passes(with_contract, adapter_of):
    checks = checks_of(adapter_of(is_trained=True, with_contract=with_contract))
    assert [check for check in checks.values() if not check.passed] == []
    assert "of an adapter" in checks[asked.LOADS].told


def test_an_adapter_that_changes_nothing_is_found(adapter_of):
    assert failed(adapter_of(is_trained=False)) == {asked.ADAPTER: "adapter_not_loaded"}


def test_an_adapter_whose_other_matrices_are_zero_is_found(adapter_of):
    folder = adapter_of(is_trained=True, with_contract=False)

    def clear(weights):
        for name in weights:
            if "lora_A" in name:
                weights[name].zero_()

    change_weights(folder / "adapter_model.safetensors", clear)
    assert failed(folder) == {asked.ADAPTER: "adapter_not_loaded"}


def test_an_adapter_of_another_base_is_found(adapter_of, make_retriever, tmp_path):
    folder = adapter_of(is_trained=True)
    make_retriever(seed=1, dim=128, templates=ENGINE).save_pretrained(tmp_path / "base")
    check = checks_of(folder)[asked.LOADS]
    assert (check.passed, check.cause) == (False, "adapter_of_another_base")
    assert "adapter of other weights" in check.told
    assert "less strictly" not in check.told


@pytest.mark.parametrize("target", OTHERS)
def test_a_projection_of_zeros_is_found_and_named(target, folder_of):
    folder = folder_of(target)
    for path in folder.rglob("*.safetensors"):
        change_weights(path, _clear_projection)
    checks = checks_of(folder)
    assert not checks[asked.APART].passed
    assert "lengths of 0 to 0" in checks[asked.APART].told
    assert checks[asked.ALONE].cause in ("", "not_finite")  # 0 / 0 where the library divides


def _clear_projection(weights):
    for name, tensor in weights.items():
        if "proj_layer" in name or "text_proj" in name or name.startswith("linear"):
            tensor.zero_()


def test_vectors_that_are_all_alike_are_found(folder_of):
    folder = folder_of("colpali-engine")

    def change_projection(weights):
        weights["custom_text_proj.weight"].zero_()
        weights["custom_text_proj.bias"].fill_(1)

    change_weights(folder / WEIGHTS, change_projection)
    assert failed(folder) == {asked.APART: "collapsed"}


def test_a_vision_tower_that_sees_nothing_is_found(folder_of):
    folder = folder_of("colpali-engine")

    def blind(weights):
        for name, tensor in weights.items():
            if "patch_embed" in name:
                tensor.zero_()

    change_weights(folder / WEIGHTS, blind)
    assert failed(folder) == {asked.APART: "images_unseen"}


def test_vectors_that_are_no_numbers_are_not_called_padding(model):
    rows, other = [torch.full((2, 4), float("nan")), torch.ones(1, 4)], [torch.ones(2, 4)]
    apart = vector_checks.most_apart(rows, [*other, torch.ones(1, 4)])
    check = vector_checks.alike(asked.ALONE, apart, 1e-4, "nan", "padding_side")
    assert (check.passed, check.cause) == (False, "not_finite")


@pytest.mark.parametrize(
    ("break_file", "cause"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"cut"), ""),
        (lambda folder: (folder / "tokenizer.json").unlink(), ""),
        (lambda folder: change_weights(folder / WEIGHTS, _spoil), "not_finite"),
    ],
    ids=["cut", "no tokenizer", "nan"],
)
def test_files_that_no_library_reads_are_not_blamed_on_lenient_ones(break_file, cause, folder_of):
    folder = folder_of("colpali-engine")
    break_file(folder)
    (check,) = check_model(str(folder), device="cpu")
    assert (check.passed, check.cause) == (False, cause)
    assert "less strictly" not in check.told


def _spoil(weights):
    next(iter(weights.values())).fill_(float("nan"))


def test_a_chat_template_without_its_slot_is_named(folder_of):
    folder = folder_of("sentence-transformers")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} wrong")
    (check,) = check_model(str(folder), device="cpu")
    assert (check.passed, check.cause) == (False, "wrong_template")


def test_a_half_precise_backbone_below_a_wide_projection_is_judged_by_the_backbone(folder_of):
    folder = folder_of("sentence-transformers")

    def narrow(weights):
        for name in weights:
            weights[name] = weights[name].bfloat16()

    change_weights(folder / WEIGHTS, narrow)
    assert failed(folder) == {}


def test_positions_of_ours_are_asked_as_we_encode(folder_of, model):
    subject = Subject(model, "colfolio", folder_of("colfolio"))
    check = asked.positions(subject)
    assert check.passed
    assert "3 queries and 3 documents" in check.told
