import json
import re

import pytest
import torch

from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.contract import (
    Contract,
    Source,
    check_saved,
    differences,
    hash_weights,
    load_contract,
    projection_of,
    save_contract,
)

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
TOLD = {
    "recipe": {"train": {"steps": 3}},
    "data": {"pages train": "f00d"},
    "metrics": {"validation ndcg@5": 0.25},
    "source": Source(name="owner/name", revision="c" * 40),
    "loaded_from": Source(name="owner/other", revision="d" * 40),
    "versions": {"torch": "1"},
    "assumed": ("a sentence",),
}


@pytest.fixture
def contract(shared_retriever):
    return shared_retriever.contract


def test_a_contract_reads_back_equal(contract, tmp_path):
    told = contract.model_copy(update={name: TOLD[name] for name in TOLD if name != "versions"})
    save_contract(told, tmp_path, WEIGHTS)
    assert check_saved(load_contract(tmp_path), WEIGHTS, "here") == told


def test_a_folder_without_a_contract_tells_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="colfolio init"):
        load_contract(tmp_path)


def test_a_contract_of_before_its_newer_fields_is_read(contract, tmp_path):
    old = ("dim", "templates", "pixel_budget", "position_scheme", "views", "base_hash")
    values = contract.model_dump(mode="json", include=set(old)) | {"format": 1}
    (tmp_path / "colfolio.json").write_text(json.dumps(values))
    read = check_saved(load_contract(tmp_path), WEIGHTS, "here")
    assert read.deciding() == contract.deciding()


def test_a_field_that_a_later_version_adds_does_not_break_a_seal(contract, tmp_path):
    save_contract(contract, tmp_path, WEIGHTS)
    values = json.loads((tmp_path / "colfolio.json").read_text())
    for name in ("assumed", "metrics"):  # as if they had not been there
        del values[name], values["seal"][name]
    (tmp_path / "colfolio.json").write_text(json.dumps(values))
    check_saved(load_contract(tmp_path), WEIGHTS, "here")


def test_hash_and_seal_hold_for_a_folder_and_not_in_memory(contract, tmp_path):
    save_contract(contract, tmp_path, WEIGHTS)
    saved = load_contract(tmp_path)
    assert saved.weights_hash == hash_weights(WEIGHTS)
    checked = check_saved(saved, WEIGHTS, "here")
    assert (checked.weights_hash, checked.files, checked.seal) == ("", {}, {})


def test_weights_that_say_they_are_a_base_have_the_projection_that_was_drawn(retriever, tmp_path):
    other = {"projection_hash": hash_weights({"a": torch.ones(1)})}
    retriever.contract = retriever.contract.model_copy(update=other)
    retriever.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"projection_hash is .* but they have"):
        Retriever.from_pretrained(tmp_path / "model")


def test_a_base_names_its_weights_and_its_projection(shared_retriever):
    weights, contract = shared_retriever.weights(), shared_retriever.contract
    assert contract.base_hash == hash_weights(weights)
    assert contract.projection_hash == hash_weights(projection_of(weights))
    assert set(projection_of(weights)) == {"custom_text_proj.weight", "custom_text_proj.bias"}
    assert {"torch", "transformers", "colfolio"} <= set(contract.versions)


def test_trained_weights_keep_the_name_of_their_base(retriever, tmp_path):
    before = retriever.contract.base_hash
    retriever.projection.weight.data.add_(1)
    retriever.save_pretrained(tmp_path / "model")
    assert Retriever.from_pretrained(tmp_path / "model").contract.base_hash == before


def test_what_a_model_came_from_is_no_part_of_its_fingerprint(retriever):
    before = retriever.fingerprint()
    retriever.contract = retriever.contract.model_copy(update=TOLD)
    assert retriever.fingerprint() == before


@pytest.mark.parametrize(
    "changed", [{"views": "strips"}, {"frame_rate": 1.0}, {"templates": Templates()}]
)
def test_what_decides_a_vector_is_part_of_its_fingerprint(retriever, changed):
    before = retriever.fingerprint()
    retriever.contract = retriever.contract.model_copy(update=changed)
    assert retriever.fingerprint() != before


