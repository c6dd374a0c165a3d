"""`colfolio train`: a recipe to a run folder; or a run folder that goes on where it stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from colfolio.commands.console import console
from colfolio.commands.live import LiveTraining
from colfolio.commands.run_folder import RunFolder, TrainRecipe, recipe_of
from colfolio.config import load_settings
from colfolio.data.dataset import RetrievalDataset, load_dataset
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
    start_training,
    train,
)

_METRIC = "ndcg@5"


def train_command(
    recipe_path: Path, overrides: Sequence[str] = (), *, device: str | None = None
) -> None:
    """Train from a recipe; the model stands in `out/model` when all steps are done.

    Raises:
        ColfolioError: the recipe, the base or the dataset cannot be honoured.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    recipe = _anchored(load_settings(recipe_path, TrainRecipe, overrides))
    run = RunFolder(Path(recipe.out))
    run.check_free()
    splits = _splits(recipe)
    retriever = Retriever.from_pretrained(recipe.model, device=device)
    state = start_training(retriever, recipe.train)
    reports = train(state, splits.train)  # refuses what cannot be trained before a folder is made
    run.begin(recipe)
    # a run that is killed before its first step must not begin again from another base
    save_checkpoint(state, run.checkpoints, splits.train.fingerprint, recipe.checkpoint.keep)
    _run(reports, state, splits, recipe, run)


def resume_command(run_path: Path, *, device: str | None = None) -> None:
    """Go on with a run from its newest checkpoint, or from its base if it has none.

    Raises:
        ColfolioError: the folder holds no run, or its checkpoint or data are not the same any more.
    """
    recipe, run = recipe_of(run_path), RunFolder(run_path)
    splits = _splits(recipe)
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        retriever = Retriever.from_pretrained(recipe.model, device=device)
        state = start_training(retriever, recipe.train)
    else:
        state = load_checkpoint(newest, recipe.train, splits.train.fingerprint, device)
    run.rewind(state.step)
    _say(f"{run_path}: goes on after step {state.step} of {recipe.train.steps}")
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


def _splits(recipe: TrainRecipe) -> _Splits:
    train_split = load_dataset(recipe.dataset, recipe.split)
    held_out = recipe.validation.split
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
    with LiveTraining(console(), recipe.train.steps) as live, _stop_after_step() as stop:
        try:
            for report in reports:
                run.append("step", asdict(report))
                live.step(report)
                is_last = report.step == recipe.train.steps
                if splits.validation and (is_last or report.step % recipe.validation.every == 0):
                    _validate(state, splits.validation, run, live)
                if stop or is_last or report.step % recipe.checkpoint.every == 0:
                    save_checkpoint(state, run.checkpoints, fingerprint, keep)
                if stop:
                    _say(f"\nstopped after step {report.step}, saved in {run.checkpoints}")
                    _say(f"go on with: colfolio train --resume {run.path}")
                    raise KeyboardInterrupt
        except ColfolioError:
            save_checkpoint(state, run.checkpoints, fingerprint, keep)
            raise
    state.retriever.save_pretrained(run.model)
    _say(f"{run.model}: trained for {recipe.train.steps} steps")


def _validate(
    state: TrainingState, validation: RetrievalDataset, run: RunFolder, live: LiveTraining
) -> None:
    with autocast(state.settings.precision, state.retriever.device):
        value = quick_metrics(state.retriever, validation, [_METRIC])[_METRIC]
    run.append("evaluation", {"step": state.step, "split": validation.split, _METRIC: value})
    live.evaluation(state.step, value)


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
