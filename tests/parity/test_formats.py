"""What we write other libraries load, and what they write we load: tensors, strings and vectors."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import MultiVectorEncoder
from torch import nn
from transformers import (
    AutoTokenizer,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import PushToHubMixin

from colfolio.data.prompts import Templates
from colfolio.models import Retriever
from colfolio.models.base import base_from_weights
from colfolio.models.checkpoint import empty_backbone
from colfolio.models.contract import PROJECTION, differences
from colfolio.models.files import backbone_config
from colfolio.models.formats import AssumedWarning, Found, read, write
from colfolio.models.formats.layouts import LAYOUTS

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
DIMS = {"qwen2_vl": 128, "qwen2_5_vl": 128, "qwen3_vl": 320}  # fixed in colpali-engine
HEADED = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
WRITTEN = [
    *((family, target) for family in FAMILIES for target in ("colfolio", "colpali-engine")),
    *((family, "sentence-transformers") for family in FAMILIES),
    ("qwen2_vl", "transformers"),
]
ENDS = "<|endoftext|>" * 10
PAGE = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Describe the image.<|im_end|><|endoftext|>"
)
CONTRACT = "colfolio.json"


class NoVideo(PushToHubMixin):
    """Stands for a video processor, none of which can be made without torchvision."""

    model_input_names = ()
    _auto_class = None

    def to_dict(self):
        return {}


@pytest.fixture
def without_torchvision(monkeypatch):
    """Lets processors of Qwen-VL be made of a tokenizer and an image processor alone."""
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: NoVideo())
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


@pytest.fixture
def make(make_family_retriever):
    """The tiny retriever of a family with as many dimensions as colpali-engine has."""
    return lambda family, **values: make_family_retriever(family, dim=DIMS[family], **values).eval()


@pytest.fixture
def images(pages):
    return [Image.fromarray(page) for page in pages]


def written(retriever, folder, target):
    config, weights = retriever.backbone.config, retriever.weights()
    write(Found("any", config, weights, retriever.tokenizer, retriever.contract), folder, target)
    return folder


def fresh_config(retriever):
    """The configuration of its backbone, as if it had never run here."""
    values = json.loads(json.dumps(retriever.backbone.config.to_dict()))
    values.pop("_attn_implementation", None)
    return backbone_config(values, "test")


def assert_same_weights(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_same_rows(mine, theirs):
    assert len(mine) == len(theirs)
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other.float(), rtol=0, atol=1e-5)


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
def test_what_is_written_for_a_library_comes_back_to_the_bit(family, target, dtype, make, tmp_path):
    retriever = make(family, dtype=dtype)
    back = Retriever.from_pretrained(written(retriever, tmp_path / "out", target))
    assert_same_weights(retriever.weights(), back.weights())
    assert_same_config(retriever.backbone.config, back.backbone.config)
    assert differences(back.contract, retriever.contract) == []
    assert back.fingerprint() == retriever.fingerprint()


@pytest.mark.parametrize(("family", "target"), [pair for pair in WRITTEN if pair[1] != "colfolio"])
def test_without_its_contract_the_files_of_a_library_say_the_rest(family, target, make, tmp_path):
    retriever = make(family)
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
    family, make, tmp_path, texts, pages, images, without_torchvision
):
    retriever = make(family)
    folder = written(retriever, tmp_path / "out", "sentence-transformers")
    encoder = MultiVectorEncoder(str(folder), device="cpu")
    assert_same_rows(retriever.encode_queries(texts), encoder.encode_query(texts))
    assert_same_rows(retriever.encode_documents(pages), encoder.encode_document(images))


@pytest.mark.parametrize("prompt", ["", "find: "])
def test_what_sentence_transformers_saves_is_read_with_its_prompts(
    prompt, make, tmp_path, texts, pages, images, without_torchvision
):
    folder = written(make("qwen2_vl"), tmp_path / "out", "sentence-transformers")
    encoder = MultiVectorEncoder(str(folder), device="cpu", prompts={"query": prompt})
    encoder.save(str(tmp_path / "saved"))
    loaded = Retriever.from_pretrained(tmp_path / "saved")
    assert loaded.contract.templates.query == prompt + "{query}"
    assert_same_rows(loaded.encode_queries(texts), encoder.encode_query(texts))
    assert_same_rows(loaded.encode_documents(pages), encoder.encode_document(images))


def test_a_retrieval_model_of_sentence_transformers_is_read_as_its_processor_writes(
    make, tmp_path, texts
):
    """Its pages are compared elsewhere: here it gives image tokens positions in one dimension."""
    source = written(make("qwen2_vl"), tmp_path / "out", "transformers")
    encoder = MultiVectorEncoder(str(source), device="cpu", prompts={"query": "find: "})
    encoder.save(str(tmp_path / "saved"))
    with pytest.warns(AssumedWarning, match="one dimension"):
        loaded = Retriever.from_pretrained(tmp_path / "saved")
    assert loaded.contract.templates.query == "Query: find: {query}" + ENDS + "\n"
    assert_same_rows(loaded.encode_queries(texts), encoder.encode_query(texts))


def test_the_card_calls_transformers_so_that_vectors_are_ours(
    make, tmp_path, images, monkeypatch, capsys
):
    retriever = make("qwen2_vl")
    run = run_card(written(retriever, tmp_path / "out", "transformers"), images[3], monkeypatch)
    assert_same_rows(retriever.encode_queries(run["queries"]), run["vectors"])
    assert_same_rows(retriever.encode_documents(run["pages"]), run["documents"])
    flat = run["model"](**run["processor"](images=run["pages"])).embeddings
    assert (flat - run["documents"]).abs().max() > 1e-2  # without position_ids: the pitfall told


def test_the_card_calls_sentence_transformers_so_that_vectors_are_ours(
    make, tmp_path, images, monkeypatch, capsys, without_torchvision
):
    retriever = make("qwen2_vl")
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


def test_batches_that_transformers_pads_give_our_vectors(make, tmp_path, pages, images):
    retriever = make("qwen2_vl")
    folder = written(retriever, tmp_path / "out", "transformers")
    model = ColQwen2ForRetrieval.from_pretrained(folder).eval()
    found = retrieval_rows(model, ColQwen2Processor.from_pretrained(folder), images)
    assert_same_rows(retriever.encode_documents(pages), found)


@torch.no_grad()
def retrieval_rows(model, processor, images):
    """Vectors of pages by transformers, with positions of three dimensions."""
    inputs = processor(images=images)
    is_image = inputs["input_ids"] == model.config.vlm_config.image_token_id
    mask, grids = inputs["attention_mask"], inputs["image_grid_thw"]
    positions, _ = model.vlm.get_rope_index(
        inputs["input_ids"], is_image.int(), image_grid_thw=grids, attention_mask=mask
    )
    vectors = model(**inputs, position_ids=positions).embeddings
    return [row[real.bool()] for row, real in zip(vectors, mask, strict=True)]


def engine_class(backbone, dim):
    """colpali-engine's class over a backbone: its tensors, and what its forward computes."""

    class ColQwen(backbone):
        def __init__(self, config):
            super().__init__(config)
            self.custom_text_proj = nn.Linear(config.text_config.hidden_size, dim)
            self.post_init()

        def forward(self, attention_mask, **inputs):
            hidden = super().forward(attention_mask=attention_mask, **inputs).last_hidden_state
            vectors = self.custom_text_proj(hidden)
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
            return vectors * attention_mask.unsqueeze(-1)

    return ColQwen


