"""Folders of checkpoints, here or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from colfolio.errors import CheckpointError


def local_folder(
    path_or_id: str | Path, revision: str | None = None, *, with_weights: bool = True
) -> Path:
    """The folder of a checkpoint; a hub id is fetched, or found in the local cache.

    Args:
        with_weights: of a hub id; without, its JSON files alone are fetched.

    Raises:
        CheckpointError: it is neither a folder nor a hub id that can be reached.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder, and not a hub id of the form owner/name")
    files = ["*.json", "*.safetensors"] if with_weights else ["*.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: no folder of that name here, and the hub could not give it ({reason})"
        ) from None
