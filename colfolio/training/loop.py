"""One training step after another, as a generator; its consumer prints, evaluates and saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import AdamW

from colfolio.batch import ContrastiveBatch, MultiVectors, Packed
from colfolio.config import Settings
from colfolio.data.contrastive import BatchSettings, BatchSource, DrawnBatch
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import SamplerPosition
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.precision import Precision, autocast, settled_precision
from colfolio.models.retriever import Retriever
from colfolio.training.exact_batch import MemorySettings, exact_backward
from colfolio.training.losses import LossSettings, ScoreSummary, check_masks, info_nce
from colfolio.training.optim import (
    OptimiserSettings,
    build_optimiser,
    learning_rate,
    optimiser_step,
)


class TrainSettings(Settings):
    """What determines the weights that come out.

    Args:
        steps: optimiser steps of the whole run.
        seed: of the order of the data, and of dropout where the backbone has any.
        precision: `auto` is bf16 autocast where the machine computes it natively, else fp32.
        gradient_checkpointing: keep only the borders of layers and compute the rest again.
        threads: CPU threads; None leaves them as they are. Another number rounds otherwise.
    """

    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    batch: BatchSettings = BatchSettings()
    memory: MemorySettings = MemorySettings()
    loss: LossSettings = LossSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    threads: int | None = Field(default=None, ge=1)


@dataclass(slots=True)
class TrainingState:
    """Everything that a step changes."""

    retriever: Retriever
    optimiser: AdamW
    settings: TrainSettings
    step: int = 0
    position: SamplerPosition = field(default_factory=SamplerPosition)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Args:
        step: counted from 1; so many steps are done.
        loss, chance, margin, spread, candidates, accuracy: see `ScoreSummary`.
        gradient_norm: of all parameters together, before clipping.
        lr: the learning rate of the step.
        seconds: of the step, waiting for its batch included.
        rows_per_second: queries, each with its document.
    """

    step: int
    loss: float
    chance: float
    margin: float
    spread: float
    candidates: float
    accuracy: float
    gradient_norm: float
    lr: float
    seconds: float
    rows_per_second: float


def start_training(retriever: Retriever, settings: TrainSettings) -> TrainingState:
    """The state before the first step.

    Weights that train are float32, whatever their file holds: in bf16 a step smaller than a part in
    256 of a weight would be lost. `precision` is that of the arithmetic alone. What the settings
    leave to the machine, precision and threads, is settled here, so that a resumed run keeps it.
    """
    cast_parameters(retriever, torch.float32)
    retriever.train()
    if settings.gradient_checkpointing:
        retriever.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    settled = settings.model_copy(
        update={
            "precision": settled_precision(settings.precision, retriever.device),
            "threads": settings.threads or torch.get_num_threads(),
        }
    )
    return TrainingState(retriever, build_optimiser(retriever, settings.optimiser), settled)


def train(state: TrainingState, dataset: RetrievalDataset) -> Iterator[StepReport]:
    """Train until the settings' number of steps; between two reports the state is whole.

    Raises:
        DatasetError: at once, if the split has fewer queries than a batch has rows; later, if a
            batch has a query without a positive or without a negative.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    settings = state.settings
    source = BatchSource(dataset, state.retriever.collator, settings.batch, settings.seed)
    return _steps(state, source)


def _steps(state: TrainingState, source: BatchSource) -> Iterator[StepReport]:
    settings = state.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    begin = time.perf_counter()
    for drawn in _ahead(source.batches(state.position), settings.steps - state.step):
        rate = learning_rate(state.step, settings.steps, settings.optimiser)
        summary = _backward(state, drawn.batch)
        norm = optimiser_step(state.retriever, state.optimiser, rate, settings.optimiser)
        state.step += 1
        state.position = drawn.after
        end = time.perf_counter()
        yield _report(state.step, summary, norm, rate, end - begin, len(drawn.batch.queries))
        begin = time.perf_counter()


def _backward(state: TrainingState, batch: ContrastiveBatch) -> ScoreSummary:
    """The gradient of one batch; dropout draws from (seed, step) alone, so it resumes."""
    retriever, settings = state.retriever, state.settings
    check_masks(batch.positives, batch.ignored)
    batch = batch.to(retriever.device)

    def encode(packed: Packed) -> MultiVectors:
        with autocast(settings.precision, retriever.device):
            return retriever(packed)

    def loss(scores: Tensor) -> ScoreSummary:
        return info_nce(scores, batch.positives, batch.ignored, settings.loss)

    seed = int(np.random.default_rng((settings.seed, 3, state.step)).integers(2**63))
    weights = retriever.parameters()
    return exact_backward(encode, weights, batch, loss, settings.memory, seed)


def _report(
    step: int, summary: ScoreSummary, norm: torch.Tensor, rate: float, seconds: float, rows: int
) -> StepReport:
    """One transfer from the device for all numbers of a step."""
    numbers = torch.stack(
        [
            summary.loss.detach(),
            summary.chance,
            summary.margin,
            summary.spread,
            summary.candidates,
            summary.accuracy,
            norm.to(summary.loss.dtype),
        ]
    ).tolist()
    loss, *_, gradient_norm = numbers
    if not (abs(loss) < float("inf") and gradient_norm < float("inf")):
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {gradient_norm}")
    return StepReport(step, *numbers, lr=rate, seconds=seconds, rows_per_second=rows / seconds)


def _ahead(batches: Iterator[DrawnBatch], count: int) -> Iterator[DrawnBatch]:
    """So many batches, each made in a thread while the one before it is trained on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as pool:
        coming = pool.submit(next, batches) if count > 0 else None
        for remaining in range(count - 1, -1, -1):
            assert coming is not None
            drawn = coming.result()
            coming = pool.submit(next, batches) if remaining else None
            yield drawn
