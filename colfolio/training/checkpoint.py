"""All that a run needs to go on to the bit: weights, optimiser, place in the data, settings.

A checkpoint is a folder `step-000500` that is written aside and renamed, so one that has its name
is whole, whatever happened to the process that wrote it.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colfolio.config import validated
from colfolio.data.sampler import SamplerPosition
from colfolio.distributed import World, gather_state, place_optimiser_state
from colfolio.errors import CheckpointError
from colfolio.models.adapters import LoraPlan, adapter_in, put_adapter
from colfolio.models.files import parse_json, replace_folder
from colfolio.models.generator import Generator
from colfolio.models.retriever import Retriever
from colfolio.models.weights import listed, read_tensors, write_weights
from colfolio.training.optim import ParameterGroup
from colfolio.training.start import assembled
from colfolio.training.state import TrainingState, TrainSettings
from colfolio.training.thaw_signals import Watch

MODEL_FOLDER = "model"
_ADAPTER_FILE = "adapter.safetensors"
_OPTIMISER_FILE = "optimiser.pt"
_STATE_FILE = "state.json"
# settings that change no gradient, only what it costs: a run may go on with others
FREE_SETTINGS = (
    "memory",
    "features",
    "attention",
    "gradient_checkpointing",
    "parallel",
    "tensorboard",
)
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
    adapter = adapter_in(state.model)
    weights = gather_state(state.model.weights())
    adapter_weights = gather_state(adapter[1]) if adapter else None
    optimiser = gather_state(state.optimiser.state_dict())
    if state.world.is_main:
        values = _values(state, adapter and adapter[0]) | {"dataset": dataset_fingerprint}
        _write(state.model, final, weights, adapter_weights, optimiser, values)
        for step, path in _checkpoints(folder)[:-keep]:
            if step != state.step:
                shutil.rmtree(path)
    if not is_alone:
        state.world.barrier()
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
    world: World | None = None,
    features_folder: Path | None = None,
) -> TrainingState:
    """The training state saved in a checkpoint, ready to go on.

    Args:
        settings: of the run that goes on; they must be those of the checkpoint, which also says
            what they leave to the machine. Those that change no gradient may be others: memory,
            features, attention, gradient_checkpointing, parallel, tensorboard.
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
        kind = Generator if settings.objective == "generation" else Retriever
        model = kind.from_pretrained(path / MODEL_FOLDER, device=device)
        _restore_parts(path, model, saved)
    if world.size > 1:
        found = (saved.step, saved.settings.model_dump(), model.fingerprint())
        world.same_everywhere(found, "checkpoint")
    with world.together():
        free = {name: getattr(settings, name) for name in FREE_SETTINGS}
        settings = saved.settings.model_copy(update=free)
        state = assembled(model, settings, world, features_folder, saved.groups, saved.opened)
        _place(path / _OPTIMISER_FILE, state, saved.scaler)
        state.step, state.position = saved.step, saved.position
        state.watch, state.base_hash = saved.watch, saved.base_hash
    return state


@dataclass(frozen=True, slots=True)
class _Saved:
    """What stands in a checkpoint beside weights and optimiser."""

    step: int
    position: SamplerPosition
    settings: TrainSettings
    scaler: dict[str, Any]
    dataset: str
    groups: list[ParameterGroup]
    opened: list[int]
    watch: Watch
    adapter: LoraPlan | None
    base_hash: str


def _values(state: TrainingState, adapter: LoraPlan | None) -> dict[str, Any]:
    """What a run is at, beside its tensors."""
    return {
        "step": state.step,
        "position": asdict(state.position),
        "settings": state.settings.model_dump(mode="json"),
        "scaler": state.scaler.state_dict(),
        "groups": [asdict(group) for group in state.groups],
        "opened": state.opened,
        "watch": asdict(state.watch),
        "adapter": adapter and asdict(adapter),
        "base_hash": state.base_hash,
    }


def _read_state(path: Path) -> _Saved:
    try:
        values = parse_json((path / _STATE_FILE).read_text(encoding="utf-8"))
        groups = [each | {"names": tuple(each["names"])} for each in values["groups"]]
        return _Saved(
            int(values["step"]),
            SamplerPosition(**values["position"]),
            validated(values["settings"], TrainSettings, str(path / _STATE_FILE)),
            values["scaler"],
            values["dataset"],
            [ParameterGroup(**group) for group in groups],
            values["opened"],
            _watch(values["watch"]),
            LoraPlan(**values["adapter"]) if values["adapter"] else None,
            values["base_hash"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be resumed from: {error}") from None


def _watch(values: dict[str, Any]) -> Watch:
    """What later stages go by; windows that were judged by an earlier rule are begun anew."""
    return Watch(**values) if "means" in values else Watch(at_chance=values["at_chance"])


def _restore_parts(path: Path, model: Retriever | Generator, saved: _Saved) -> None:
    """Put the adapter back that was apart, and let train what trained."""
    if saved.adapter is not None:
        put_adapter(model, saved.adapter, read_tensors(path / _ADAPTER_FILE), str(path))
    trained = {name for group in saved.groups for name in group.names}
    parameters = dict(model.named_parameters())
    unknown = sorted(trained - parameters.keys())
    if unknown:
        raise CheckpointError(f"{path}: trains what its model does not have: {listed(unknown)}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)


def _place(path: Path, state: TrainingState, scaler: dict[str, Any]) -> None:
    """Put the optimiser's and the scaler's state back."""
    optimiser = _read_optimiser(path)
    try:
        state.optimiser.load_state_dict(place_optimiser_state(state.optimiser, optimiser))
        state.scaler.load_state_dict(scaler)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is of another model: {error}") from None


def _write(
    model: Retriever | Generator,
    final: Path,
    weights: dict[str, Tensor],
    adapter: dict[str, Tensor] | None,
    optimiser: dict[str, Any],
    values: dict[str, Any],
) -> None:
    """Write a checkpoint aside and rename it into place."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside / MODEL_FOLDER, weights)
        if adapter is not None:
            own = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
            write_weights(own, aside / _ADAPTER_FILE)
        _write_optimiser(optimiser, aside / _OPTIMISER_FILE)
        text = json.dumps(values, indent=2) + "\n"
        (aside / _STATE_FILE).write_text(text, encoding="utf-8")
        replace_folder(final, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
