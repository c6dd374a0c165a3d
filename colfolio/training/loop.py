"""One training step after another, as a generator; its consumer prints, evaluates and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import ContrastiveBatch
from colfolio.data.contrastive import BatchSettings, BatchSource, DrawnBatch
from colfolio.data.conversation_batches import ConversationSource
from colfolio.data.conversations import ConversationDataset
from colfolio.data.dataset import RetrievalDataset
from colfolio.training.generation import TextSummary
from colfolio.training.losses import ScoreSummary, check_masks
from colfolio.training.opening import open_due_stages
from colfolio.training.optim import check_scale, learning_rates, optimiser_step
from colfolio.training.part_norms import PartNorms, trained_parts
from colfolio.training.retrieval_objective import retrieval_backward, retrieval_source
from colfolio.training.state import TrainingState, TrainSettings
from colfolio.training.step_report import GenerationReport, StepReport
from colfolio.training.text_objective import text_backward, text_source
from colfolio.training.thaw_schedule import check_schedule, most_windows

_Drawn = TypeVar("_Drawn")


def train(
    state: TrainingState, dataset: RetrievalDataset | ConversationDataset
) -> Iterator[StepReport | GenerationReport]:
    """Train until the settings' number of steps; between two reports the state is whole.

    Args:
        dataset: conversations for the objective `generation`, queries and pages for `retrieval`.

    Raises:
        DatasetError: at once, if the split has fewer queries than a batch has rows; later, if a
            batch has a query without a positive or without a negative.
        RecipeError: at once, if a stage of `thaw` opens at an epoch that the run does not reach.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    settings = state.settings
    check_epochs(settings, dataset)
    an_epoch = _batches_an_epoch(dataset, settings.batch)
    if isinstance(dataset, ConversationDataset):
        return _steps(state, text_source(state, dataset), an_epoch)
    return _steps(state, retrieval_source(state, dataset), an_epoch)


def check_epochs(settings: TrainSettings, dataset: RetrievalDataset | ConversationDataset) -> None:
    """Refuse a stage that opens at an epoch which a run on these data does not reach.

    Raises:
        RecipeError: names the stage.
    """
    an_epoch = _batches_an_epoch(dataset, settings.batch) / settings.accumulation
    check_schedule(settings.thaw, settings.thaw_window, settings.steps, an_epoch)


def _batches_an_epoch(
    dataset: RetrievalDataset | ConversationDataset, settings: BatchSettings
) -> int:
    """Batches of an epoch of the sampler, on average and rounded down; at least 1."""
    if isinstance(dataset, ConversationDataset):
        rows = float(len(dataset))
    else:
        rows = sum(settings.kind_weights.get(query.kind, 1.0) for query in dataset.queries)
    return max(1, int(rows) // settings.rows)


def _steps(
    state: TrainingState, source: BatchSource | ConversationSource, an_epoch: int
) -> Iterator[StepReport | GenerationReport]:
    settings = state.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    begin = time.perf_counter()
    num_batches = (settings.steps - state.step) * settings.accumulation
    coming = _ahead(source.batches(state.position), num_batches)
    parts, windows = _part_norms(state), most_windows(settings.thaw)
    while drawn := _drawn(state, coming):
        opened = open_due_stages(state, state.position.epoch + state.position.index / an_epoch)
        parts = _part_norms(state) if opened else parts
        rates = learning_rates(state.optimiser, state.step, settings.steps, settings.optimiser)
        summary, rows = _gradient(state, source, drawn)
        norms = _optimiser_step(state, parts, rates)
        state.step += 1
        state.position = drawn[-1].after
        report = _report(state, summary, parts, norms, begin, rows, opened)
        if isinstance(report, StepReport):
            state.watch.see(report, settings.thaw_window, windows)
        yield report
        begin = time.perf_counter()


def _drawn(state: TrainingState, coming: Iterator[_Drawn]) -> list[_Drawn]:
    """This rank's shares of a step; what one rank cannot read or collate, all ranks refuse."""
    drawn: list[_Drawn] = []
    with state.world.together():
        drawn += islice(coming, state.settings.accumulation)
    return drawn


def _gradient(
    state: TrainingState, source: BatchSource | ConversationSource, drawn: list[Any]
) -> tuple[ScoreSummary | TextSummary, int]:
    """Add the gradient of a step's shares; what they say, and how many rows all ranks had."""
    if isinstance(source, ConversationSource):
        batches = [each.batch for each in drawn]
        return text_backward(state, batches), state.settings.batch.rows * len(batches)
    batches = _of_all_ranks(state, source, drawn)
    return retrieval_backward(state, batches), sum(len(batch.positives) for batch in batches)


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


def _part_norms(state: TrainingState) -> PartNorms:
    """Measures the parts that train now."""
    parts = trained_parts(state.model)
    return PartNorms(parts, state.world if state.is_sharded else None)


def _optimiser_step(
    state: TrainingState, parts: PartNorms, rates: Sequence[float]
) -> Float[Tensor, " norms"]:
    """One step on the gradient of all ranks; returns its norm, then what each part measured."""
    state.world.sum_gradients(state.model.parameters())
    before = parts.before_step(state.scaler.scale(torch.ones((), device=state.model.device)))
    settings = state.settings.optimiser
    norm = optimiser_step(state.model, state.optimiser, rates, settings, state.scaler)
    return torch.cat([norm[None], parts.after_step(before).flatten().to(norm)])


def _report(
    state: TrainingState,
    summary: ScoreSummary | TextSummary,
    parts: PartNorms,
    norms: Float[Tensor, " norms"],
    begin: float,
    rows: int,
    opened: list[str],
) -> StepReport | GenerationReport:
    """One transfer from the device for all numbers of a step, which waits until it is done."""
    levels = torch.stack([getattr(summary, field.name).detach() for field in fields(summary)])
    numbers = torch.cat([levels.to(norms), norms]).tolist()
    seconds = time.perf_counter() - begin
    numbers, of_parts = numbers[: len(levels) + 1], numbers[len(levels) + 1 :]
    loss, *_, gradient_norm = numbers
    may_skip = state.scaler.is_enabled()
    if not math.isfinite(loss) or not (math.isfinite(gradient_norm) or may_skip):
        raise FloatingPointError(f"step {state.step}: loss {loss}, gradient norm {gradient_norm}")
    is_skipped = not math.isfinite(gradient_norm)
    if is_skipped:
        check_scale(state.scaler)
    shared: dict[str, Any] = {
        "skipped": is_skipped,
        "lr": max(float(group["lr"]) for group in state.optimiser.param_groups),
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "parts": parts.reports(of_parts, state.optimiser),
        "opened": opened,
    }
    if isinstance(summary, ScoreSummary):
        return StepReport(state.step, *numbers, **shared)
    return GenerationReport(state.step, *numbers, **shared)


def _ahead(batches: Iterator[_Drawn], count: int) -> Iterator[_Drawn]:
    """So many batches, each made in a thread while the one before it is trained on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as pool:
        coming = pool.submit(next, batches) if count > 0 else None
        for remaining in range(count - 1, -1, -1):
            assert coming is not None
            drawn = coming.result()
            coming = pool.submit(next, batches) if remaining else None
            yield drawn
