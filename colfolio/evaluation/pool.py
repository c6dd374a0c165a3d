"""Validation loss on a fixed pool: the same negatives for a query in every evaluation and run.

The loss of a training batch depends on how many documents are in it, so runs of another batch size
cannot be compared by it. Here each query has its answers and the same K negatives, drawn once from
the whole corpus; scores without information give ln(1 + K).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from colfolio.data.dataset import RetrievalDataset
from colfolio.data.relations import Relations
from colfolio.errors import DatasetError
from colfolio.evaluation.benchmark import Encoder, model_scores, relevance_of
from colfolio.evaluation.metrics import mean_metrics
from colfolio.training.losses import LossSettings, loss_of_scores

POOL_SIZE = 64
_SEED = 0  # not the run's: runs of several seeds are compared on one pool
_Rows = Int64[np.ndarray, " _rows"]


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """What each query of a split is compared with, by the rows of its corpus.

    A split may have a hundred thousand queries and as many documents, so nothing here has a number
    for each pair of them.

    Args:
        queries: those that take part: with an answer, and anything to tell it from.
        answers: of each of these, each against the negatives alone.
        negatives: of each of these.
    """

    queries: Int64[Tensor, " queries"]
    answers: tuple[_Rows, ...]
    negatives: Int64[Tensor, "queries size"]

    @property
    def size(self) -> int:
        """Negatives of each query."""
        return self.negatives.shape[1]

    @property
    def chance(self) -> float:
        """The loss of scores without information."""
        return math.log(1 + self.size)

    @property
    def num_queries(self) -> int:
        """Those that take part."""
        return len(self.queries)


def draw_pool(dataset: RetrievalDataset, size: int | None = None) -> Pool:
    """The pool of a split, the same whenever it is drawn.

    Documents on the page of an answer are no negatives, as in training by default.

    Args:
        size: negatives of each query; None takes `POOL_SIZE`, or as many as every query has.

    Raises:
        DatasetError: a query has fewer negatives than asked for, or none has any.
    """
    relations, documents = Relations(dataset, "page"), len(dataset.corpus)
    left_out = {
        query: rows
        for query, rows in enumerate(_left_out(dataset, relations))
        if len(relations.answers[query]) and len(rows) < documents
    }
    least = documents - max(map(len, left_out.values()), default=documents)
    named = f"{dataset.name}, split {dataset.split!r}"
    if least == 0:
        raise DatasetError(
            f"{named}: no query has a document that does not answer it, nor shows a page that "
            "does; choose another split to validate on, or none"
        )
    if size is not None and least < size:
        raise DatasetError(
            f"{named}: validation.pool is {size}, but a query has only {least} documents that do "
            f"not answer it; set it to {least} or less"
        )
    size = min(size or POOL_SIZE, least)
    drawn = [_drawn(query, rows, documents, size) for query, rows in left_out.items()]
    return Pool(
        torch.tensor(list(left_out)),
        tuple(relations.answers[query] for query in left_out),
        torch.from_numpy(np.stack(drawn)),
    )


def validation_metrics(
    encoder: Encoder,
    dataset: RetrievalDataset,
    pool: Pool,
    temperature: float = 1.0,
    names: Sequence[str] = ("ndcg@5",),
) -> dict[str, float]:
    """What a model is worth on a split while it trains: `loss` on the pool, and metrics by name.

    Beside the loss stand its `chance` level and the `negatives` that both are of.
    """
    scores = model_scores(encoder, dataset)
    loss = pool_loss(scores, pool, temperature)
    levels = {"loss": loss, "chance": pool.chance, "negatives": float(pool.size)}
    return mean_metrics(scores, relevance_of(dataset), names) | levels


def pool_loss(
    scores: Float[Tensor, "queries documents"], pool: Pool, temperature: float = 1.0
) -> float:
    """InfoNCE of a split's scores over its pool, whatever loss the model trains on."""
    settings = LossSettings(kind="info_nce", temperature=temperature)
    total = 0.0
    for places, columns, positives in _by_answers(pool):
        of_pool = scores[pool.queries[places][:, None], columns]  # [some queries, answers + size]
        loss = loss_of_scores(of_pool, positives, torch.zeros_like(positives), settings)
        total += len(places) * loss.item()
    return total / pool.num_queries


def _by_answers(
    pool: Pool,
) -> Iterator[tuple[Int64[Tensor, " some"], Int64[Tensor, "some rows"], Bool[Tensor, "some rows"]]]:
    """Queries with equally many answers: their places, the rows of each, and which answer it."""
    counts = np.array([len(rows) for rows in pool.answers])
    for count in np.unique(counts).tolist():
        places = torch.from_numpy(np.flatnonzero(counts == count))
        answers = torch.from_numpy(np.stack([pool.answers[place] for place in places.tolist()]))
        columns = torch.cat([answers, pool.negatives[places]], dim=1)
        positives = torch.zeros_like(columns, dtype=torch.bool)
        positives[:, :count] = True
        yield places, columns, positives


def _left_out(dataset: RetrievalDataset, relations: Relations) -> Iterator[_Rows]:
    """Of each query the rows, rising, that are no negatives: its answers and what is on their page.

    What was judged not to answer is a negative there too.
    """
    pages = dataset.corpus.page_keys
    order = np.argsort(pages, kind="stable")
    in_order = pages[order]
    for answers, refused in zip(relations.answers, relations.refused, strict=True):
        own = np.unique(pages[answers])
        ends = zip(
            *(np.searchsorted(in_order, own, side) for side in ("left", "right")), strict=True
        )
        beside = [order[begin:end] for begin, end in ends]
        together = np.unique(np.concatenate([answers, *beside]))
        yield together[~np.isin(together, refused) | np.isin(together, answers)]


def _drawn(query: int, left_out: _Rows, documents: int, size: int) -> _Rows:
    """So many of the rows that are not left out, as drawing from a list of them gives.

    Before the k-th row that is left out stand k others of that kind, and the rest are negatives; so
    the place in their list tells how many to pass over.
    """
    generator = np.random.default_rng((_SEED, query))
    places = generator.choice(documents - len(left_out), size, replace=False)
    negatives_before = left_out - np.arange(len(left_out))
    return places + np.searchsorted(negatives_before, places, side="right")
