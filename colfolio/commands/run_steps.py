"""The steps of a run as the command line consumes them: shown, logged, evaluated and saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from colfolio.commands.console import console, program
from colfolio.commands.findings import say_outcome
from colfolio.commands.run_evidence import RunEvidence
from colfolio.commands.run_folder import RunFolder, TrainRecipe, dataset_name, told_recipe
from colfolio.commands.run_log import RunLog
from colfolio.commands.run_report import examples_of, write_run_report
from colfolio.commands.splits import Splits, validate
from colfolio.distributed import SharedError
from colfolio.errors import ColfolioError
from colfolio.training import AnyReport, TrainingState, save_checkpoint, save_model
from colfolio.training.feature_cache import FeatureCache
from colfolio.training.opening import bottom_opening


def run_steps(
    reports: Iterator[AnyReport],
    state: TrainingState,
    splits: Splits,
    recipe: TrainRecipe,
    run: RunFolder,
) -> None:
    """Consume the steps: show, log, evaluate and save; also when Ctrl-C or an error ends them."""
    save = partial(
        save_checkpoint, state, run.checkpoints, splits.train.fingerprint, recipe.checkpoint.keep
    )
    log = RunLog(run, recipe, console(), state.step) if state.world.is_main else None
    evidence = RunEvidence(run, recipe, state, splits)
    has_fault = False
    with (
        log or nullcontext(),
        _stop_after_step() as asked,
        _full_memory_told(recipe, run),
        _saved(state, save),
        evidence.fault_told(),
    ):
        evidence.begin()
        if log:
            log.look(state.step)
        for report in reports:
            if log:
                log.step(report)
                has_fault = has_fault or _say_fault(state.exact.cache)
            evidence.step(report)
            if log:
                log.look(report.step)
            is_last = report.step == recipe.train.steps
            if splits.validation and (is_last or report.step % recipe.validation.every == 0):
                values = validate(state, splits.validation)
                if log:
                    log.evaluation(report.step, splits.validation.dataset.split, values)
            stop = any(state.world.gather_counts(len(asked)))
            if stop or is_last or report.step % recipe.checkpoint.every == 0:
                save()
            if stop:
                _say_stopped(state, report, run)
                raise KeyboardInterrupt
    data = {f"{dataset_name(recipe)} {recipe.split}": splits.train.fingerprint}
    metrics = run.metrics() if state.world.is_main else None
    told = {"recipe": told_recipe(recipe), "data": data, "metrics": metrics}
    save_model(state, run.model, base=recipe.model, **told)
    validation = splits.validation and splits.validation.dataset
    examples = examples_of(state, validation)
    if log:
        write_run_report(run, recipe, validation, examples)
        _say_cache(state)
        _say(f"{run.model}: trained for {recipe.train.steps} steps")
        say_outcome(run)


@contextmanager
def _saved(state: TrainingState, save: Callable[..., Path]) -> Iterator[None]:
    """Save what was trained before an error ended it."""
    try:
        yield
    except SharedError:
        save()
        raise
    except ColfolioError:
        # the others may wait for this rank where they are, or be gone
        if state.world.is_main and not state.is_sharded:
            save(is_alone=True)
        raise


@contextmanager
def _full_memory_told(recipe: TrainRecipe, run: RunFolder) -> Iterator[None]:
    """Say what to do where the device is too small; nothing is saved: a step may be half done."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ColfolioError(_no_memory(recipe, run, error)) from None


def _no_memory(recipe: TrainRecipe, run: RunFolder, error: torch.OutOfMemoryError) -> str:
    memory = recipe.train.memory
    return (
        f"the device's memory is full, with chunk_tokens {memory.chunk_tokens} and activation_mb "
        f"{memory.activation_mb} ({str(error).splitlines()[0]}); set train.memory.chunk_tokens "
        "lower, which changes no gradient; colfolio plan says what fits. Go on with: "
        f"{program()} train --resume {run.path} train.memory.chunk_tokens=…"
    )


def _say_cache(state: TrainingState) -> None:
    """What keeping the output of frozen layers came to."""
    cache, opening = state.exact.cache, bottom_opening(state)
    if cache is None:
        return
    if opening is None:
        _say(f"features    {cache.entries} kept, read {cache.hits} times")
    else:
        label, step = opening
        _say(f"features    read {cache.hits} times, dropped when {label} opened at step {step}")
    _say_fault(cache)


def _say_fault(cache: FeatureCache | None) -> bool:
    """Say why features are no longer kept on disk, if so; returns whether."""
    fault = cache and cache.disk_fault
    if fault:
        _say(f"features    {fault}")
    return bool(fault)


def _say_stopped(state: TrainingState, report: AnyReport, run: RunFolder) -> None:
    if state.world.is_main:
        _say(f"\nstopped after step {report.step}, saved in {run.checkpoints}")
        _say(f"go on with: {program()} train --resume {run.path}")


def _say(text: str) -> None:
    console().print(text, markup=False)  # a folder's name may look like markup


@contextmanager
def _stop_after_step() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C; a second Ctrl-C stops at once."""
    asked: list[bool] = []

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
