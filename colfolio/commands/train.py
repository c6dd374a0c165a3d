"""`colfolio train`: a recipe to a run folder; or a run folder that goes on where it stopped.

In several ranks every one runs what stands here; the main one alone shows and writes. An error that
all ranks have is told by the main one. One that a rank has alone it tells with its number and ends,
exchanging nothing more; whoever waited for it says that another rank has stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from colfolio.commands.check import first_checks, say_first
from colfolio.commands.console import console
from colfolio.commands.policy import check_policy
from colfolio.commands.ranks import ranks_to_start
from colfolio.commands.run_folder import RunFolder, TrainRecipe, recipe_of
from colfolio.commands.run_ledger import ledger_of, log_ledger, say_ledger
from colfolio.commands.run_steps import run_steps
from colfolio.commands.splits import Splits, check_validation, load_splits
from colfolio.commands.tensorboard import check_tensorboard
from colfolio.config import load_settings, naming_lines
from colfolio.diagnosis import check_reachable
from colfolio.diagnosis.preflight import Check
from colfolio.distributed import SharedError, World, join_world, launch
from colfolio.errors import ColfolioError
from colfolio.models.generator import Generator
from colfolio.models.generator_files import refuse_generator
from colfolio.models.hub import locate
from colfolio.models.retriever import Retriever
from colfolio.training import (
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    start_training,
    train,
)
from colfolio.training.loop import check_epochs

# what gloo says when a rank that it talks to is gone
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def train_command(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    ranks: int | None = None,
    unchecked: bool = False,
) -> int:
    """Train from a recipe; the model stands in `out/model` when all steps are done.

    Args:
        unchecked: go on although a check before the first step fails.
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
    _check_told(recipe)
    run.check_free()
    count = ranks_to_start(ranks, device)
    check_reachable(recipe.train, count)
    with naming_lines(recipe_path, "validation", overrides):
        check_validation(recipe)
    with naming_lines(recipe_path, "train", overrides):
        check_policy(recipe)
        if count > 1:
            options = [*_device_option(device), *(["--unchecked"] if unchecked else [])]
            return launch(["train", str(recipe_path), *overrides, *options], count)
        with join_world(device) as world, _told_once(world):
            _train(recipe, run, world, device, unchecked=unchecked)
    return 0


def resume_command(
    run_path: Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    ranks: int | None = None,
) -> int:
    """Go on with a run from its newest checkpoint, or from its base if it has none.

    The number of ranks may be another than before.

    Args:
        overrides: of settings that change no gradient, `train.memory` among them; the run keeps
            them.

    Returns:
        The exit code, as of `train_command`.

    Raises:
        ColfolioError: the folder holds no run, or its checkpoint or data are not the same any more,
            or another setting was to be changed.
    """
    recipe, run = recipe_of(run_path, overrides), RunFolder(run_path)
    _check_told(recipe)
    count = ranks_to_start(ranks, device)
    check_reachable(recipe.train, count)
    if count > 1:
        options = ["--resume", str(run_path), *_device_option(device)]
        return launch(["train", *overrides, *options], count)
    with join_world(device) as world, _told_once(world):
        _resume(recipe, run, world, device)
    return 0


def _check_told(recipe: TrainRecipe) -> None:
    if recipe.train.tensorboard:
        check_tensorboard()


def _device_option(device: str | None) -> list[str]:
    return [] if device is None else ["--device", device]


