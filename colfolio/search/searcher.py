"""Exact search: MaxSim of a query with every view of an index, pages ranked by score.

An approximate index would lose hits without a word (recall 0.14 to 0.43 where it was measured), so
every vector is compared. The vectors are held in memory as they are stored, and widened to float32
a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from colfolio.batch import MultiVectors, offsets_of
from colfolio.data.pages.ink import BoxF
from colfolio.errors import CheckpointError, ColfolioError, IndexStoreError
from colfolio.maxsim import maxsim
from colfolio.models.retriever import Retriever
from colfolio.search.index import Encoder
from colfolio.search.layout import read_manifest
from colfolio.search.store import VectorStore

_PAGE_SCORES = ("best", "union")

# Vectors of one call of maxsim, and query vectors times rows of one call: 32 MB of float32 each.
_CHUNK_VECTORS = 1 << 16
_CHUNK_CELLS = 1 << 23


@dataclass(frozen=True, slots=True)
class Hit:
    """A page that answers a query, and the view on it that answers best.

    Args:
        document: its name; page: counted from 0; page_id: its place in `Searcher.pages`.
        score: of the page: MaxSim, summed over the query's vectors.
        view: number of the page's best view; box: of that view; view_id: its place in the index.
    """

    document: str
    page: int
    score: float
    box: BoxF
    view: int
    page_id: int
    view_id: int


class Searcher:
    """An index held in memory, and the model that made it.

    Args:
        index: the folder that `build_index` wrote.
        encoder: the model; None loads the one that the index names.
        page_score: a page scores as its best view (`best`), or as one document made of the vectors
            of all its views (`union`).

    Raises:
        ColfolioError: another page_score.
        IndexStoreError: the index is missing, damaged, or was made by another model.
    """

    def __init__(
        self, index: Path, encoder: Encoder | None = None, page_score: str = "best"
    ) -> None:
        if page_score not in _PAGE_SCORES:
            accepted = " or ".join(_PAGE_SCORES)
            raise ColfolioError(f"page_score must be {accepted}, not {page_score!r}")
        self.store = VectorStore(index)
        self.encoder: Encoder = load_encoder(index) if encoder is None else encoder
        self.store.check_encoder(self.encoder.dim, self.encoder.fingerprint(), "this model")
        self.page_score = page_score
        self.pages = self.store.pages()
        self.views = self.store.views()
        self._rows = _load_rows(self.store, page_score)

    def search(self, query: str, top_k: int = 10) -> list[Hit]:
        """The best pages, best first; equal scores in the order of the index.

        Pages without a view (blank ones) never are hits.

        Raises:
            ColfolioError: the query is empty, or `top_k` is below 1.
        """
        if top_k < 1:
            raise ColfolioError(f"top_k must be at least 1, not {top_k}")
        vectors = self.encode(query)
        scores = self._page_scores(vectors)[0].numpy()  # [pages]
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [
            self._hit(vectors, int(page), float(scores[page]))
            for page in best
            if np.isfinite(scores[page])
        ]

    def search_many(self, queries: Sequence[str]) -> Float32[Tensor, "queries pages"]:
        """The score of every page for every query; minus infinity for a page without a view."""
        for query in queries:
            _check_query(query)
        return self._page_scores(self.encoder.encode_queries(list(queries)))

    def encode(self, query: str) -> MultiVectors:
        """One row: the vectors of a query.

        Raises:
            ColfolioError: the query is empty.
        """
        _check_query(query)
        return self.encoder.encode_queries([query])

    def view_vectors(self, view_id: int) -> Float32[Tensor, "tokens dim"]:
        """The vectors of one view, in the order in which the model made them."""
        return self._rows.view(view_id).float()

    def _page_scores(self, queries: MultiVectors) -> Float32[Tensor, "queries pages"]:
        scores = torch.full((len(queries), len(self.pages)), -torch.inf)
        for chunk, page_ids in self._rows.chunks():
            for first, last in _query_blocks(queries.offsets, _CHUNK_CELLS // len(chunk)):
                block = MultiVectors(
                    queries.vectors[queries.offsets[first] : queries.offsets[last]],
                    queries.offsets[first : last + 1] - queries.offsets[first],
                )
                found = maxsim(block, chunk)  # [block, rows of chunk]
                target = page_ids.expand(len(found), -1)
                scores[first:last].scatter_reduce_(1, target, found, "amax")
        return scores

    def _hit(self, query: MultiVectors, page_id: int, score: float) -> Hit:
        view_ids = (self.views.page_ids == page_id).nonzero().flatten()
        views = MultiVectors.from_list([self.view_vectors(int(view)) for view in view_ids])
        best = int(view_ids[int(np.argmax(maxsim(query, views)[0].numpy()))])
        left, top, right, bottom = self.views.boxes[best].tolist()
        document, page = self.pages[page_id]
        return Hit(
            document=document,
            page=page,
            score=score,
            box=(left, top, right, bottom),
            view=int(self.views.numbers[best]),
            page_id=page_id,
            view_id=best,
        )


def load_encoder(index: Path, model: str | None = None) -> Retriever:
    """The model that made an index, from where it was then, or from where it is now.

    Raises:
        IndexStoreError: there is no index, or the model is no longer where it was.
        CheckpointError: the model that was named cannot be loaded.
    """
    if model is not None:
        return Retriever.from_pretrained(model)
    named = read_manifest(index).model
    try:
        return Retriever.from_pretrained(named)
    except CheckpointError as error:
        raise IndexStoreError(
            f"{index}: the model that made it ({named or 'not named'}) cannot be loaded; say where "
            f"it is now (--model): {error}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Rows:
    """All vectors in the order in which they are scored, as rows of one page each.

    Args:
        vectors: as stored; offsets: of rows; page_ids: of each row.
        view_starts, view_lengths: where each view lies in `vectors`.
    """

    vectors: Float[Tensor, "tokens dim"]
    offsets: Int64[Tensor, "rows_and_one"]
    page_ids: Int64[Tensor, " rows"]
    view_starts: Int64[Tensor, " views"]
    view_lengths: Int64[Tensor, " views"]

    def view(self, view_id: int) -> Float[Tensor, "view_tokens dim"]:
        start = int(self.view_starts[view_id])
        return self.vectors[start : start + int(self.view_lengths[view_id])]

    def chunks(self) -> Iterator[tuple[MultiVectors, Int64[Tensor, " chunk_rows"]]]:
        """Consecutive rows of about `_CHUNK_VECTORS` vectors, with the page of each."""
        first = 0
        while first < len(self.page_ids):
            start = int(self.offsets[first])
            last = int(torch.searchsorted(self.offsets, start + _CHUNK_VECTORS, right=True)) - 1
            last = max(first + 1, min(last, len(self.page_ids)))
            vectors = self.vectors[start : int(self.offsets[last])]
            yield (
                MultiVectors(vectors, self.offsets[first : last + 1] - start),
                self.page_ids[first:last],
            )
            first = last


def _load_rows(store: VectorStore, page_score: str) -> _Rows:
    """Rows are views sorted by length (equal lengths score in one call), or whole pages."""
    views = store.views()
    lengths = views.lengths
    if page_score == "best":
        order = torch.argsort(lengths, stable=True)
        offsets, page_ids = offsets_of(lengths[order]), views.page_ids[order]
        view_starts = torch.empty_like(lengths)
        view_starts[order] = offsets[:-1]
    else:
        page_ids, counts = torch.unique_consecutive(views.page_ids, return_counts=True)
        view_starts = offsets_of(lengths)[:-1]
        ends = (view_starts + lengths)[counts.cumsum(0) - 1]
        offsets = torch.cat([ends.new_zeros(1), ends])
    dtype = getattr(torch, store.manifest.dtype)
    vectors = torch.empty(store.manifest.num_vectors, store.manifest.dim, dtype=dtype)
    places = torch.repeat_interleave(view_starts - offsets_of(lengths)[:-1], lengths)
    done = 0
    for part in store.vectors():
        part_places = torch.arange(done, done + len(part)) + places[done : done + len(part)]
        vectors[part_places] = part
        done += len(part)
    return _Rows(vectors, offsets, page_ids, view_starts, lengths)


def _query_blocks(offsets: Int64[Tensor, "rows_and_one"], tokens: int) -> Iterator[tuple[int, int]]:
    """Runs `(first, last)` of queries that have about so many vectors together, at least one."""
    first = 0
    while first < len(offsets) - 1:
        last = int(torch.searchsorted(offsets, offsets[first] + max(1, tokens), right=True)) - 1
        last = max(first + 1, last)
        yield first, last
        first = last


def _check_query(query: str) -> None:
    if not query.strip():
        raise ColfolioError("the query is empty: name what to look for")
