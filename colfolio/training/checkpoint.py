"""All that a run needs to go on to the bit: weights, optimiser, place in the data, settings.

A checkpoint is a folder `step-000500` that is written aside and renamed, so one that has its name
is whole, whatever happened to the process that wrote it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch

from colfolio.config import validated
from colfolio.data.sampler import SamplerPosition
from colfolio.errors import CheckpointError
from colfolio.models.retriever import Retriever
from colfolio.training.loop import TrainingState, TrainSettings, start_training

MODEL_FOLDER = "model"
_OPTIMISER_FILE = "optimiser.pt"
_STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    state: TrainingState, folder: Path, dataset_fingerprint: str, keep: int
) -> Path:
    """Save a training state as `folder/step-N` and delete all but the newest `keep` checkpoints.

    Args:
        dataset_fingerprint: of the training split; a resumed run must have the same.
        keep: how many checkpoints stay, at least 1.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:06d}"
    aside = folder / f".{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        state.retriever.save_pretrained(aside / MODEL_FOLDER)
        _write_optimiser(state, aside / _OPTIMISER_FILE)
        values = {
            "step": state.step,
            "position": {"epoch": state.position.epoch, "index": state.position.index},
            "settings": state.settings.model_dump(mode="json"),
            "dataset": dataset_fingerprint,
        }
        (aside / _STATE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for step, path in _checkpoints(folder)[:-keep]:
        if step != state.step:
            shutil.rmtree(path)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a folder, if there is any."""
    found = _checkpoints(folder)
    return found[-1][1] if found else None


def load_checkpoint(
    path: Path,
    settings: TrainSettings,
    dataset_fingerprint: str,
    device: str | torch.device | None = None,
) -> TrainingState:
    """The training state saved in a checkpoint, ready to go on.

    Args:
        settings: of the run that goes on; they must be those of the checkpoint, which also says
            what they leave to the machine.
        dataset_fingerprint: of the training split, likewise.
        device: where to train; None takes a GPU if there is one.

    Raises:
        CheckpointError: a file is missing or damaged, or settings or data are not the same.
    """
    try:
        values = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
        position = SamplerPosition(**values["position"])
        step, dataset = int(values["step"]), values["dataset"]
        saved = validated(values["settings"], TrainSettings, str(path / _STATE_FILE))
        optimiser = torch.load(path / _OPTIMISER_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be resumed from: {error}") from None
    _check_same(path, saved, settings)
    if dataset != dataset_fingerprint:
        raise CheckpointError(
            f"{path}: was trained on other data (fingerprint {dataset[:12]}, now "
            f"{dataset_fingerprint[:12]}); resume needs the same training split"
        )
    state = start_training(Retriever.from_pretrained(path / MODEL_FOLDER, device=device), saved)
    try:
        state.optimiser.load_state_dict(optimiser)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path / _OPTIMISER_FILE}: is of another model: {error}") from None
    state.step, state.position = step, position
    return state


def _write_optimiser(state: TrainingState, path: Path) -> None:
    try:
        torch.save(state.optimiser.state_dict(), path)
    except RuntimeError as error:  # a full disk is not an OSError here
        raise CheckpointError(
            f"{path}: cannot be written, is the disk full? ({error}); earlier checkpoints stay"
        ) from None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named)


def _check_same(path: Path, saved: TrainSettings, settings: TrainSettings) -> None:
    before, now = saved.model_dump(), settings.model_dump()
    left_open = [("precision", "auto"), ("threads", None)]
    changed = [
        f"{key}: {before[key]} then, {now[key]} now"
        for key in before
        if before[key] != now[key] and (key, now[key]) not in left_open
    ]
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with other settings ({'; '.join(changed)}); "
            "resume with the same ones, or start a new run"
        )
