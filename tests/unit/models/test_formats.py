"""Which folders are read, what they say, what is refused by name, and what is written where."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import IMAGE_TOKEN, Templates
from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.families import FAMILIES
from colfolio.models.formats import AssumedWarning, Found, detect, read, write, writing
from colfolio.models.formats.chat import chat_template, rendered, templates_of, whole_query
from colfolio.models.formats.images import pixel_budget_of, write_processor_files
from colfolio.models.formats.layouts import LAYOUTS, to_our_names, to_their_names

WEIGHTS = "model.safetensors"
CONTRACT = "colfolio.json"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TARGETS = ["colfolio", "colpali-engine", "transformers", "sentence-transformers"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_shape, tiny_tokenizer):
    """A folder of each target, without our contract, and the retriever that is in all of them."""
    from colfolio.models import base_from_shape

    shape = tiny_shape.model_copy(update={"dim": 128})
    retriever = base_from_shape(shape, tiny_tokenizer, 0).eval()
    root = tmp_path_factory.mktemp("exported")
    for target in TARGETS:
        write(found(retriever), root / target, target)
        if target != "colfolio":
            (root / target / CONTRACT).unlink()
    return root, retriever


@pytest.fixture
def folder_of(exported, tmp_path):
    """A copy of the folder of a target, to be changed."""

    def copied(target):
        return shutil.copytree(exported[0] / target, tmp_path / "model")

    return copied


def found(retriever):
    config, weights = retriever.backbone.config, retriever.weights()
    return Found("any", config, weights, retriever.tokenizer, retriever.contract)


def change(path, **values):
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | values))


def drop(path, name):
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))


def change_weights(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def set_modules(folder, edit):
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    edit(modules)
    path.write_text(json.dumps(modules))


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


@given(
    before=st.text("Que: \n\\\"'{}%é漢🙂", max_size=8),
    after=st.text("ab \n\\\"'%", max_size=5),
    suffix=st.sampled_from(SPECIAL),
    count=st.integers(1, 12),
    page=st.text("Describe\n\\\"'{}%é", max_size=8),
)
def test_templates_survive_a_chat_template(before, after, suffix, count, page):
    templates = Templates(
        query=before + "{query}" + after,
        query_suffix=suffix,
        num_query_suffix=count,
        document=page + IMAGE_TOKEN + page,
    )
    query, document = rendered(chat_template(templates), "test", {})
    assert query == whole_query(templates)
    assert templates_of(query, document, SPECIAL, "test") == templates


def test_a_prompt_stands_before_what_a_chat_template_writes():
    template = chat_template(Templates())
    query, document = rendered(template, "test", {"query": "find: ", "document": "page: "})
    assert query.startswith("find: {query}<|endoftext|>")
    assert document.startswith("page: <|im_start|>user")


def test_a_query_without_a_special_token_at_its_end_has_no_augmentation():
    templates = templates_of("<|im_start|>{query}\n", IMAGE_TOKEN, SPECIAL, "test")
    assert (templates.query, templates.num_query_suffix) == ("<|im_start|>{query}\n", 0)


@pytest.mark.parametrize("pair", [("no slot", IMAGE_TOKEN), ("{query}", "no image")])
def test_strings_without_a_slot_are_refused(pair):
    with pytest.raises(CheckpointError, match=r"no (slot|image)"):
        templates_of(*pair, SPECIAL, "test")


def tiny_config():
    return FAMILIES["qwen2_vl"].config()


@pytest.mark.parametrize("budget", [PixelBudget(), FAMILIES["qwen3_vl"].pixel_budget])
def test_a_pixel_budget_survives_processor_files(budget, tmp_path):
    write_processor_files(budget, "qwen2_vl", tmp_path, "Qwen2VLProcessor")
    assert pixel_budget_of(tmp_path, tiny_config()) == (budget, [])


@pytest.mark.parametrize(
    "values",
    [
        {"min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        {"size": {"min_pixels": 784, "max_pixels": 7840}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 784, "max_pixels": 7840},
    ],
)
def test_limits_are_read_in_every_form_they_are_written_in(values, tmp_path):
    change(tmp_path / "preprocessor_config.json", **values)
    budget, assumed = pixel_budget_of(tmp_path, tiny_config())
    assert (budget.min_pixels, budget.max_pixels) == (784, 7840)
    assert len(assumed) == 1
    assert "patch_size 14" in assumed[0]


def test_the_processors_own_file_comes_first_as_in_transformers(tmp_path):
    change(tmp_path / "preprocessor_config.json", max_pixels=7840)
    change(tmp_path / "processor_config.json", image_processor={"max_pixels": 78400})
    assert pixel_budget_of(tmp_path, tiny_config())[0].max_pixels == 78400
    assert pixel_budget_of(tmp_path, tiny_config(), {"max_pixels": 784000})[0].max_pixels == 784000


def test_no_processor_file_is_said_and_the_familys_budget_taken(tmp_path):
    budget, assumed = pixel_budget_of(tmp_path, tiny_config())
    assert budget == FAMILIES["qwen2_vl"].pixel_budget
    assert "602,112" in assumed[0]


@pytest.mark.parametrize(
    "values",
    [
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2},
        {"rescale_factor": 1.0},
        {"max_pixels": "many"},
        {"max_pixels": 1},
        {"image_mean": [0.5]},
    ],
)
def test_images_that_enter_otherwise_are_refused(values, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    change(path, **values)
    with pytest.raises(CheckpointError, match=path.name):
        pixel_budget_of(tmp_path, tiny_config())


def test_patches_that_the_tower_does_not_read_are_refused(folder_of):
    folder = folder_of("colpali-engine")
    change(folder / "preprocessor_config.json", patch_size=16)
    with pytest.warns(AssumedWarning), pytest.raises(CheckpointError, match=r"patch is 16"):
        Retriever.from_pretrained(folder)


REFUSED = {
    "code of its own": (
        "transformers",
        lambda f: change(f / "config.json", auto_map={"AutoModel": "model.Col"}),
        "auto_map",
    ),
    "code of its own, inside": (
        "colpali-engine",
        lambda f: change(f / "config.json", trust_remote_code=True),
        "trust_remote_code",
    ),
    "no backbone inside": (
        "transformers",
        lambda f: drop(f / "config.json", "vlm_config"),
        "vlm_config",
    ),
    "another backbone inside": (
        "transformers",
        lambda f: change(f / "config.json", vlm_config={"model_type": "paligemma"}),
        "paligemma",
    ),
    "a prefix that is no text": (
        "transformers",
        lambda f: change(f / "processor_config.json", query_prefix=3),
        "query_prefix",
    ),
    "a module of another package": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].update(type="their_code.Dense")),
        r"their_code\.Dense",
    ),
    "a module outside": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].update(path="../1_Dense")),
        r"outside.*\.\./1_Dense",
    ),
    "a module in the parent": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].update(path="..")),
        "outside",
    ),
    "a module behind a link": (
        "sentence-transformers",
        lambda f: (
            shutil.move(f / "1_Dense", f.parent / "1_Dense"),
            (f / "1_Dense").symlink_to(f.parent / "1_Dense"),
        ),
        "outside",
    ),
    "a module without a type": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].pop("type")),
        "type",
    ),
    "pooled vectors": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[2].update(type="sentence_transformers.a.Pooling")),
        "Pooling",
    ),
    "two projections": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m.append(m[1])),
        "Dense twice",
    ),
    "vectors of any length": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m.pop()),
        "Normalize",
    ),
    "no list of modules": (
        "sentence-transformers",
        lambda f: (f / "modules.json").write_text("{}"),
        r"modules\.json",
    ),
    "another task": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", transformer_task="fill-mask"),
        "fill-mask",
    ),
    "an activation": (
        "sentence-transformers",
        lambda f: change(f / "1_Dense/config.json", activation_function="torch.nn.Tanh"),
        "Tanh",
    ),
    "an activation by default": (
        "sentence-transformers",
        lambda f: drop(f / "1_Dense/config.json", "activation_function"),
        "Tanh",
    ),
    "one vector a page": (
        "sentence-transformers",
        lambda f: change(f / "1_Dense/config.json", module_input_name="sentence_embedding"),
        "sentence_embedding",
    ),
    "a residual": (
        "sentence-transformers",
        lambda f: change(f / "1_Dense/config.json", use_residual=True),
        "use_residual",
    ),
    "more in the projection": (
        "sentence-transformers",
        lambda f: change_weights(
            f / "1_Dense" / WEIGHTS, lambda w: w.update({"residual.weight": torch.zeros(2)})
        ),
        r"residual\.weight",
    ),
    "a projection in two places": (
        "sentence-transformers",
        lambda f: change_weights(
            f / WEIGHTS, lambda w: w.update({"custom_text_proj.bias": torch.zeros(2)})
        ),
        "two places",
    ),
    "words that are left out": (
        "sentence-transformers",
        lambda f: change(f / "2_MultiVectorMask/config.json", skiplist_words=[","]),
        "skiplist_words",
    ),
    "vectors that are left out": (
        "sentence-transformers",
        lambda f: change(f / "2_MultiVectorMask/config.json", keep_only_token_ids=[5]),
        "keep_only_token_ids",
    ),
    "queries that are cut": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", query_length=32),
        "query_length 32",
    ),
    "queries that are filled up": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", query_expansion={"length": 32}),
        "query_expansion",
    ),
    "texts that are processed otherwise": (
        "sentence-transformers",
        lambda f: change(
            f / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 3}}
        ),
        "processing_kwargs 'text'",
    ),
    "pages without a chat template": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").unlink(),
        r"chat_template\.jinja",
    ),
    "a chat template that fails": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").write_text("{{ nothing.at.all }}"),
        "cannot be run",
    ),
    "a chat template that reaches out": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
        "cannot be run",
    ),
    "a chat template without images": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").write_text("{{ '{query}' }}"),
        "image_pad",
    ),
    "no messages": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", modality_config={"text": {}}),
        "modality_config",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case, folder_of):
    target, tamper, words = REFUSED[case]
    folder = folder_of(target)
    tamper(folder)
    with pytest.raises(CheckpointError, match=words):
        Retriever.from_pretrained(folder)


def test_a_projection_without_a_bias_has_one_of_zeros(folder_of, exported):
    folder = folder_of("sentence-transformers")
    change(folder / "1_Dense/config.json", bias=False)
    change_weights(folder / "1_Dense" / WEIGHTS, lambda weights: weights.pop("linear.bias"))
    loaded = Retriever.from_pretrained(folder)
    assert torch.equal(loaded.projection.weight, exported[1].projection.weight)
    assert torch.equal(loaded.projection.bias, torch.zeros(128))


def test_image_settings_of_sentence_transformers_win_over_the_processors(folder_of):
    folder = folder_of("sentence-transformers")
    path = folder / "sentence_bert_config.json"
    change(path, processing_kwargs={"image": {"max_pixels": 78400}})
    assert read(folder).contract.pixel_budget.max_pixels == 78400


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
