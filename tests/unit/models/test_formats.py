"""Which folders are read, by which names of tensors, and what is written where."""

import pytest
import torch
from exports import CONTRACT, TARGETS, WEIGHTS, change, change_weights, found
from safetensors.torch import save_file

from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.formats import AssumedWarning, Found, detect, read, write, writing
from colfolio.models.formats.layouts import LAYOUTS, to_our_names, to_their_names


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_is_known_by_its_files(target, exported):
    assert detect(exported[0] / target) == target


def test_an_adapter_is_known_and_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert detect(tmp_path) == "adapter"
    with pytest.raises(CheckpointError, match="holds an adapter alone"):
        read(tmp_path)


def test_an_unknown_folder_is_told_what_was_seen_and_what_is_known(tmp_path):
    change(tmp_path / "config.json", model_type="bert", architectures=["HF_ColBERT"])
    with pytest.raises(CheckpointError, match=r"'bert'.*HF_ColBERT.*qwen2_5_vl.*modules\.json"):
        read(tmp_path)


def test_a_model_of_ours_without_its_contract_is_damaged(folder_of):
    folder = folder_of("colfolio")
    (folder / CONTRACT).unlink()
    with pytest.raises(CheckpointError, match=r"no colfolio\.json"):
        read(folder)


def test_a_backbone_without_a_projection_is_told_of_init(folder_of):
    folder = folder_of("colpali-engine")
    change_weights(folder / WEIGHTS, lambda w: [w.pop(f"custom_text_proj.{n}") for n in _PARTS])
    with pytest.raises(CheckpointError, match="colfolio init"):
        read(folder)


_PARTS = ("weight", "bias")


@pytest.mark.parametrize("format", LAYOUTS)
def test_every_layout_of_a_format_is_read(format, exported):
    weights = exported[1].weights()
    for layout in LAYOUTS[format]:
        theirs = to_their_names(weights, layout)
        back = to_our_names(theirs, format, "test")
        assert back.keys() == weights.keys()
        assert all(back[name] is weights[name] for name in weights)


@pytest.mark.parametrize("number", [1, 2])
def test_a_head_is_dropped_by_its_name_in_layouts_that_have_one(number, exported):
    layout = LAYOUTS["colpali-engine"][number]
    theirs = to_their_names(exported[1].weights(), layout) | {"lm_head.weight": torch.zeros(2)}
    assert to_our_names(theirs, "colpali-engine", "test").keys() == exported[1].weights().keys()


@pytest.mark.parametrize("name", ["lm_head.bias", "lm_head.weight.scale", "model.extra", "extra"])
def test_nothing_else_is_dropped(name, folder_of, exported):
    folder = folder_of("colpali-engine")
    theirs = to_their_names(exported[1].weights(), LAYOUTS["colpali-engine"][1])
    save_file(theirs | {name: torch.zeros(2)}, folder / WEIGHTS)
    with pytest.warns(AssumedWarning), pytest.raises(CheckpointError, match=f"Unexpected: {name}"):
        Retriever.from_pretrained(folder)


def test_two_tensors_of_one_name_are_refused(folder_of):
    folder = folder_of("transformers")

    def twice(weights):
        weights["visual.merger.ln_q.bias"] = weights["vlm.visual.merger.ln_q.bias"].clone()

    change_weights(folder / WEIGHTS, twice)
    with pytest.raises(CheckpointError, match=r"visual\.merger\.ln_q\.bias twice"):
        read(folder)


def test_patches_that_the_tower_does_not_read_are_refused(folder_of):
    folder = folder_of("colpali-engine")
    change(folder / "preprocessor_config.json", patch_size=16)
    with pytest.warns(AssumedWarning), pytest.raises(CheckpointError, match=r"patch is 16"):
        Retriever.from_pretrained(folder)


