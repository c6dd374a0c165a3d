"""What the loop asks of the objective `retrieval`: batches, their loss, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import ContrastiveBatch
from colfolio.data.contrastive import BatchSource
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.teacher import TeacherScores
from colfolio.training.exact_batch import ExactBatch, Loss
from colfolio.training.losses import ScoreSummary, contrastive_loss, maxsim_range
from colfolio.training.state import TrainingState, TrainSettings


def retrieval_source(
    state: TrainingState,
    dataset: RetrievalDataset,
    rows: int | None = None,
    *,
    uses_features: bool = True,
) -> BatchSource:
    """Batches of a split for the ranks of a state.

    Args:
        rows: of a batch; None is as the settings have it, and they ask for so many candidates.
        uses_features: of frozen layers, where the run keeps them.
    """
    settings = state.settings
    batch = settings.batch
    if rows is not None:
        batch = batch.model_copy(update={"rows": rows, "candidates": None})
    return BatchSource(
        dataset,
        state.retriever.collator,
        batch,
        settings.seed,
        state.world,
        teacher_of(dataset, settings),
        with_digests=uses_features and state.exact.cache is not None,
    )


def teacher_of(dataset: RetrievalDataset, settings: TrainSettings) -> TeacherScores | None:
    """The scores that a run follows, if its loss is distillation."""
    return TeacherScores(dataset) if settings.loss.kind == "distillation" else None


def batch_loss(state: TrainingState, batch: ContrastiveBatch) -> Loss:
    """The configured loss of a batch's scores, those of all ranks; all ranks call it."""
    device, settings = state.retriever.device, state.settings.loss
    masks = batch.positives.to(device), batch.ignored.to(device)
    teacher = None if batch.teacher is None else batch.teacher.to(device)
    lengths = state.world.gather_rows(batch.queries.lengths, "own")
    reach = maxsim_range(lengths).to(device)

    def loss(scores: Float[Tensor, "queries documents"]) -> ScoreSummary:
        return contrastive_loss(scores, *masks, settings, teacher, reach)

    return loss


def retrieval_backward(state: TrainingState, batches: list[ContrastiveBatch]) -> ScoreSummary:
    """Add the mean gradient of a step's batches."""
    share, scale = 1 / len(batches), state.scaler.scale
    return _mean(
        [
            batch_backward(state, batch, state.step, number, share, scale)
            for number, batch in enumerate(batches)
        ]
    )


def batch_backward(
    state: TrainingState,
    batch: ContrastiveBatch,
    step: int,
    number: int = 0,
    share: float = 1.0,
    scale: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> ScoreSummary:
    """Add the gradient of a batch; what is drawn depends on (seed, step, number).

    Args:
        step: counted from 0.
        number: of the batch in its step.
        share, scale: see `ExactBatch.backward`.
    """
    assert isinstance(state.exact, ExactBatch)
    drawn = np.random.default_rng((state.settings.seed, 3, step, number))
    seed = int(drawn.integers(2**63))
    return state.exact.backward(batch, batch_loss(state, batch), seed, share, scale)


def _mean(summaries: list[ScoreSummary]) -> ScoreSummary:
    values = [[getattr(each, field.name) for each in summaries] for field in fields(ScoreSummary)]
    return ScoreSummary(*(torch.stack(each).mean() for each in values))
