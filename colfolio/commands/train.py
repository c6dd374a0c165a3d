"""`colfolio train`: a recipe to a run folder; or a run folder that goes on where it stopped.

In several ranks every one runs what stands here; the main one alone shows and writes. An error that
all ranks have is told by the main one. One that a rank has alone it tells with its number and ends,
exchanging nothing more; whoever waited for it says that another rank has stopped.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from colfolio.commands.check import first_checks, say_first
from colfolio.commands.console import console
from colfolio.commands.policy import check_policy
from colfolio.commands.ranks import ranks_to_start
from colfolio.commands.run_evidence import RunEvidence
from colfolio.commands.run_folder import (
    RunFolder,
    TrainRecipe,
    dataset_name,
    recipe_of,
    told_recipe,
)
from colfolio.commands.run_ledger import ledger_of, log_ledger, say_ledger
from colfolio.commands.run_log import RunLog
from colfolio.commands.run_report import examples_of, write_run_report
from colfolio.commands.splits import Splits, check_validation, load_splits, validate
from colfolio.commands.tensorboard import check_tensorboard
from colfolio.config import load_settings, naming_lines
from colfolio.diagnosis import check_reachable
from colfolio.distributed import SharedError, World, join_world, launch
from colfolio.errors import ColfolioError
from colfolio.models.generator import Generator
from colfolio.models.generator_files import refuse_generator
from colfolio.models.hub import locate
from colfolio.models.retriever import Retriever
from colfolio.training import (
    AnyReport,
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    start_training,
    train,
)
from colfolio.training.feature_cache import FeatureCache
from colfolio.training.loop import check_epochs
from colfolio.training.opening import bottom_opening

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
        say_ledger(ledger)
        say_first(checks)
    # a run that is killed before its first step must not begin again from another base
    save_checkpoint(state, run.checkpoints, splits.train.fingerprint, recipe.checkpoint.keep)
    _run(reports, state, splits, recipe, run)


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
    _run(train(state, splits.train), state, splits, recipe, run)


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


def _run(
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
        f"colfolio train --resume {run.path} train.memory.chunk_tokens=…"
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
