"""What we write other libraries load, and it comes back: tensors, strings and vectors."""

import json
import re
from pathlib import Path

import pytest
from exports import CONTRACT, assert_same_rows, assert_same_weights, written
from sentence_transformers import MultiVectorEncoder
from transformers import AutoTokenizer

from colfolio.models import Retriever
from colfolio.models.checkpoint import empty_backbone
from colfolio.models.contract import PROJECTION, differences
from colfolio.models.files import backbone_config
from colfolio.models.formats import AssumedWarning
from colfolio.models.formats.layouts import LAYOUTS

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
WRITTEN = [
    *((family, target) for family in FAMILIES for target in ("colfolio", "colpali-engine")),
    *((family, "sentence-transformers") for family in FAMILIES),
    ("qwen2_vl", "transformers"),
]
ENDS = "<|endoftext|>" * 10


def assert_same_config(mine, theirs):
    def values(config):
        said = config.to_dict()
        for part in (said, said["text_config"], said["vision_config"]):
            for name in ("architectures", "transformers_version", "dtype", "_attn_implementation"):
                part.pop(name, None)
        return said

    assert values(mine) == values(theirs)


@pytest.mark.parametrize(("family", "target"), WRITTEN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_for_a_library_comes_back_to_the_bit(
    family, target, dtype, make_wide, tmp_path
):
    retriever = make_wide(family, dtype=dtype)
    back = Retriever.from_pretrained(written(retriever, tmp_path / "out", target))
    assert_same_weights(retriever.weights(), back.weights())
    assert_same_config(retriever.backbone.config, back.backbone.config)
    assert differences(back.contract, retriever.contract) == []
    assert back.fingerprint() == retriever.fingerprint()


@pytest.mark.parametrize(("family", "target"), [pair for pair in WRITTEN if pair[1] != "colfolio"])
def test_without_its_contract_the_files_of_a_library_say_the_rest(
    family, target, make_wide, tmp_path
):
    retriever = make_wide(family)
    folder = written(retriever, tmp_path / "out", target)
    (folder / CONTRACT).unlink()
    own, templates = retriever.contract, retriever.contract.templates
    if target == "sentence-transformers":
        back = Retriever.from_pretrained(folder)
        assert back.contract.assumed == ()
        assert back.contract.deciding() == own.deciding()
    else:
        with pytest.warns(AssumedWarning, match="quer"):
            back = Retriever.from_pretrained(folder)
        assert back.contract.pixel_budget == own.pixel_budget
        assert back.contract.templates != templates
        given = Retriever.from_pretrained(folder, templates=templates)
        assert given.contract.deciding() == own.deciding()
    assert_same_weights(retriever.weights(), back.weights())


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_gives_our_vectors(
    family, make_wide, tmp_path, texts, pages, images, without_torchvision
):
    retriever = make_wide(family)
    folder = written(retriever, tmp_path / "out", "sentence-transformers")
    encoder = MultiVectorEncoder(str(folder), device="cpu")
    assert_same_rows(retriever.encode_queries(texts), encoder.encode_query(texts))
    assert_same_rows(retriever.encode_documents(pages), encoder.encode_document(images))


@pytest.mark.parametrize("prompt", ["", "find: "])
def test_what_sentence_transformers_saves_is_read_with_its_prompts(
    prompt, make_wide, tmp_path, texts, pages, images, without_torchvision
):
    folder = written(make_wide("qwen2_vl"), tmp_path / "out", "sentence-transformers")
    encoder = MultiVectorEncoder(str(folder), device="cpu", prompts={"query": prompt})
    encoder.save(str(tmp_path / "saved"))
    loaded = Retriever.from_pretrained(tmp_path / "saved")
    assert loaded.contract.templates.query == prompt + "{query}"
    assert_same_rows(loaded.encode_queries(texts), encoder.encode_query(texts))
    assert_same_rows(loaded.encode_documents(pages), encoder.encode_document(images))


def test_a_retrieval_model_of_sentence_transformers_is_read_as_its_processor_writes(
    make_wide, tmp_path, texts
):
    """Its pages are compared elsewhere: here it gives image tokens positions in one dimension."""
    source = written(make_wide("qwen2_vl"), tmp_path / "out", "transformers")
    encoder = MultiVectorEncoder(str(source), device="cpu", prompts={"query": "find: "})
    encoder.save(str(tmp_path / "saved"))
    with pytest.warns(AssumedWarning, match="one dimension"):
        loaded = Retriever.from_pretrained(tmp_path / "saved")
    assert loaded.contract.templates.query == "Query: find: {query}" + ENDS + "\n"
    assert_same_rows(loaded.encode_queries(texts), encoder.encode_query(texts))


def test_the_card_calls_transformers_so_that_vectors_are_ours(
    make_wide, tmp_path, images, monkeypatch, capsys
):
    retriever = make_wide("qwen2_vl")
    run = run_card(written(retriever, tmp_path / "out", "transformers"), images[3], monkeypatch)
    assert_same_rows(retriever.encode_queries(run["queries"]), run["vectors"])
    assert_same_rows(retriever.encode_documents(run["pages"]), run["documents"])
    flat = run["model"](**run["processor"](images=run["pages"])).embeddings
    assert (flat - run["documents"]).abs().max() > 1e-2  # without position_ids: the pitfall told


def test_the_card_calls_sentence_transformers_so_that_vectors_are_ours(
    make_wide, tmp_path, images, monkeypatch, capsys, without_torchvision
):
    retriever = make_wide("qwen2_vl")
    folder = written(retriever, tmp_path / "out", "sentence-transformers")
    run = run_card(folder, images[3], monkeypatch)
    assert_same_rows(retriever.encode_queries(run["queries"]), run["vectors"])
    assert_same_rows(retriever.encode_documents(run["pages"]), run["documents"])


def run_card(folder, page, monkeypatch):
    """The names that the first program of a model card leaves; all are run in its folder."""
    page.save(folder / "page.png")
    monkeypatch.chdir(folder)
    left = []
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S):
        left.append({})
        exec(compile(code, "README.md", "exec"), left[-1])
    return left[0]


def test_the_tokenizer_of_other_libraries_gives_our_tokens(make_wide, tmp_path, texts):
    retriever = make_wide("qwen2_vl")
    folder = written(retriever, tmp_path / "out", "colpali-engine")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = retriever.contract.templates
    suffix = templates.query_suffix * templates.num_query_suffix
    whole = [text + suffix for text in texts]
    assert tokenizer(whole)["input_ids"] == retriever.collator.prompter.query_ids(texts)
    assert tokenizer.pad_token == templates.query_suffix


@pytest.mark.parametrize("name", ["qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-3b", "qwen3-vl-2b"])
def test_every_tensor_of_a_full_size_model_has_one_name_in_each_layout(name):
    values = json.loads((Path(__file__).parent / "shapes" / f"{name}.json").read_text())
    backbone = empty_backbone(backbone_config(values, name), name)
    names = [*backbone.state_dict(), PROJECTION + "weight", PROJECTION + "bias"]
    assert all(tensor.is_meta for tensor in backbone.state_dict().values())
    for layouts in LAYOUTS.values():
        for layout in layouts:
            theirs = [layout.theirs(each) for each in names]
            assert len(set(theirs)) == len(names)
            assert [layout.ours(each) for each in theirs] == names
            assert layout.num_unknown(theirs) == 0