@torch.no_grad()
def engine_rows(model, retriever, packed):
    """Vectors of packed rows, one by one, by a class of colpali-engine."""
    patches = iter(packed.patches.split(packed.grid_thw.prod(dim=1).tolist()))
    grids, rows = iter(packed.grid_thw), []
    for token_ids in packed.token_ids.split(packed.lengths.tolist()):
        is_image = token_ids == retriever.collator.prompter.image_token_id
        visual = {}
        if is_image.any():
            visual = {"pixel_values": next(patches), "image_grid_thw": next(grids)[None]}
        mask = torch.ones_like(token_ids)[None]
        types = is_image.int()[None]
        ids = token_ids[None]
        rows.append(model(mask, input_ids=ids, mm_token_type_ids=types, **visual)[0])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classes_of_colpali_engine_load_every_tensor_and_give_our_vectors(
    family, make, tmp_path, texts, pages
):
    retriever = make(family)
    folder = written(retriever, tmp_path / "out", "colpali-engine")
    kind = engine_class(type(retriever.backbone), DIMS[family])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for packed in (retriever.collator.queries(texts), retriever.collator.documents(pages)):
        rows = engine_rows(model.eval(), retriever, packed)
        with torch.no_grad():
            assert_same_rows(list(retriever(packed)), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_class_of_colpali_engine_saves_is_read(family, make, tmp_path, texts, pages):
    like = make(family)
    config = fresh_config(like)
    model = engine_class(type(like.backbone), DIMS[family])(config).eval()
    model.save_pretrained(tmp_path)
    like.tokenizer.save(str(tmp_path / "tokenizer.json"))
    budget = like.contract.pixel_budget
    Qwen2VLImageProcessorPil(
        min_pixels=budget.min_pixels,
        max_pixels=budget.max_pixels,
        patch_size=budget.patch,
        image_mean=budget.mean,
        image_std=budget.std,
    ).save_pretrained(tmp_path)
    with pytest.warns(AssumedWarning, match=r"0\.3\.11"):
        loaded = Retriever.from_pretrained(tmp_path)
    templates = loaded.contract.templates
    assert (templates.query, templates.query_suffix) == ("{query}", "<|endoftext|>")
    assert (templates.num_query_suffix, templates.document) == (10, PAGE)
    assert loaded.contract.pixel_budget == budget
    for packed in (loaded.collator.queries(texts), loaded.collator.documents(pages)):
        with torch.no_grad():
            assert_same_rows(list(loaded(packed)), engine_rows(model, loaded, packed))


@pytest.fixture
def saved_retrieval(tmp_path, make):
    """A random `ColQwen2ForRetrieval` of 24 dimensions, and its processor, saved by themselves."""

    def save(**strings):
        like = make("qwen2_vl")
        config = ColQwen2Config(vlm_config=like.backbone.config.to_dict(), embedding_dim=24)
        model = ColQwen2ForRetrieval(config).eval()
        model.save_pretrained(tmp_path / "saved")
        budget = like.contract.pixel_budget
        images = Qwen2VLImageProcessorPil(
            min_pixels=budget.min_pixels, max_pixels=budget.max_pixels
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=like.tokenizer,
            pad_token="<|endoftext|>",
            model_input_names=["input_ids", "attention_mask"],
        )
        processor = ColQwen2Processor(images, tokenizer, **strings)
        processor.save_pretrained(tmp_path / "saved")
        return model, processor, tmp_path / "saved"

    return save


@pytest.mark.parametrize("prefix", [None, "Ask: "])
def test_what_the_retrieval_class_of_transformers_saves_is_read(
    prefix, saved_retrieval, texts, pages, images
):
    model, processor, folder = saved_retrieval(query_prefix=prefix)
    with pytest.warns(AssumedWarning, match="line break"):
        loaded = Retriever.from_pretrained(folder)
    assert loaded.dim == 24
    assert loaded.contract.templates.query == f"{prefix or 'Query: '}{{query}}{ENDS}\n"
    assert loaded.contract.templates.document == PAGE
    inputs = processor.process_queries(texts)
    with torch.no_grad():
        vectors = model(**inputs).embeddings
    mask = inputs["attention_mask"].bool()
    rows = [row[real] for row, real in zip(vectors, mask, strict=True)]
    assert_same_rows(loaded.encode_queries(texts), rows)
    assert_same_rows(loaded.encode_documents(pages), retrieval_rows(model, processor, images))


def test_a_query_that_the_processor_of_transformers_can_write_is_its_own(saved_retrieval, tmp_path):
    """Read and written again, the strings are in its files, and no note is needed for them."""
    _, _, folder = saved_retrieval(query_prefix="Ask: ")
    with pytest.warns(AssumedWarning):
        found = read(folder)
    notes = write(found, tmp_path / "again", "transformers")
    assert len(notes) == 1
    (tmp_path / "again" / CONTRACT).unlink()
    with pytest.warns(AssumedWarning):
        again = read(tmp_path / "again")
    assert again.contract.templates == found.contract.templates
    assert_same_weights(found.weights, again.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_with_a_head_becomes_a_base(family, make, tmp_path):
    like = make(family)
    config = fresh_config(like)
    model = HEADED[family](config)
    model.save_pretrained(tmp_path)
    like.tokenizer.save(str(tmp_path / "tokenizer.json"))
    base = base_from_weights(tmp_path, 16, 0)
    backbone = {n: t for n, t in base.weights().items() if not n.startswith(PROJECTION)}
    assert_same_weights(dict(model.model.state_dict()), backbone)


def test_the_tokenizer_of_other_libraries_gives_our_tokens(make, tmp_path, texts):
    retriever = make("qwen2_vl")
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


def test_templates_that_are_given_are_used_and_nothing_is_warned_of_queries(
    saved_retrieval, recwarn
):
    _, _, folder = saved_retrieval()
    templates = Templates(query="q: {query}", num_query_suffix=3)
    assert read(folder, templates).contract.templates == templates
    assert not [each for each in recwarn if "queries" in str(each.message)]
