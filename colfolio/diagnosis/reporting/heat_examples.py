"""Where the score of a hit or a miss comes from: each query token, and where it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from colfolio.batch import MultiVectors
from colfolio.data.dataset import RetrievalDataset
from colfolio.maxsim import maxsim
from colfolio.models.precision import Precision, autocast
from colfolio.models.retriever import Retriever
from colfolio.search.heatmap import draw_heat, visual_heat

_QUERIES, _DOCUMENTS = 32, 128  # that are ranked, at most, to find examples
_OF_EACH = 2
_MOST_TOKENS = 12
_Image = UInt8[np.ndarray, "height width 3"]
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class TokenShare:
    """A query token, or equal ones behind one another, and what it adds to a score.

    Args:
        text: as the tokenizer writes it.
        answer: similarity with the token of the answer that it likes best.
        first: the same with the document ranked first; None if that is the answer.
        image: the answer with the heat of this token alone.
    """

    text: str
    answer: float
    first: float | None
    image: _Image


@dataclass(frozen=True, slots=True)
class HeatExample:
    """A query with its answer, and with the document that was ranked above it if there is one.

    Args:
        rank: of the answer among `candidates`; ties count against it.
        images: the answer with the heat of the whole query; then that of the document ranked first.
        captions, scores: of these.
        tokens: of the query, in their order.
    """

    query: str
    rank: int
    candidates: int
    images: tuple[_Image, ...]
    captions: tuple[str, ...]
    scores: tuple[float, ...]
    tokens: tuple[TokenShare, ...]


class _Trial(NamedTuple):
    """Queries and corpus rows that were ranked, by their numbers in the data set."""

    queries: list[int]
    rows: list[int]
    texts: MultiVectors
    documents: MultiVectors
    scores: Float[Tensor, "queries documents"]


class _Ranked(NamedTuple):
    """Places in a trial of a query, its answer and the best other document, and the rank."""

    query: int
    answer: int
    rival: int
    rank: int


class _Seen(NamedTuple):
    """A document as an image, its vectors, and those of its visual tokens in their grid."""

    image: _Image
    vectors: Float[Tensor, "tokens dim"]
    visual: Float[Tensor, "visual_tokens dim"]
    grid: tuple[int, int]


@torch.no_grad()
def heat_examples(
    retriever: Retriever, dataset: RetrievalDataset, precision: Precision = "fp32"
) -> list[HeatExample]:
    """Two hits and two misses of a split, as far as there are, evenly spread and picked by nobody.

    At most 32 queries are ranked, among their answers and other documents, 128 in all.
    """
    queries = _spread(range(len(dataset.queries)), _QUERIES)
    rows = _documents(dataset, queries)
    with autocast(precision, retriever.device):
        texts = retriever.encode_queries([dataset.queries[number].text for number in queries])
        documents = retriever.encode_documents([dataset.corpus.image(row) for row in rows])
    trial = _Trial(queries, rows, texts, documents, maxsim(texts, documents))
    found = [_ranked(dataset, trial, place) for place in range(len(queries))]
    ranked = [each for each in found if each is not None]
    hits = _spread([each for each in ranked if each.rank == 1], _OF_EACH)
    misses = _spread([each for each in ranked if each.rank > 1], _OF_EACH)
    return [_example(retriever, dataset, trial, each) for each in [*hits, *misses]]


def _example(
    retriever: Retriever, dataset: RetrievalDataset, trial: _Trial, found: _Ranked
) -> HeatExample:
    columns = [found.answer] if found.rank == 1 else [found.answer, found.rival]
    seen = [_see(retriever, dataset, trial, column) for column in columns]
    query = dataset.queries[trial.queries[found.query]].text
    vectors = trial.texts[found.query]
    return HeatExample(
        query,
        found.rank,
        len(trial.rows),
        tuple(_heated(each, vectors) for each in seen),
        tuple(_caption(dataset, trial.rows[column]) for column in columns),
        tuple(float(trial.scores[found.query, column]) for column in columns),
        _tokens(retriever, query, vectors, seen),
    )


def _documents(dataset: RetrievalDataset, queries: Sequence[int]) -> list[int]:
    """Corpus rows: the answers of the queries, then others, evenly spread."""
    row_of = {id_: row for row, id_ in enumerate(dataset.corpus.ids)}
    answers = [row_of[dataset.positives(dataset.queries[number].id)[0]] for number in queries]
    kept = list(dict.fromkeys(answers))
    others = [row for row in range(len(dataset.corpus)) if row not in set(kept)]
    return kept + _spread(others, max(0, _DOCUMENTS - len(kept)))


def _ranked(dataset: RetrievalDataset, trial: _Trial, place: int) -> _Ranked | None:
    """How a query fared; None if nothing it is compared with is wrong."""
    right = set(dataset.positives(dataset.queries[trial.queries[place]].id))
    is_right = torch.tensor([dataset.corpus.ids[row] in right for row in trial.rows])
    if is_right.all():
        return None
    scores = trial.scores[place]  # [documents]
    answer = int(scores.masked_fill(~is_right, -torch.inf).argmax())
    wrong = scores.masked_fill(is_right, -torch.inf)
    rank = 1 + int((wrong >= scores[answer]).sum())
    return _Ranked(place, answer, int(wrong.argmax()), rank)


def _see(retriever: Retriever, dataset: RetrievalDataset, trial: _Trial, column: int) -> _Seen:
    image, vectors = dataset.corpus.image(trial.rows[column]), trial.documents[column]
    span = retriever.visual_span((image.shape[0], image.shape[1]))
    visual = vectors[span.first : span.first + span.rows * span.columns]
    return _Seen(image, vectors, visual, (span.rows, span.columns))


def _heated(seen: _Seen, query: Float[Tensor, "query_tokens dim"]) -> _Image:
    heat = visual_heat(query, seen.visual).view(*seen.grid)  # [rows, columns]
    return draw_heat(seen.image, heat.numpy())


def _tokens(
    retriever: Retriever,
    query: str,
    vectors: Float[Tensor, "query_tokens dim"],
    seen: Sequence[_Seen],
) -> tuple[TokenShare, ...]:
    """The share of each token; equal ones behind one another, as augmentation is, count as one."""
    ids = retriever.collator.prompter.query_ids([query])[0]
    assert len(ids) == len(vectors), (len(ids), len(vectors))
    runs = [list(run) for _, run in groupby(range(len(ids)), key=lambda place: ids[place])]
    rest = [place for run in runs[_MOST_TOKENS - 1 :] for place in run]
    is_cut = len(runs) > _MOST_TOKENS
    shown = [*runs[: _MOST_TOKENS - 1], rest] if is_cut else runs
    best = [(vectors @ each.vectors.T).amax(dim=1) for each in seen]  # [query_tokens]
    shares = []
    for places in shown:
        text = retriever.tokenizer.decode([ids[places[0]]], skip_special_tokens=False)
        if is_cut and places is rest:
            text = f"{len(places)} more"
        elif len(places) > 1:
            text = f"{len(places)} × {text}"
        answer, *first = (float(of[places].sum()) for of in best)
        heated = _heated(seen[0], vectors[places])
        shares.append(TokenShare(text, answer, first[0] if first else None, heated))
    return tuple(shares)


def _caption(dataset: RetrievalDataset, row: int) -> str:
    page = dataset.corpus.pages[row]
    name = dataset.corpus.documents[row] or dataset.corpus.ids[row]
    return f"{name}, page {page + 1}" if page >= 0 else name


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    places = np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int)
    return [items[place] for place in places]
