"""The probe: one fixed batch, measured again and again while a model trains, without a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import MultiVectors, Packed
from colfolio.diagnosis.evidence import ProbeSignals
from colfolio.diagnosis.signals.probe_batch import ProbeBatch
from colfolio.diagnosis.signals.score_signals import (
    best_shift,
    confident_share,
    distinct_share,
    mean_margin,
    mean_rank,
    score_error,
    score_histogram,
)
from colfolio.diagnosis.signals.vector_signals import (
    effective_rank,
    mean_cosine,
    mean_distance,
    same_winner_share,
    sampled,
    winners,
)
from colfolio.maxsim import maxsim
from colfolio.models.encoding import evaluating
from colfolio.models.precision import Precision, autocast
from colfolio.models.retriever import Retriever
from colfolio.training.chunks import row_runs
from colfolio.training.losses import LossSettings, contrastive_loss, maxsim_range


@dataclass(frozen=True, slots=True)
class FirstVectors:
    """Some vectors of the probe as they were before the first step, on the CPU."""

    queries: Float[Tensor, "_queries dim"]
    documents: Float[Tensor, "_documents dim"]


class Probe:
    """Measures a model on a batch; nothing is drawn, and no weight, mode or gradient changes.

    Args:
        batch: inputs and masks.
        chunk_tokens: that go through the model together, as in training.

    Attributes:
        first: what distances are measured from; None takes what is found at step 0, and until then
            they are NaN.
    """

    def __init__(self, batch: ProbeBatch, chunk_tokens: int | None = None) -> None:
        self.batch = batch
        self.first: FirstVectors | None = None
        self._chunk_tokens = chunk_tokens

    def measure(
        self, retriever: Retriever, step: int, loss: LossSettings, precision: Precision
    ) -> ProbeSignals:
        """The signals after so many steps; all ranks ask if the model is spread over them.

        Args:
            loss: of the run.
            precision: in which the run computes.
        """
        queries = self.vectors(retriever, self.batch.queries, precision)
        documents = self.vectors(retriever, self.batch.documents, precision)
        now = FirstVectors(sampled(queries), sampled(documents))
        if self.first is None and step == 0:
            self.first = now
        distances = _distances(self.first, now)
        return signals_of(self.batch, queries, documents, step, loss, distances)

    def vectors(self, retriever: Retriever, rows: Packed, precision: Precision) -> MultiVectors:
        """Vectors of packed rows in evaluation mode, on the model's device."""
        device, parts = retriever.device, []
        with torch.no_grad(), evaluating(retriever), autocast(precision, device):
            for begin, end in row_runs(rows, self._chunk_tokens):
                parts.append(retriever(rows.rows(begin, end).to(device)))
        return MultiVectors.cat(parts)


@torch.no_grad()
def signals_of(
    batch: ProbeBatch,
    queries: MultiVectors,
    documents: MultiVectors,
    step: int,
    loss: LossSettings,
    distances: tuple[float, float],
) -> ProbeSignals:
    """All signals of a batch whose vectors are at hand.

    Args:
        distances: of queries and of documents from their beginning.
    """
    scores = maxsim(queries, documents)
    places, exact = winners(queries, documents)
    scores, masks = scores.cpu(), (batch.positives, batch.ignored)
    reach = maxsim_range(queries.lengths)
    summary = contrastive_loss(scores, *masks, loss, batch.teacher, reach)
    spread = float(summary.spread)
    shift, shift_accuracy = best_shift(scores, batch.answering, batch.order, batch.answers)
    histogram, edges = score_histogram(scores, *masks)
    return ProbeSignals(
        step=step,
        documents=round(float(summary.candidates)),
        loss=float(summary.loss),
        chance=float(summary.chance),
        floor=float(summary.floor),
        margin=float(summary.margin),
        mean_margin=mean_margin(scores, *masks),
        rank=mean_rank(scores, *masks),
        accuracy=float(summary.accuracy),
        spread=spread,
        query_cosine=mean_cosine(queries),
        document_cosine=mean_cosine(documents),
        query_rank=effective_rank(queries.vectors),
        document_rank=effective_rank(documents.vectors),
        dim=queries.vectors.shape[1],
        same_winner=same_winner_share(places, documents.lengths),
        query_distance=distances[0],
        document_distance=distances[1],
        shift=shift,
        shift_accuracy=shift_accuracy,
        confident=confident_share(scores, *masks),
        distinct_scores=distinct_share(scores),
        score_error=score_error(scores, exact.cpu(), spread),
        histogram=histogram,
        edges=edges,
        query_spread=float(scores.double().std(dim=0, correction=0).mean()),
    )


def _distances(first: FirstVectors | None, now: FirstVectors) -> tuple[float, float]:
    """Of queries and of documents; NaN where the beginning is not known."""
    if first is None:
        return math.nan, math.nan
    queries = mean_distance(first.queries, now.queries)
    return queries, mean_distance(first.documents, now.documents)
