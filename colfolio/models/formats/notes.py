"""What a user of another library has to know before it uses an exported model, in sentences."""

from __future__ import annotations

from colfolio.data.prompts import QUERY_SLOT, Templates
from colfolio.models.formats.chat import whole_query
from colfolio.models.formats.reading import Found
from colfolio.models.formats.usage import END_TOKEN, NUM_END_TOKENS, PAGE

_ENGINE_QUERY = QUERY_SLOT + END_TOKEN * NUM_END_TOKENS
_TORCHVISION = "processors of transformers for this backbone need torchvision"


def notes_of(found: Found, target: str) -> tuple[str, ...]:
    """Where the library of a target uses a model otherwise than it was trained, unless told."""
    contract = found.contract
    notes = {
        "colfolio": (),
        "colpali-engine": _engine_notes(contract.templates),
        "transformers": _retrieval_notes(contract.templates),
        "sentence-transformers": (_TORCHVISION,),
    }[target]
    if target != "colfolio" and contract.views != "page":
        cut = f"the model reads pages cut into {contract.views}; {target} does not cut them"
        notes = (*notes, cut)
    return notes


def retrieval_prefix(templates: Templates) -> str | None:
    """What `ColQwen2Processor` is told to put before a query; None if it cannot write the query.

    It always puts ten padding tokens and a line break behind, and never an empty prefix before.
    """
    prefix, _, after = whole_query(templates).partition(QUERY_SLOT)
    is_written = after == templates.query_suffix * NUM_END_TOKENS + "\n"
    return prefix if prefix and is_written else None


def _engine_notes(templates: Templates) -> tuple[str, ...]:
    notes = [_TORCHVISION]
    if whole_query(templates) != _ENGINE_QUERY:
        notes.append(
            f"process_queries of colpali-engine writes {_ENGINE_QUERY!r}, and this model was "
            f"trained with {whole_query(templates)!r}: give whole strings to process_texts, as the "
            "model card shows"
        )
    if templates.document != PAGE:
        notes.append(
            f"process_images of colpali-engine writes {PAGE!r} around a page, and this model was "
            f"trained with {templates.document!r}: set visual_prompt_prefix, as the model card "
            "shows"
        )
    return tuple(notes)


def _retrieval_notes(templates: Templates) -> tuple[str, ...]:
    notes = [
        "the forward of transformers' ColQwen2ForRetrieval gives image tokens positions in one "
        "dimension, and the vectors of pages are wrong: call it with position_ids, as the model "
        "card shows"
    ]
    if retrieval_prefix(templates) is None:
        notes.append(
            "process_queries of transformers' ColQwen2Processor cannot write the query of this "
            f"model, {whole_query(templates)!r}: give whole strings to its tokenizer, as the model "
            "card shows"
        )
    return tuple(notes)
