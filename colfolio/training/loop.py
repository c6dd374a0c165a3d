"""One training step after another, as a generator; its consumer prints, evaluates and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import ContrastiveBatch
from colfolio.data.contrastive import BatchSource, DrawnBatch
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.teacher import TeacherScores
from colfolio.training.exact_batch import Loss
from colfolio.training.losses import ScoreSummary, check_masks, contrastive_loss, maxsim_range
from colfolio.training.optim import check_scale, learning_rate, optimiser_step
from colfolio.training.state import TrainingState


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Args:
        step: counted from 1; so many steps are done.
        loss, chance, floor, margin, spread, candidates, masked, accuracy: see `ScoreSummary`.
        gradient_norm: of all parameters together, before clipping.
        skipped: gradients overflowed in half precision, and the weights stayed as they were.
        lr: the learning rate of the step.
        seconds: of the step, waiting for its batch included.
        rows_per_second: queries, each with its document.
    """

    step: int
    loss: float
    chance: float
    floor: float
    margin: float
    spread: float
    candidates: float
    masked: float
    accuracy: float
    gradient_norm: float
    skipped: bool
    lr: float
    seconds: float
    rows_per_second: float


def train(state: TrainingState, dataset: RetrievalDataset) -> Iterator[StepReport]:
    """Train until the settings' number of steps; between two reports the state is whole.

    Raises:
        DatasetError: at once, if the split has fewer queries than a batch has rows; later, if a
            batch has a query without a positive or without a negative.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    settings = state.settings
    is_taught = settings.loss.kind == "distillation"
    source = BatchSource(
        dataset,
        state.retriever.collator,
        settings.batch,
        settings.seed,
        state.world,
        TeacherScores(dataset) if is_taught else None,
        with_digests=state.exact.cache is not None,
    )
    return _steps(state, source)


def _steps(state: TrainingState, source: BatchSource) -> Iterator[StepReport]:
    settings = state.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    begin = time.perf_counter()
    num_batches = (settings.steps - state.step) * settings.accumulation
    coming = _ahead(source.batches(state.position), num_batches)
    while drawn := _drawn(state, coming):
        batches = _of_all_ranks(state, source, drawn)
        rate = learning_rate(state.step, settings.steps, settings.optimiser)
        summary = _backward(state, batches)
        norm = _optimiser_step(state, rate)
        state.step += 1
        state.position = drawn[-1].after
        end = time.perf_counter()
        rows = sum(len(batch.positives) for batch in batches)
        yield _report(state, summary, norm, rate, end - begin, rows)
        begin = time.perf_counter()


def _drawn(state: TrainingState, coming: Iterator[DrawnBatch]) -> list[DrawnBatch]:
    """This rank's shares of a step; what one rank cannot read or collate, all ranks refuse."""
    drawn: list[DrawnBatch] = []
    with state.world.together():
        drawn += islice(coming, state.settings.accumulation)
    return drawn


def _of_all_ranks(
    state: TrainingState, source: BatchSource, drawn: list[DrawnBatch]
) -> list[ContrastiveBatch]:
    """The shares with the masks of all ranks, which each checks; what it refuses, all refuse."""
    batches: list[ContrastiveBatch] = []
    with state.world.together():
        batches += [source.of_all_ranks(each) for each in drawn]
        for batch in batches:
            check_masks(batch.positives, batch.ignored, batch.teacher)
    return batches


def _backward(state: TrainingState, batches: list[ContrastiveBatch]) -> ScoreSummary:
    """Add the mean gradient of some batches; what is drawn depends on (seed, step, batch)."""
    summaries = []
    for number, batch in enumerate(batches):
        drawn = np.random.default_rng((state.settings.seed, 3, state.step, number))
        seed = int(drawn.integers(2**63))
        loss, share = _loss(state, batch), 1 / len(batches)
        summaries.append(state.exact.backward(batch, loss, seed, share, state.scaler.scale))
    return _mean(summaries)


def _loss(state: TrainingState, batch: ContrastiveBatch) -> Loss:
    """The configured loss of a batch's scores, those of all ranks."""
    device, settings = state.retriever.device, state.settings.loss
    masks = batch.positives.to(device), batch.ignored.to(device)
    teacher = None if batch.teacher is None else batch.teacher.to(device)
    lengths = state.world.gather_rows(batch.queries.lengths, "own")
    reach = maxsim_range(lengths).to(device)

    def loss(scores: Float[Tensor, "queries documents"]) -> ScoreSummary:
        return contrastive_loss(scores, *masks, settings, teacher, reach)

    return loss


def _optimiser_step(state: TrainingState, rate: float) -> Tensor:
    """One step on the gradient of all ranks; returns its norm."""
    state.world.sum_gradients(state.retriever.parameters())
    settings = state.settings.optimiser
    return optimiser_step(state.retriever, state.optimiser, rate, settings, state.scaler)


def _mean(summaries: list[ScoreSummary]) -> ScoreSummary:
    values = [[getattr(each, field.name) for each in summaries] for field in fields(ScoreSummary)]
    return ScoreSummary(*(torch.stack(each).mean() for each in values))


def _report(
    state: TrainingState,
    summary: ScoreSummary,
    norm: Tensor,
    rate: float,
    seconds: float,
    rows: int,
) -> StepReport:
    """One transfer from the device for all numbers of a step."""
    levels = [getattr(summary, field.name).detach() for field in fields(ScoreSummary)]
    numbers = torch.stack([level.to(norm) for level in [*levels, norm]]).tolist()
    loss, *_, gradient_norm = numbers
    may_skip = state.scaler.is_enabled()
    if not math.isfinite(loss) or not (math.isfinite(gradient_norm) or may_skip):
        raise FloatingPointError(f"step {state.step}: loss {loss}, gradient norm {gradient_norm}")
    is_skipped = not math.isfinite(gradient_norm)
    if is_skipped:
        check_scale(state.scaler)
    return StepReport(
        state.step,
        *numbers,
        skipped=is_skipped,
        lr=rate,
        seconds=seconds,
        rows_per_second=rows / seconds,
    )


def _ahead(batches: Iterator[DrawnBatch], count: int) -> Iterator[DrawnBatch]:
    """So many batches, each made in a thread while the one before it is trained on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as pool:
        coming = pool.submit(next, batches) if count > 0 else None
        for remaining in range(count - 1, -1, -1):
            assert coming is not None
            drawn = coming.result()
            coming = pool.submit(next, batches) if remaining else None
            yield drawn
