"""Classes of other libraries load what we write, and what they save we load, to equal vectors."""

import json

import pytest
import torch
from exports import CONTRACT, assert_same_rows, assert_same_weights, written
from torch import nn
from transformers import (
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from colfolio.data.prompts import Templates
from colfolio.models import Retriever
from colfolio.models.base import base_from_weights
from colfolio.models.contract import PROJECTION
from colfolio.models.files import backbone_config
from colfolio.models.formats import AssumedWarning, read, write

HEADED = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
ENDS = "<|endoftext|>" * 10
PAGE = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Describe the image.<|im_end|><|endoftext|>"
)


def fresh_config(retriever):
    """The configuration of its backbone, as if it had never run here."""
    values = json.loads(json.dumps(retriever.backbone.config.to_dict()))
    values.pop("_attn_implementation", None)
    return backbone_config(values, "test")


def test_batches_that_transformers_pads_give_our_vectors(make_wide, tmp_path, pages, images):
    retriever = make_wide("qwen2_vl")
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


@pytest.mark.parametrize("family", HEADED)
def test_the_classes_of_colpali_engine_load_every_tensor_and_give_our_vectors(
    family, make_wide, tmp_path, texts, pages
):
    retriever = make_wide(family)
    folder = written(retriever, tmp_path / "out", "colpali-engine")
    kind = engine_class(type(retriever.backbone), retriever.dim)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for packed in (retriever.collator.queries(texts), retriever.collator.documents(pages)):
        rows = engine_rows(model.eval(), retriever, packed)
        with torch.no_grad():
            assert_same_rows(list(retriever(packed)), rows)


@pytest.mark.parametrize("family", HEADED)
def test_what_a_class_of_colpali_engine_saves_is_read(family, make_wide, tmp_path, texts, pages):
    like = make_wide(family)
    config = fresh_config(like)
    model = engine_class(type(like.backbone), like.dim)(config).eval()
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
def saved_retrieval(tmp_path, make_wide):
    """A random `ColQwen2ForRetrieval` of 24 dimensions, and its processor, saved by themselves."""

    def save(**strings):
        like = make_wide("qwen2_vl")
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


@pytest.mark.parametrize("family", HEADED)
def test_a_published_model_with_a_head_becomes_a_base(family, make_wide, tmp_path):
    like = make_wide(family)
    config = fresh_config(like)
    model = HEADED[family](config)
    model.save_pretrained(tmp_path)
    like.tokenizer.save(str(tmp_path / "tokenizer.json"))
    base = base_from_weights(tmp_path, 16, 0)
    backbone = {n: t for n, t in base.weights().items() if not n.startswith(PROJECTION)}
    assert_same_weights(dict(model.model.state_dict()), backbone)


def test_templates_that_are_given_are_used_and_nothing_is_warned_of_queries(
    saved_retrieval, recwarn
):
    _, _, folder = saved_retrieval()
    templates = Templates(query="q: {query}", num_query_suffix=3)
    assert read(folder, templates).contract.templates == templates
    assert not [each for each in recwarn if "queries" in str(each.message)]