@pytest.mark.parametrize("is_fresh", [False, True])
def test_a_contract_that_is_set_holds_for_inputs_at_once(retriever, texts, is_fresh, tmp_path):
    retriever.eval()
    before = retriever.encode_queries(texts).lengths
    templates = retriever.contract.templates.model_copy(update={"query": "Find {query}"})
    other = retriever.contract.model_copy(update={"templates": templates})
    if is_fresh:
        made = Retriever(retriever.backbone, retriever.projection, retriever.tokenizer, other)
    else:
        made = retriever
        made.contract = other
    assert min(made.encode_queries(texts).lengths - before) > 0
    made.save_pretrained(tmp_path / "model")
    loaded = Retriever.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode_queries(texts).vectors, made.encode_queries(texts).vectors)


def test_a_contract_that_only_tells_more_leaves_the_inputs_alone(retriever):
    before = retriever.collator
    retriever.contract = retriever.contract.model_copy(update=TOLD)
    assert retriever.collator is before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dim": 99}, "dim is 99, but its projection has 16 rows"),
        ({"position_scheme": "videorope"}, "position_scheme is 'videorope', not 'qwen2_vl'"),
        ({"templates": Templates(document="no image")}, "the document <|image_pad|> once"),
    ],
)
def test_a_contract_that_the_model_cannot_keep_is_refused(retriever, changed, words):
    before, collator = retriever.contract, retriever.collator
    other = before.model_copy(update=changed)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        retriever.contract = other
    assert (retriever.contract, retriever.collator) == (before, collator)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Retriever(retriever.backbone, retriever.projection, retriever.tokenizer, other)


def test_a_contract_of_other_dimensions_than_the_weights_is_not_saved(retriever, tmp_path):
    wide = retriever.weights()
    wide["custom_text_proj.weight"] = torch.ones(99, 32)
    with pytest.raises(CheckpointError, match=r"of 16 dimensions, and .* has 99"):
        retriever.save_pretrained(tmp_path / "model", wide)
    assert not any(tmp_path.iterdir())


def test_weights_that_a_contract_names_need_its_seal(contract, tmp_path):
    save_contract(contract, tmp_path, WEIGHTS)
    path = tmp_path / "colfolio.json"
    values = json.loads(path.read_text())
    values["templates"]["query"] = "Query: {query}"
    del values["seal"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="weights_hash and no seal"):
        check_saved(load_contract(tmp_path), WEIGHTS, "here")


def test_every_field_either_decides_vectors_or_tells_where_they_came_from(contract):
    decides = set(json.loads(contract.deciding()))
    tells = {"format", "base_hash", "projection_hash", *TOLD}
    tells |= {"weights_hash", "plan_hash", "files", "seal"}  # of a folder
    assert decides | tells == set(Contract.model_fields)
    assert not decides & tells


def test_differences_are_told_field_by_field_with_both_values(contract):
    budget = contract.pixel_budget.model_copy(update={"max_pixels": 1000000})
    other = contract.model_copy(update={"dim": 3, "pixel_budget": budget})
    assert differences(contract, contract) == []
    assert differences(contract, other) == [
        "dim is 16, not 3",
        f"pixel_budget.max_pixels is {contract.pixel_budget.max_pixels}, not 1000000",
    ]


def test_a_key_that_one_side_lacks_is_a_difference(contract):
    ours = contract.model_copy(update={"data": {"a": "1"}})
    theirs = contract.model_copy(update={"data": {"b": "2"}})
    assert differences(ours, theirs) == ["data.a is '1', not None", "data.b is None, not '2'"]


def test_the_hash_does_not_depend_on_order_or_layout():
    turned = {"b": WEIGHTS["b"], "a": WEIGHTS["a"].T.contiguous().T}
    assert hash_weights(turned) == hash_weights(WEIGHTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": WEIGHTS["a"].reshape(3, 2)},
        {"a": WEIGHTS["a"].double()},
        {"a": WEIGHTS["a"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])},
        {"b": torch.zeros(2, dtype=torch.bfloat16)},
        {"c": torch.ones(1)},
    ],
)
def test_the_hash_sees_names_shapes_dtypes_and_bits(changed):
    assert hash_weights(WEIGHTS | changed) != hash_weights(WEIGHTS)


def test_a_tensor_of_no_dimensions_has_a_hash():
    assert hash_weights({"a": torch.tensor(1.0)}) != hash_weights({"a": torch.tensor(2.0)})