def test_templates_are_given_only_where_no_contract_says_them(folder_of):
    folder = folder_of("colfolio")
    with pytest.raises(CheckpointError, match="as it was trained"):
        Retriever.from_pretrained(folder, templates=Templates())
    own = Retriever.from_pretrained(folder).contract.templates
    assert Retriever.from_pretrained(folder, templates=own).contract.templates == own


@pytest.mark.parametrize("target", TARGETS)
def test_no_weights_are_pickled_and_none_linked(target, exported):
    files = [path for path in (exported[0] / target).rglob("*") if path.is_file()]
    assert not [path for path in files if path.is_symlink()]
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".json", ".safetensors", ".md", ".jinja"}


@pytest.mark.parametrize(
    ("family", "dim", "target", "words"),
    [
        ("qwen2_vl", 16, "colpali-engine", r"ColQwen2 .* 128 dimensions.*gives 16"),
        ("qwen3_vl", 128, "colpali-engine", r"ColQwen3 .* 320 dimensions"),
        ("qwen2_5_vl", 16, "transformers", r"qwen2_5_vl.*only over qwen2_vl"),
        ("qwen3_vl", 16, "transformers", "--to sentence-transformers"),
    ],
)
def test_a_library_without_a_class_for_the_model_is_refused(
    family, dim, target, words, make_family_retriever, tmp_path
):
    with pytest.raises(CheckpointError, match=words):
        write(found(make_family_retriever(family, dim=dim)), tmp_path / "out", target)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(exported, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        write(found(exported[1]), tmp_path / "out", "transformers")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_written_into(exported, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        write(found(exported[1]), tmp_path / "thesis", "sentence-transformers")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def told(retriever, tmp_path, target, **templates):
    contract = retriever.contract
    changed = Templates(**(contract.templates.model_dump() | templates))
    one = found(retriever)
    own = contract.model_copy(update={"templates": changed})
    copy = Found(one.format, one.config, one.weights, one.tokenizer, own)
    return " ".join(write(copy, tmp_path / "out", target))


ENGINE = {
    "query": "{query}",
    "query_suffix": "<|endoftext|>",
    "num_query_suffix": 10,
    "document": Templates().document,
}


def test_colpali_engine_needs_no_words_where_it_writes_the_strings_of_the_model(exported, tmp_path):
    notes = told(exported[1], tmp_path, "colpali-engine", **ENGINE)
    assert "process_queries" not in notes
    assert "process_images" not in notes


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"query": "Query: {query}"}, "process_texts"),
        ({"num_query_suffix": 9}, "process_texts"),
        ({"document": "<|image_pad|>"}, "visual_prompt_prefix"),
    ],
)
def test_colpali_engine_is_told_of_other_strings(changed, words, exported, tmp_path):
    assert words in told(exported[1], tmp_path, "colpali-engine", **(ENGINE | changed))
    assert words in (tmp_path / "out" / "README.md").read_text()


def test_transformers_is_always_told_of_positions(exported, tmp_path):
    assert "position_ids" in told(exported[1], tmp_path, "transformers")
    assert "position_ids=position_ids" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_says_recipe_data_metrics_and_origin(exported, tmp_path):
    retriever = exported[1]
    contract = retriever.contract.model_copy(
        update={
            "recipe": {"train": {"steps": 7}},
            "data": {"train": "abc123"},
            "metrics": {"test ndcg@5": 0.875},
            "assumed": ("nobody said so",),
        }
    )
    one = found(retriever)
    copy = Found(one.format, one.config, one.weights, one.tokenizer, contract)
    write(copy, tmp_path / "out", "sentence-transformers")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("steps: 7", "abc123", "0.875", "Nobody said so.", contract.base_hash):
        assert words in card, words
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")


@pytest.mark.parametrize("target", TARGETS[1:])
def test_the_programs_of_a_card_are_python(target, exported):
    card = (exported[0] / target / "README.md").read_text()
    programs = card.split("```python\n")[1:]
    assert len(programs) == 2
    for program in programs:
        compile(program.split("```")[0], target, "exec")
