"""`colfolio train`: a recipe to a run folder; or a run folder that goes on where it stopped.

In several ranks every one runs what stands here; the main one alone shows and writes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from colfolio.commands.console import console
from colfolio.commands.live import LiveTraining
from colfolio.commands.ranks import ranks_to_start
from colfolio.commands.run_folder import RunFolder, TrainRecipe, recipe_of
from colfolio.config import load_settings
from colfolio.data.dataset import RetrievalDataset, load_dataset
from colfolio.diagnosis import Ledger, check_reachable, ledger_lines, make_ledger
from colfolio.distributed import World, join_world, launch
from colfolio.errors import ColfolioError
from colfolio.evaluation import quick_metrics
from colfolio.models.precision import autocast
from colfolio.models.retriever import Retriever
from colfolio.training import (
    StepReport,
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    start_training,
    train,
)

_METRIC = "ndcg@5"


def train_command(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    ranks: int | None = None,
) -> int:
    """Train from a recipe; the model stands in `out/model` when all steps are done.

    Args:
        ranks: processes to train in on this host; None is one a GPU, or the world that a launcher
            made, of which this process is a rank.

    Returns:
        The exit code: of the ranks, if this process only started them.

    Raises:
        ColfolioError: the recipe, the base or the dataset cannot be honoured.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    recipe = _anchored(load_settings(recipe_path, TrainRecipe, overrides))
    run = RunFolder(Path(recipe.out))
    run.check_free()
    count = ranks_to_start(ranks, device)
    check_reachable(recipe.train, count)
    if count > 1:
        return launch(["train", str(recipe_path), *overrides, *_device_option(device)], count)
    with join_world(device) as world:
        _train(recipe, run, world, device)
    return 0


def resume_command(run_path: Path, *, device: str | None = None, ranks: int | None = None) -> int:
    """Go on with a run from its newest checkpoint, or from its base if it has none.

    The number of ranks may be another than before.

    Returns:
        The exit code, as of `train_command`.

    Raises:
        ColfolioError: the folder holds no run, or its checkpoint or data are not the same any more.
    """
    recipe, run = recipe_of(run_path), RunFolder(run_path)
    count = ranks_to_start(ranks, device)
    check_reachable(recipe.train, count)
    if count > 1:
        return launch(["train", "--resume", str(run_path), *_device_option(device)], count)
    with join_world(device) as world:
        _resume(recipe, run, world, device)
    return 0


def _device_option(device: str | None) -> list[str]:
    return [] if device is None else ["--device", device]


def _train(recipe: TrainRecipe, run: RunFolder, world: World, device: str | None) -> None:
    check_reachable(recipe.train, world.size)
    splits = _splits(recipe, world)
    retriever = Retriever.from_pretrained(recipe.model, device=device)
    state = start_training(retriever, recipe.train, world, run.features)
    reports = train(state, splits.train)  # refuses what cannot be trained before a folder is made
    ledger = _ledger(state, splits.train)
    world.barrier()  # all have seen that the folder is free
    if world.is_main:
        run.begin(recipe)
        run.append("ledger", {"step": 0} | asdict(ledger))
        _say_ledger(ledger)
    # a run that is killed before its first step must not begin again from another base
    save_checkpoint(state, run.checkpoints, splits.train.fingerprint, recipe.checkpoint.keep)
    _run(reports, state, splits, recipe, run)


def _resume(recipe: TrainRecipe, run: RunFolder, world: World, device: str | None) -> None:
    check_reachable(recipe.train, world.size)
    splits = _splits(recipe, world)
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        retriever = Retriever.from_pretrained(recipe.model, device=device)
        state = start_training(retriever, recipe.train, world, run.features)
    else:
        fingerprint = splits.train.fingerprint
        state = load_checkpoint(newest, recipe.train, fingerprint, device, world, run.features)
    ledger = _ledger(state, splits.train)
    if world.is_main:
        run.rewind(state.step)
        _say(f"{run.path}: goes on after step {state.step} of {recipe.train.steps}")
        _say_ledger(ledger)
    _run(train(state, splits.train), state, splits, recipe, run)


