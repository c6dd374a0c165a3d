"""Tensors of a checkpoint folder: safetensors alone, read strictly."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from colfolio.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, sharded or not."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors file (pickled weights are not read)")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read, it may be cut short: {error}") from None
    return weights


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write tensors as one safetensors file, readable like any file of the user.

    Raises:
        CheckpointError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk is not an OSError here
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
    path.chmod(mode)  # safetensors lets nobody else read it
