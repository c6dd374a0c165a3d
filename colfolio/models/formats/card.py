"""The model card of an exported model: what it is, how it was trained and reached, how to load it.

It is a `README.md` with YAML front matter, as the hub shows it. The code in it runs as it stands in
a folder with a `page.png`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from colfolio.data.prompts import QUERY_SLOT
from colfolio.models.contract import Contract
from colfolio.models.formats.chat import whole_query
from colfolio.models.formats.classes import classes_of
from colfolio.models.formats.reading import Found
from colfolio.models.formats.usage import PAGE

CARD_FILE = "README.md"
_TRAINED = "Trained with Colfolio, by the recipe below."
_PAGES = """\
folder = "."  # this folder, or the id of this repository
queries = ["what does the page say?"]
pages = [Image.open("page.png").convert("RGB")]
"""
_COLFOLIO = f"""\
from PIL import Image
from colfolio import Retriever

{_PAGES}
retriever = Retriever.from_pretrained(folder)
documents = retriever.encode_documents(pages)
print(retriever.score(queries, documents))
"""
_ENGINE = """\
import torch
from PIL import Image
from colpali_engine.models import {model}, {processor}

{pages}
model = {model}.from_pretrained(folder).eval()
processor = {processor}.from_pretrained(folder)
{page_prompt}texts = [{before} + query + {after} for query in queries]
with torch.no_grad():
    documents = model(**processor.process_images(pages))
    vectors = model(**processor.process_texts(texts))
print(processor.score_multi_vector(list(vectors), list(documents)))
"""
_RETRIEVAL = """\
import torch
from PIL import Image
from transformers import ColQwen2ForRetrieval, ColQwen2Processor

{pages}
model = ColQwen2ForRetrieval.from_pretrained(folder).eval()
processor = ColQwen2Processor.from_pretrained(folder)

inputs = processor(images=pages)
is_image = inputs["input_ids"] == model.config.vlm_config.image_token_id
position_ids, _ = model.vlm.get_rope_index(
    inputs["input_ids"],
    is_image.int(),
    image_grid_thw=inputs["image_grid_thw"],
    attention_mask=inputs["attention_mask"],
)
with torch.no_grad():
    documents = model(**inputs, position_ids=position_ids).embeddings

texts = [{before} + query + {after} for query in queries]
inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    vectors = model(**inputs).embeddings
print(processor.score_retrieval(vectors, documents))
"""
_SENTENCE = """\
from PIL import Image
from sentence_transformers import MultiVectorEncoder

{pages}
model = MultiVectorEncoder(folder)
documents = model.encode_document(pages)
vectors = model.encode_query(queries)
print(model.similarity(vectors, documents))
"""


def model_card(found: Found, target: str, notes: tuple[str, ...], story: str) -> str:
    """The card of a model that is written for a library.

    Args:
        notes: what a user of that library has to know.
        story: how its weights came about, a sentence.
    """
    contract, is_own = found.contract, target == "colfolio"
    kind = f"A {found.config.model_type} with a projection to {contract.dim} dimensions."
    whole = "`colfolio.json` beside them is the whole contract of how queries and pages enter it."
    program = "" if is_own else _section(f"With {target}", _fenced(_code(found, target), "python"))
    sections = [
        f"---\n{yaml.safe_dump(_front(found, target), sort_keys=False, allow_unicode=True)}---",
        "# A late-interaction retriever for page images",
        f"{kind} {story} The files here are for {target}; {whole}",
        _section("Read this first", _bullets(notes)),
        program,
        _section("With Colfolio", _fenced(_COLFOLIO, "python")),
        _section("How queries and pages enter", _usage(contract)),
        _section("Where it comes from", _origin(contract)),
        _section("What it reached", _table(contract.metrics, "metric", "value")),
        _section("Data", _table(contract.data, "split", "fingerprint")),
        _section("Recipe", _recipe(contract)),
        _section("Assumed", _bullets(contract.assumed)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def story_of(contract: Contract, weights_hash: str) -> str:
    """How weights came about, as far as the contract tells.

    Args:
        weights_hash: of the weights as they are.
    """
    if contract.recipe is not None:
        return _TRAINED
    if weights_hash != contract.base_hash:
        return "Its weights are not those of its base, and no recipe says how they were trained."
    if contract.projection_hash:
        return (
            "A base to train from: its projection is as it was drawn at random, so it finds "
            "nothing yet."
        )
    return "Its weights are those of another library's checkpoint; Colfolio did not train them."


def adapter_story(contract: Contract) -> str:
    """How the weights of an adapter came about."""
    trained = f" {_TRAINED}" if contract.recipe is not None else ""
    return f"Of it, low-rank adapters alone are here, to be put into the base.{trained}"


def _front(found: Found, target: str) -> dict[str, Any]:
    bases = _bases_on_hub(found.contract)
    front: dict[str, Any] = {
        "library_name": target,
        "pipeline_tag": "visual-document-retrieval",
        "tags": ["colfolio", "late-interaction", "multi-vector", found.config.model_type],
    }
    if bases:
        front["base_model"] = bases[0] if len(bases) == 1 else bases
    return front


def _bases_on_hub(contract: Contract) -> list[str]:
    """Ids of what the weights came of; a graft came of two. The name of a folder has no slash."""
    names = [] if contract.source is None else contract.source.name.split(" + ")
    return [name for name in names if "/" in name]


def _code(found: Found, target: str) -> str:
    templates = found.contract.templates
    before, after = whole_query(templates).split(QUERY_SLOT)
    classes = classes_of(found.config.model_type)
    prompt = f"processor.visual_prompt_prefix = {templates.document!r}\n"
    code = {
        "colpali-engine": _ENGINE,
        "transformers": _RETRIEVAL,
        "sentence-transformers": _SENTENCE,
    }[target]
    return code.format(
        pages=_PAGES,
        model=classes.engine,
        processor=classes.engine_processor,
        page_prompt="" if templates.document == PAGE else prompt,
        before=repr(before),
        after=repr(after),
    )


def _usage(contract: Contract) -> str:
    budget = contract.pixel_budget
    rows = {
        "query": f"`{whole_query(contract.templates)!r}`",
        "page": f"`{contract.templates.document!r}`",
        "pixels of a page": f"{budget.min_pixels:,} to {budget.max_pixels:,}",
        "pixels of a token": f"{budget.factor} x {budget.factor}",
        "positions": f"`{contract.position_scheme}`",
        "views of a page": contract.views,
        "vectors": f"{contract.dim} dimensions, {contract.kept_vectors} kept",
    }
    return _table(rows, "", "")


def _origin(contract: Contract) -> str:
    source, rows = contract.source, {}
    if source is not None:
        rows["base"] = source.name + (f" at {source.revision}" if source.revision else "")
    if contract.base_hash:
        rows["SHA-256 of the base's weights"] = f"`{contract.base_hash}`"
    return _table(rows, "", "")


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _bullets(sentences: tuple[str, ...]) -> str:
    return "\n".join(f"- {_begun(sentence)}." for sentence in sentences)


def _begun(sentence: str) -> str:
    """With a capital letter, unless it begins with a name of code or of a file."""
    first = sentence.split(maxsplit=1)[0]
    return sentence[0].upper() + sentence[1:] if first.isalpha() else sentence


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _table(rows: Mapping[str, Any], left: str, right: str) -> str:
    if not rows:
        return ""
    lines = [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()
    ]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])


def _recipe(contract: Contract) -> str:
    if contract.recipe is None:
        return ""
    recipe = contract.model_dump(mode="json")["recipe"]
    return _fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "yaml")
