"""Batches as a run draws them, and a state to try them on, outside of the run's own steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

from colfolio.batch import ContrastiveBatch
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import SamplerPosition
from colfolio.models.retriever import Retriever
from colfolio.training import TrainingState, TrainSettings, start_training
from colfolio.training.opening import open_due_stages
from colfolio.training.retrieval_objective import retrieval_source


def copied_state(retriever: Retriever, settings: TrainSettings) -> TrainingState:
    """A run's state before its first step, of a copy of a model as it was loaded.

    Stages that open with that step are open.
    """
    plain = settings.model_copy(update={"parallel": "ddp"})
    state = start_training(copy.deepcopy(retriever), plain)
    open_due_stages(state, 0.0)
    return state


def drawn_batches(
    state: TrainingState, dataset: RetrievalDataset, position: SamplerPosition, count: int
) -> Iterator[ContrastiveBatch]:
    """So many batches from a position on, this rank's share of each with the masks of all."""
    source = retrieval_source(state, dataset, uses_features=False)
    for drawn in islice(source.batches(position), count):
        yield source.of_all_ranks(drawn)
