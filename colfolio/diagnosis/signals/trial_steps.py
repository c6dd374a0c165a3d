"""Batches as a run draws them, and their gradients, outside of the run's own steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

import numpy as np
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import ContrastiveBatch
from colfolio.data.contrastive import BatchSource
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import SamplerPosition
from colfolio.data.teacher import TeacherScores
from colfolio.models.retriever import Retriever
from colfolio.training import TrainingState, TrainSettings, start_training
from colfolio.training.exact_batch import ExactBatch, Loss
from colfolio.training.losses import ScoreSummary, contrastive_loss, maxsim_range


def copied_state(retriever: Retriever, settings: TrainSettings) -> TrainingState:
    """A run's state before its first step, of a copy of a model as it was loaded."""
    plain = settings.model_copy(update={"parallel": "ddp"})
    return start_training(copy.deepcopy(retriever), plain)


def drawn_batches(
    state: TrainingState, dataset: RetrievalDataset, position: SamplerPosition, count: int
) -> Iterator[ContrastiveBatch]:
    """So many batches from a position on, this rank's share of each with the masks of all."""
    settings = state.settings
    is_taught = settings.loss.kind == "distillation"
    teacher = TeacherScores(dataset) if is_taught else None
    collator = state.retriever.collator
    source = BatchSource(dataset, collator, settings.batch, settings.seed, state.world, teacher)
    for drawn in islice(source.batches(position), count):
        yield source.of_all_ranks(drawn)


def add_gradient(
    state: TrainingState, batch: ContrastiveBatch, step: int, number: int = 0, share: float = 1.0
) -> ScoreSummary:
    """Add the gradient of a batch, with the draws that dropout has in that step of the run.

    Args:
        step: counted from 0.
        number: of the batch in its step.
        share: that the gradient is multiplied by.
    """
    assert isinstance(state.exact, ExactBatch)
    drawn = np.random.default_rng((state.settings.seed, 3, step, number))
    return state.exact.backward(batch, loss_of(state, batch), int(drawn.integers(2**63)), share)


def loss_of(state: TrainingState, batch: ContrastiveBatch) -> Loss:
    """The run's loss of a batch's scores, those of all ranks."""
    device, settings = state.retriever.device, state.settings.loss
    masks = batch.positives.to(device), batch.ignored.to(device)
    teacher = None if batch.teacher is None else batch.teacher.to(device)
    reach = maxsim_range(state.world.gather_rows(batch.queries.lengths, "own")).to(device)

    def loss(scores: Float[Tensor, "queries documents"]) -> ScoreSummary:
        return contrastive_loss(scores, *masks, settings, teacher, reach)

    return loss