@contextmanager
def _told_once(world: World) -> Iterator[None]:
    """Let one rank tell an error that all have, and each its own by its number."""
    try:
        yield
    except SharedError:
        if world.is_main:
            raise
        raise SystemExit(1) from None
    except FloatingPointError:  # of the loss and gradient of all, which are the same on each
        if world.is_main:
            raise
        raise SystemExit(1) from None
    except ColfolioError as error:
        if world.size == 1:
            raise
        raise ColfolioError(f"rank {world.rank}: {error}") from error
    except RuntimeError as error:
        if world.size == 1 or not _is_lost_connection(error):
            raise
        raise ColfolioError(f"rank {world.rank}: another rank has stopped") from error


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether gloo or NCCL says so; gloo has no class of its own."""
    is_of_nccl = isinstance(error, dist.DistError)
    said = str(error)
    return any(words in said for words in _LOST) or (is_of_nccl and "remote process" in said)


def _train(
    recipe: TrainRecipe, run: RunFolder, world: World, device: str | None, *, unchecked: bool
) -> None:
    state, splits = _begin(recipe, run, world, device)
    with world.together():
        reports = train(state, splits.train)  # refuses before a folder is made
        ledger = ledger_of(state, splits)
        run.check_free()
    checks = first_checks(state, splits, ledger, recipe.model, unchecked=unchecked)
    if world.is_main:
        run.begin(recipe)
        log_ledger(run, 0, ledger)
        _log_checks(run, checks)
        say_ledger(ledger)
        say_first(checks)
    # a run that is killed before its first step must not begin again from another base
    save_checkpoint(state, run.checkpoints, splits.train.fingerprint, recipe.checkpoint.keep)
    run_steps(reports, state, splits, recipe, run)


def _log_checks(run: RunFolder, checks: Sequence[Check]) -> None:
    """Note what was asked before step 1, and what a run goes on with that failed."""
    told = [
        {"name": each.name, "passed": each.passed, "told": each.told, "cause": each.cause}
        for each in checks
    ]
    if told:
        run.append("checks", {"step": 0, "checks": told})


def _resume(recipe: TrainRecipe, run: RunFolder, world: World, device: str | None) -> None:
    newest = newest_checkpoint(run.checkpoints)
    world.same_everywhere(newest and newest.name, "newest checkpoint")
    state, splits = _begin(recipe, run, world, device, newest)
    is_done = state.step >= recipe.train.steps
    with world.together():
        ledger = None if is_done else ledger_of(state, splits)
    if world.is_main:
        run.keep(recipe)
        run.rewind(state.step)
        _say(f"{run.path}: goes on after step {state.step} of {recipe.train.steps}")
        if ledger:
            log_ledger(run, state.step, ledger)
            say_ledger(ledger)
    run_steps(train(state, splits.train), state, splits, recipe, run)


def _begin(
    recipe: TrainRecipe,
    run: RunFolder,
    world: World,
    device: str | None,
    checkpoint: Path | None = None,
) -> tuple[TrainingState, Splits]:
    """The state to go on from, of the base if there is no checkpoint; the same on all ranks."""
    world.same_everywhere(recipe.model_dump(), "recipe")
    with world.together():
        check_reachable(recipe.train, world.size)
        splits = load_splits(recipe)
        check_epochs(recipe.train, splits.train)
    fingerprint = splits.train.fingerprint
    world.same_everywhere(fingerprint, "training split")
    if checkpoint is not None:
        settings = recipe.train
        state = load_checkpoint(checkpoint, settings, fingerprint, device, world, run.features)
    else:
        with world.together():
            kind = Generator if recipe.train.objective == "generation" else Retriever
            if kind is Retriever:
                refuse_generator(locate(recipe.model, with_weights=False).folder)
            model = kind.from_pretrained(recipe.model, device=device)
        if world.size > 1:
            world.same_everywhere(model.fingerprint(), "base")
        with world.together():
            state = start_training(model, recipe.train, world, run.features)
    settled = {"precision": state.settings.precision, "attention": state.kernel}
    world.same_everywhere(settled, "precision and attention")
    return state, splits


def _anchored(recipe: TrainRecipe) -> TrainRecipe:
    """Paths made absolute, so that a run can be resumed from another folder."""
    paths = {
        name: str(Path(value).absolute())
        for name, value in (("model", recipe.model), ("dataset", recipe.dataset))
        if Path(value).exists()
    }
    return recipe.model_copy(update=paths)


def _say(text: str) -> None:
    console().print(text, markup=False)  # a folder's name may look like markup
