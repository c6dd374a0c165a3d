"""A library that cuts or marks texts gives other vectors: such a folder is refused by name."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError
from colfolio.models import Retriever, base_from_shape
from colfolio.models.families import FAMILIES
from colfolio.models.formats import Found, read, write
from colfolio.models.formats.whole_texts import plain_tokenizer

CONTRACT = "colfolio.json"
TRANSFORMER = "sentence_bert_config.json"
MODEL = "config_sentence_transformers.json"
TARGETS = ["colpali-engine", "transformers", "sentence-transformers"]


@pytest.fixture(scope="module")
def retriever(tiny_shape, tiny_tokenizer):
    shape = tiny_shape.model_copy(update={"dim": 128})
    return base_from_shape(shape, tiny_tokenizer, 0).eval()


def found(retriever, tokenizer=None, **templates):
    contract = retriever.contract
    changed = Templates(**(contract.templates.model_dump() | templates))
    contract = contract.model_copy(update={"templates": changed})
    tokenizer = tokenizer or retriever.tokenizer
    return Found("any", retriever.backbone.config, retriever.weights(), tokenizer, contract)


@pytest.fixture(scope="module")
def exported(retriever, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for target in TARGETS:
        write(found(retriever), root / target, target)
        (root / target / CONTRACT).unlink()
    return root


@pytest.fixture
def folder_of(exported, tmp_path):
    """A copy of the folder of a target, to be changed."""
    return lambda target: shutil.copytree(exported / target, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def marking(tokenizer):
    """A tokenizer that puts a token before each text."""
    marking = Tokenizer.from_str(tokenizer.to_str())
    token = "<|im_start|>"
    pair = (token, marking.token_to_id(token))
    marking.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[pair])
    return marking


def cutting(tokenizer):
    """A tokenizer that cuts texts, and fills them up."""
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(20)
    cutting.enable_padding(length=20)
    return cutting


CHANGES = {
    "max_seq_length 20": (TRANSFORMER, {"max_seq_length": 20}),
    "max_seq_length 8191": (TRANSFORMER, {"max_seq_length": 8191}),
    "max_seq_length 'long'": (TRANSFORMER, {"max_seq_length": "long"}),
    "model_max_length in tokenizer_config.json 20": (
        "tokenizer_config.json",
        {"model_max_length": 20},
    ),
    "truncation in tokenizer.json 20": (
        "tokenizer.json",
        {
            "truncation": {
                "direction": "Right",
                "max_length": 20,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
    ),
    "chat_template max_length 20": (
        TRANSFORMER,
        {"processing_kwargs": {"chat_template": {"max_length": 20}}},
    ),
    "processor_kwargs": (TRANSFORMER, {"processor_kwargs": {"model_max_length": 20}}),
    "similarity_fn_name 'meanmaxsim'": (MODEL, {"similarity_fn_name": "meanmaxsim"}),
    "query_prefix": (MODEL, {"query_prefix": "[Q] "}),
    "do_query_expansion": (MODEL, {"do_query_expansion": True}),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_folder_of_sentence_transformers_that_asks_otherwise_is_refused(words, folder_of):
    folder = folder_of("sentence-transformers")
    file, values = CHANGES[words]
    change(folder / file, **values)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (TRANSFORMER, {"max_seq_length": 8192}),
        (TRANSFORMER, {"max_seq_length": None}),
        ("tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656}),
        ("tokenizer_config.json", {"model_max_length": 1e30}),
        (MODEL, {"similarity_fn_name": None}),
        (MODEL, {"default_prompt_name": None}),
    ],
)
def test_a_limit_that_cuts_nothing_is_none(file, values, folder_of, retriever):
    folder = folder_of("sentence-transformers")
    change(folder / file, **values)
    assert read(folder).contract.deciding() == retriever.contract.deciding()


def test_the_modules_limit_holds_in_place_of_the_tokenizers(folder_of, retriever):
    folder = folder_of("sentence-transformers")
    change(folder / "tokenizer_config.json", model_max_length=512)
    change(folder / TRANSFORMER, max_seq_length=32768)
    assert read(folder).contract.deciding() == retriever.contract.deciding()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::colfolio.models.formats.AssumedWarning")
def test_a_tokenizer_that_marks_texts_is_refused_where_no_contract_says_them(
    target, folder_of, retriever
):
    folder = folder_of(target)
    read(folder)
    text = marking(retriever.tokenizer).to_str()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"post_processor.*<\|im_start\|>"):
        read(folder)


def test_what_a_tokenizer_adds_is_no_matter_where_a_contract_says_the_strings(
    retriever, tmp_path, texts
):
    marked = Retriever(
        *(retriever.backbone, retriever.projection, marking(retriever.tokenizer)),
        retriever.contract,
    )
    marked.save_pretrained(tmp_path / "model")
    back = Retriever.from_pretrained(tmp_path / "model")
    assert back.encode_queries(texts).vectors.equal(retriever.encode_queries(texts).vectors)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("changed", [marking, cutting])
def test_a_tokenizer_is_written_without_what_our_texts_do_not_go_through(
    target, changed, retriever, tmp_path
):
    write(found(retriever, changed(retriever.tokenizer)), tmp_path / "out", target)
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "red circle, blue square " * 9
    plain = retriever.tokenizer.encode(text, add_special_tokens=False).ids
    assert written.encode(text).ids == plain
    assert len(plain) > 20


def test_a_plain_tokenizer_is_a_copy(retriever):
    marked = cutting(marking(retriever.tokenizer))
    assert plain_tokenizer(marked).to_str() == retriever.tokenizer.to_str()
    assert marked.truncation is not None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [0, 3])
def test_an_augmentation_token_that_is_an_ordinary_word_is_refused(
    target, count, retriever, tmp_path
):
    one = found(retriever, query_suffix="a", num_query_suffix=count)
    with pytest.raises(CheckpointError, match=f"'a' is an ordinary word.*{target}.*--to colfolio"):
        write(one, tmp_path / "out", target)
    assert list(tmp_path.iterdir()) == []
    write(one, tmp_path / "out", "colfolio")


def test_a_template_that_a_string_would_spell_otherwise_is_refused(retriever, tmp_path):
    # in the whole string a token is found across the end of the query, and here it never is
    tokenizer = Tokenizer.from_str(retriever.tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("say?<|im_end|>", normalized=False)])
    with pytest.raises(CheckpointError, match="as other tokens than"):
        write(found(retriever, tokenizer, query="{query}<|im_end|>"), tmp_path / "out", TARGETS[0])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_templates_of_every_family_can_be_written_as_strings(
    family, make_family_retriever, tmp_path
):
    templates = FAMILIES[family].templates.model_dump()
    write(
        found(make_family_retriever(family), **templates),
        tmp_path / "out",
        "sentence-transformers",
    )
