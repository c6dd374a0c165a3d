"""Validation loss on a fixed pool: the same negatives for a query in every evaluation and run.

The loss of a training batch depends on how many documents are in it, so runs of another batch size
cannot be compared by it. Here each query has its answers and the same K negatives, drawn once from
the whole corpus; scores without information give ln(1 + K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from colfolio.data.dataset import RetrievalDataset
from colfolio.data.relations import Relations
from colfolio.errors import DatasetError
from colfolio.evaluation.benchmark import Encoder, model_scores, relevance_of
from colfolio.evaluation.metrics import mean_metrics
from colfolio.training.losses import LossSettings, loss_of_scores

POOL_SIZE = 64
_SEED = 0  # not the run's: runs of several seeds are compared on one pool


@dataclass(frozen=True, slots=True)
class Pool:
    """What each query of a split is compared with.

    Args:
        positives: its answers, each against the negatives alone.
        others: documents that are neither its answers nor in its pool.
        size: negatives of each query.
    """

    positives: Bool[Tensor, "queries documents"]
    others: Bool[Tensor, "queries documents"]
    size: int

    @property
    def chance(self) -> float:
        """The loss of scores without information."""
        return math.log(1 + self.size)

    @property
    def num_queries(self) -> int:
        """Those that have an answer and anything to tell it from."""
        return int(self.positives.any(dim=1).sum())


def draw_pool(dataset: RetrievalDataset, size: int | None = None) -> Pool:
    """The pool of a split, the same whenever it is drawn.

    Documents on the page of an answer are no negatives, as in training by default.

    Args:
        size: negatives of each query; None takes `POOL_SIZE`, or as many as every query has.

    Raises:
        DatasetError: a query has fewer negatives than asked for, or none has any.
    """
    numbers = range(len(dataset.queries))
    rows = np.arange(len(dataset.corpus))
    positives, ignored = Relations(dataset, "page").masks(numbers, rows)
    negatives = (~(positives | ignored)).numpy()
    taking_part = negatives[positives.any(dim=1).numpy()]
    least = int(taking_part.sum(axis=1).min(initial=len(rows))) if len(taking_part) else 0
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
    others = np.ones_like(negatives)
    for query in positives.any(dim=1).nonzero().flatten().tolist():
        generator = np.random.default_rng((_SEED, query))
        drawn = generator.choice(np.flatnonzero(negatives[query]), size, replace=False)
        others[query, drawn] = False
    return Pool(positives, torch.from_numpy(others) & ~positives, size)


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
    return loss_of_scores(scores, pool.positives, pool.others, settings).item()
