"""All that a run needs to go on to the bit: weights, optimiser, place in the data, settings.

A checkpoint is a folder `step-000500` that is written aside and renamed, so one that has its name
is whole, whatever happened to the process that wrote it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colfolio.config import validated
from colfolio.data.sampler import SamplerPosition
from colfolio.distributed import World, gather_state, place_optimiser_state
from colfolio.errors import CheckpointError
from colfolio.models.retriever import Retriever
from colfolio.training.state import TrainingState, TrainSettings, start_training

MODEL_FOLDER = "model"
_OPTIMISER_FILE = "optimiser.pt"
_STATE_FILE = "state.json"
# settings that change no gradient, only what it costs: a run may go on with others
FREE_SETTINGS = ("memory", "features", "attention", "gradient_checkpointing", "parallel")
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    state: TrainingState,
    folder: Path,
    dataset_fingerprint: str,
    keep: int,
    *,
    is_alone: bool = False,
) -> Path:
    """Save a training state as `folder/step-N` and delete all but the newest `keep` checkpoints.

    Of several ranks all call it, and the main one writes; nothing in it tells how many there were.

    Args:
        dataset_fingerprint: of the training split; a resumed run must have the same.
        keep: how many checkpoints stay, at least 1.
        is_alone: the main rank calls it without the others, which may be gone; its model must be
            whole.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints stay as they are.
    """
    assert not (is_alone and state.is_sharded)
    final = folder / f"step-{state.step:06d}"
    weights = gather_state(state.retriever.weights())
    optimiser = gather_state(state.optimiser.state_dict())
    if state.world.is_main:
        values = {
            "step": state.step,
            "position": {"epoch": state.position.epoch, "index": state.position.index},
            "settings": state.settings.model_dump(mode="json"),
            "scaler": state.scaler.state_dict(),
            "dataset": dataset_fingerprint,
        }
        _write(state.retriever, final, weights, optimiser, values)
        for step, path in _checkpoints(folder)[:-keep]:
            if step != state.step:
                shutil.rmtree(path)
    if not is_alone:
        state.world.barrier()
    return final


def save_model(
    state: TrainingState,
    folder: Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Save the model alone, as `Retriever.save_pretrained` does; all ranks call it.

    Args:
        recipe, data, metrics: what the model's contract tells of its training; see `Contract`.

    Raises:
        CheckpointError: it cannot be written.
    """
    told = {"recipe": recipe, "data": dict(data or {}), "metrics": dict(metrics or {})}
    state.retriever.contract = state.retriever.contract.model_copy(update=told)
    weights = gather_state(state.retriever.weights())
    if state.world.is_main:
        state.retriever.save_pretrained(folder, weights)
    state.world.barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a folder, if there is any."""
    found = _checkpoints(folder)
    return found[-1][1] if found else None


def load_checkpoint(
    path: Path,
    settings: TrainSettings,
    dataset_fingerprint: str,
    device: str | torch.device | None = None,
    world: World | None = None,
    features_folder: Path | None = None,
) -> TrainingState:
    """The training state saved in a checkpoint, ready to go on.

    Args:
        settings: of the run that goes on; they must be those of the checkpoint, which also says
            what they leave to the machine. Those that change no gradient may be others: memory,
            features, attention, gradient_checkpointing, parallel.
        dataset_fingerprint: of the training split, likewise.
        device: where to train; None takes a GPU if there is one.
        world: the ranks that go on; they may be more or fewer than those that saved.
        features_folder: as of `start_training`.

    Raises:
        CheckpointError: a file is missing or damaged, or settings or data are not the same.
    """
    world = world or World()
    with world.together():
        saved = _read_state(path)
        _check_same(path, saved, settings, dataset_fingerprint)
        retriever = Retriever.from_pretrained(path / MODEL_FOLDER, device=device)
    if world.size > 1:
        found = (saved.step, saved.settings.model_dump(), retriever.fingerprint())
        world.same_everywhere(found, "checkpoint")
    with world.together():
        free = {name: getattr(settings, name) for name in FREE_SETTINGS}
        state = start_training(
            retriever, saved.settings.model_copy(update=free), world, features_folder
        )
        _place(path / _OPTIMISER_FILE, state, saved.scaler)
        state.step, state.position = saved.step, saved.position
    return state


@dataclass(frozen=True, slots=True)
class _Saved:
    """What stands in a checkpoint beside weights and optimiser."""

    step: int
    position: SamplerPosition
    settings: TrainSettings
    scaler: dict[str, Any]
    dataset: str


def _read_state(path: Path) -> _Saved:
    try:
        values = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
        return _Saved(
            int(values["step"]),
            SamplerPosition(**values["position"]),
            validated(values["settings"], TrainSettings, str(path / _STATE_FILE)),
            values["scaler"],
            values["dataset"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be resumed from: {error}") from None


def _place(path: Path, state: TrainingState, scaler: dict[str, Any]) -> None:
    """Put the optimiser's and the scaler's state back."""
    optimiser = _read_optimiser(path)
    try:
        state.optimiser.load_state_dict(place_optimiser_state(state.optimiser, optimiser))
        state.scaler.load_state_dict(scaler)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is of another model: {error}") from None


def _write(
    retriever: Retriever,
    final: Path,
    weights: dict[str, Tensor],
    optimiser: dict[str, Any],
    values: dict[str, Any],
) -> None:
    """Write a checkpoint aside and rename it into place."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        retriever.save_pretrained(aside / MODEL_FOLDER, weights)
        _write_optimiser(optimiser, aside / _OPTIMISER_FILE)
        text = json.dumps(values, indent=2) + "\n"
        (aside / _STATE_FILE).write_text(text, encoding="utf-8")
        _replace(final, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(final: Path, aside: Path) -> None:
    """Rename a folder into place; the one that was there goes once the new one stands."""
    before = final.with_name(f".{final.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    try:
        if final.exists():
            final.rename(before)
        aside.rename(final)
    finally:
        if before.exists() and not final.exists():  # also after Ctrl-C
            before.rename(final)
        shutil.rmtree(before, ignore_errors=True)


def _write_optimiser(optimiser: dict[str, Any], path: Path) -> None:
    try:
        torch.save(optimiser, path)
    except RuntimeError as error:  # a full disk is not an OSError here
        raise CheckpointError(
            f"{path}: cannot be written, is the disk full? ({error}); earlier checkpoints stay"
        ) from None


def _read_optimiser(path: Path) -> dict[str, Any]:
    """Read once the optimiser is built: torch must know the classes of its state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be resumed from: {error}") from None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named)


def _check_same(path: Path, saved: _Saved, settings: TrainSettings, dataset: str) -> None:
    before, now = saved.settings.model_dump(), settings.model_dump()
    left_open = [("precision", "auto"), ("threads", None)]
    changed = [
        f"{key}: {before[key]} then, {now[key]} now"
        for key in before
        if before[key] != now[key] and key not in FREE_SETTINGS and (key, now[key]) not in left_open
    ]
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with other settings ({'; '.join(changed)}); "
            "resume with the same ones, or start a new run"
        )
    if saved.dataset != dataset:
        raise CheckpointError(
            f"{path}: was trained on other data (fingerprint {saved.dataset[:12]}, now "
            f"{dataset[:12]}); resume needs the same training split"
        )
