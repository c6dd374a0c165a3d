"""`colfolio check`: what a run would stumble over, asked of its recipe or of a model before it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.text import Text

from colfolio.commands.console import console, print_wrapped
from colfolio.commands.policy import check_policy
from colfolio.commands.run_folder import TrainRecipe
from colfolio.commands.run_ledger import ledger_of
from colfolio.commands.splits import Splits, load_splits
from colfolio.config import load_settings, naming_lines
from colfolio.data.conversations import ConversationDataset
from colfolio.data.dataset import RetrievalDataset
from colfolio.diagnosis import Ledger, TextLedger, check_reachable
from colfolio.diagnosis.preflight import (
    Check,
    check_first,
    check_model,
    check_run,
    failures,
    measure_run,
)
from colfolio.errors import ColfolioError, RecipeError
from colfolio.models.retriever import Retriever
from colfolio.training import TrainingState, start_training
from colfolio.training.opening import open_due_stages

_VERDICT, _MEASURED, _OF_RUN = 8, 10, 12  # columns, before what is told


def check_command(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    measure: bool = False,
) -> bool:
    """Print a line for each check of a recipe; whether all passed. No folder is made.

    Args:
        measure: once all have passed, say too what gradients ask for, on copies of the model.

    Raises:
        ColfolioError: the recipe, the base or the dataset cannot be honoured.
    """
    recipe = load_settings(recipe_path, TrainRecipe, overrides)
    if recipe.train.objective != "retrieval":
        raise RecipeError(
            f"{recipe_path}: colfolio check asks of a retriever's vectors and scores, and "
            f"train.objective is {recipe.train.objective}, which has none; train it, and look at "
            "its loss beside chance"
        )
    check_reachable(recipe.train, 1)
    with naming_lines(recipe_path, "train", overrides), tempfile.TemporaryDirectory() as features:
        check_policy(recipe)
        passed = say_checks(_checks(recipe, device, Path(features)))
        if passed and measure:
            _say_measured(recipe, device)
        return passed


def check_model_command(model: str, *, device: str | None = None) -> bool:
    """Print a line for each check of a model, of whichever library; whether all passed.

    Args:
        model: folder or hub id.

    Raises:
        ColfolioError: there is no such folder or hub id, or the device cannot be used.
    """
    return say_checks(check_model(model, device=device))


def say_checks(checks: Iterable[Check]) -> bool:
    """Print a line for each check as it is done, and one on all; whether all passed."""
    done: list[Check] = []
    for check in checks:
        _say(check)
        done.append(check)
    failed = sum(not check.passed for check in done)
    seconds = sum(check.seconds for check in done)
    told = f"{len(done) - failed} passed, {failed} failed, in {seconds:.1f} s"
    console().print(Text(told, style="red" if failed else "green"))
    return not failed


def first_checks(
    state: TrainingState,
    splits: Splits,
    ledger: Ledger | TextLedger,
    base: str,
    *,
    unchecked: bool,
) -> list[Check]:
    """The cheap checks of a run that begins; all ranks call it, and refuse alike.

    Args:
        ledger: of the run; with one of text nothing is checked.
        base: folder or hub id of the model.
        unchecked: go on although one fails.

    Raises:
        ColfolioError: one failed.
    """
    if not isinstance(ledger, Ledger):
        return []
    checks: list[Check] = []
    try:
        for check in check_first(state, _retrieval(splits.train), ledger, base):
            checks.append(check)  # those before an error count
    except (RecipeError, torch.OutOfMemoryError) as error:
        # no room for a chunk: the first step says what to do, and leaves a run that can go on
        if state.world.size > 1:
            raise
        told = f"after {len(checks)} checks, the others could not be made: {error}"
        _say_of_run("unchecked", told, "yellow")
    told = "; ".join(f"{check.name}: {check.told}" for check in failures(checks))
    with state.world.together():
        if told and not unchecked:
            raise ColfolioError(
                f"not begun, for a check before step 1 failed. {told}. colfolio check makes all "
                "checks of a recipe; --unchecked trains all the same"
            )
    return checks


def say_first(checks: Sequence[Check]) -> None:
    """Print in a line what was checked, and what a run goes on with that failed."""
    if not checks:
        return
    names = ", ".join(check.name for check in checks if check.passed)
    seconds = sum(check.seconds for check in checks)
    _say_of_run("checked", f"{names}, in {seconds:.1f} s")
    for check in failures(checks):
        told = f"goes on although this failed: {check.name}: {check.told}"
        _say_of_run("unchecked", told, "yellow")


def _checks(recipe: TrainRecipe, device: str | None, features: Path) -> Iterable[Check]:
    splits = load_splits(recipe)
    model = Retriever.from_pretrained(recipe.model, device=device)
    state = start_training(model, recipe.train, features_folder=features)
    open_due_stages(state, 0.0)
    held_out = _retrieval(splits.validation.dataset) if splits.validation else None
    base = str(Path(recipe.model).absolute()) if Path(recipe.model).exists() else recipe.model
    return check_run(
        state, _retrieval(splits.train), held_out, partial(_ledger, state, splits), base
    )


def _say_measured(recipe: TrainRecipe, device: str | None) -> None:
    model = Retriever.from_pretrained(recipe.model, device=device)
    for each in measure_run(model, recipe.train, _retrieval(load_splits(recipe).train)):
        told = f"{each.name}: {each.told}"
        print_wrapped(console(), told, indent=_MEASURED, label="measured")


def _ledger(state: TrainingState, splits: Splits) -> Ledger:
    ledger = ledger_of(state, splits)
    assert isinstance(ledger, Ledger)
    return ledger


def _retrieval(dataset: RetrievalDataset | ConversationDataset) -> RetrievalDataset:
    assert isinstance(dataset, RetrievalDataset)
    return dataset


def _say(check: Check) -> None:
    """Print the line of a check, its verdict before it."""
    verdict, colour = ("passed", "green") if check.passed else ("failed", "red")
    cause = f" [{check.cause}]" if check.cause and not check.passed else ""
    told = f"{check.name}: {check.told}{cause}"
    print_wrapped(console(), told, indent=_VERDICT, label=verdict, label_style=colour)


def _say_of_run(label: str, told: str, style: str = "") -> None:
    """Print a line of a run that begins, below the others' second column."""
    print_wrapped(console(), told, indent=_OF_RUN, label=label, style=style)
