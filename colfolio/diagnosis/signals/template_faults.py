"""How the tokens that queries and documents really get differ from the contract's templates.

What is expected is made a second way: the whole string, with its special tokens, goes through the
tokenizer at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer

from colfolio.batch import Packed
from colfolio.data.prompts import IMAGE_TOKEN, QUERY_SLOT, VIDEO_TOKEN
from colfolio.diagnosis.signals.probe_batch import ProbeBatch
from colfolio.models.formats.whole_texts import plain_tokenizer
from colfolio.models.retriever import Retriever

_SHOWN = 60  # letters of an example


def template_faults(retriever: Retriever, batch: ProbeBatch) -> tuple[str, ...]:
    """A sentence for queries and one for documents, where any row differs.

    Queries that spell a special token, and clips that have times between their steps, are not
    compared.
    """
    plain = plain_tokenizer(retriever.tokenizer)
    found = []
    for side, pairs in (
        ("queries", list(_queries(retriever, plain, batch))),
        ("documents", list(_documents(retriever, plain, batch.documents))),
    ):
        wrong = [(mine, right) for mine, right in pairs if mine != right]
        if wrong:
            mine, right = wrong[0]
            found.append(
                f"{len(wrong)} of {len(pairs)} {side} have other tokens than the contract's "
                f"template gives: {_told(plain, mine, right)}"
            )
    return tuple(found)


def _queries(
    retriever: Retriever, plain: Tokenizer, batch: ProbeBatch
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids that each query has, and that it should have."""
    templates = retriever.contract.templates
    suffix = _ids(plain, templates.query_suffix) * templates.num_query_suffix
    special = [token.content for token in plain.get_added_tokens_decoder().values()]
    for text, mine in zip(batch.texts, _rows(batch.queries), strict=True):
        if not any(token in text for token in special):
            yield mine, _ids(plain, templates.query.replace(QUERY_SLOT, text)) + suffix


def _documents(
    retriever: Retriever, plain: Tokenizer, documents: Packed
) -> Iterator[tuple[list[int], list[int]]]:
    """Likewise of documents, each with as many visual tokens as it has: they are counted apart."""
    templates = retriever.contract.templates
    (image,) = _ids(plain, IMAGE_TOKEN)
    video = plain.token_to_id(VIDEO_TOKEN)
    around = _ids(plain, templates.document)
    place = around.index(image)
    for mine in _rows(documents):
        kind = image if video is None or video not in mine else video
        if kind == image or not templates.time_stamp:
            yield mine, around[:place] + [kind] * mine.count(kind) + around[place + 1 :]


def _told(plain: Tokenizer, mine: list[int], right: list[int]) -> str:
    place = next(
        (n for n, (own, wanted) in enumerate(zip(mine, right, strict=False)) if own != wanted),
        min(len(mine), len(right)),
    )
    own, wanted = (_text(plain, ids[place:]) for ids in (mine, right))
    return (
        f"{len(mine)} tokens where it gives {len(right)}, and from token {place} on {own!r} where "
        f"it gives {wanted!r}."
    )


def _text(plain: Tokenizer, ids: list[int]) -> str:
    text = plain.decode(ids, skip_special_tokens=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _ids(plain: Tokenizer, text: str) -> list[int]:
    return plain.encode(text, add_special_tokens=False).ids


def _rows(packed: Packed) -> list[list[int]]:
    return [row.tolist() for row in packed.token_ids.split(packed.lengths.tolist())]