def _anchored(recipe: TrainRecipe) -> TrainRecipe:
    """Paths made absolute, so that a run can be resumed from another folder."""
    paths = {
        name: str(Path(value).absolute())
        for name, value in (("model", recipe.model), ("dataset", recipe.dataset))
        if Path(value).exists()
    }
    return recipe.model_copy(update=paths)


class _Splits(NamedTuple):
    train: RetrievalDataset
    validation: RetrievalDataset | None


def _splits(recipe: TrainRecipe, world: World) -> _Splits:
    train_split = load_dataset(recipe.dataset, recipe.split)
    held_out = recipe.validation.split
    world.same_everywhere(recipe.model_dump(), "recipe")
    world.same_everywhere(train_split.fingerprint, "training split")
    return _Splits(train_split, load_dataset(recipe.dataset, held_out) if held_out else None)


def _run(
    reports: Iterator[StepReport],
    state: TrainingState,
    splits: _Splits,
    recipe: TrainRecipe,
    run: RunFolder,
) -> None:
    """Consume the steps: show, log, evaluate and save; also when Ctrl-C or an error ends them."""
    fingerprint, keep = splits.train.fingerprint, recipe.checkpoint.keep
    shown = LiveTraining(console(), recipe.train.steps) if state.world.is_main else None
    with shown or nullcontext() as live, _stop_after_step() as asked:
        try:
            for report in reports:
                if live:
                    run.append("step", asdict(report))
                    live.step(report)
                is_last = report.step == recipe.train.steps
                if splits.validation and (is_last or report.step % recipe.validation.every == 0):
                    _validate(state, splits.validation, run, live)
                stop = any(state.world.gather_counts(len(asked)))
                if stop or is_last or report.step % recipe.checkpoint.every == 0:
                    save_checkpoint(state, run.checkpoints, fingerprint, keep)
                if stop:
                    _say_stopped(state, report, run)
                    raise KeyboardInterrupt
        except torch.OutOfMemoryError as error:
            raise ColfolioError(_no_memory(recipe, error)) from None
        except ColfolioError:
            if not state.is_sharded:  # else all ranks would have to be here
                save_checkpoint(state, run.checkpoints, fingerprint, keep)
            raise
    save_model(state, run.model)
    if live:
        _say(f"{run.model}: trained for {recipe.train.steps} steps")


def _no_memory(recipe: TrainRecipe, error: torch.OutOfMemoryError) -> str:
    memory = recipe.train.memory
    return (
        f"the device's memory is full, with chunk_tokens {memory.chunk_tokens} and activation_mb "
        f"{memory.activation_mb} ({str(error).splitlines()[0]}); set train.memory.chunk_tokens "
        "lower, which changes no gradient: colfolio plan says what fits"
    )


def _validate(
    state: TrainingState, validation: RetrievalDataset, run: RunFolder, live: LiveTraining | None
) -> None:
    """Every rank evaluates, because a sharded model runs on all or none."""
    with autocast(state.settings.precision, state.retriever.device):
        value = quick_metrics(state.retriever, validation, [_METRIC])[_METRIC]
    if live:
        run.append("evaluation", {"step": state.step, "split": validation.split, _METRIC: value})
        live.evaluation(state.step, value)


def _ledger(state: TrainingState, dataset: RetrievalDataset) -> Ledger:
    """What every rank counts, so that all of them refuse what cannot be trained."""
    return make_ledger(
        dataset,
        state.settings,
        state.world.size,
        state.retriever.collator.query_lengths,
        {"precision": state.settings.precision, "attention": state.kernel},
        position=state.position,
        step=state.step,
    )


def _say_ledger(ledger: Ledger) -> None:
    for line in ledger_lines(ledger):
        _say(line)


def _say_stopped(state: TrainingState, report: StepReport, run: RunFolder) -> None:
    if state.world.is_main:
        _say(f"\nstopped after step {report.step}, saved in {run.checkpoints}")
        _say(f"go on with: colfolio train --resume {run.path}")


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
