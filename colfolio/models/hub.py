"""Folders of checkpoints, here or on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from colfolio.errors import CheckpointError

# What is not OSError or ValueError is httpx's, by the name under which the library imports it.
_HUB_ERRORS = (HTTPError, OSError, HFValidationError)
_TIMEOUT = 5.0  # seconds for an answer of the hub
_COMMIT = re.compile(r"[0-9a-f]{40}")
_JSON = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
# what a model's folder may hold besides; anything else does not leave the machine
_PUSHED = [*_JSON, *_WEIGHTS, "*.md", "*.txt"]
_MODEL_FILES = ("config.json", "adapter_config.json", "modules.json")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint lies, and where on the hub it came from.

    Args:
        folder: on this machine.
        hub_id: None for a folder of the user's own.
        commit: of the repository, in full; None without one.
    """

    folder: Path
    hub_id: str | None = None
    commit: str | None = None


def locate(
    path_or_id: str | Path, revision: str | None = None, *, with_weights: bool = True
) -> Location:
    """The folder of a checkpoint; a hub id is fetched, or found in the local cache.

    Args:
        revision: branch, tag or commit of a hub id.
        with_weights: of a hub id; without, its JSON files alone are fetched.

    Raises:
        CheckpointError: it is neither a folder nor a hub id that can be reached, or a revision was
            asked of a folder.
    """
    folder, name = Path(path_or_id), str(path_or_id)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{name}: is a folder here, which has no revision {revision!r}; leave the "
                "revision out, or give a hub id that is no folder's name"
            )
        return Location(folder)
    if folder.is_file():
        raise CheckpointError(f"{name}: is a file; give the folder of the checkpoint")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder, and not a hub id of the form owner/name")
    files = _JSON + _WEIGHTS if with_weights else _JSON
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=files, etag_timeout=_TIMEOUT
        )
    except _HUB_ERRORS as error:
        raise CheckpointError(
            f"{name}{f' at revision {revision}' if revision else ''}: no folder of that name "
            f"here, and the hub could not give it: {_reason(error)}"
        ) from None
    fetched = Path(found)
    return Location(fetched, name, fetched.name if _COMMIT.fullmatch(fetched.name) else None)


def local_folder(
    path_or_id: str | Path, revision: str | None = None, *, with_weights: bool = True
) -> Path:
    """The folder alone of what `locate` finds."""
    return locate(path_or_id, revision, with_weights=with_weights).folder


def check_push(repo_id: str, *, private: bool = False) -> None:
    """Refuse a push that could not succeed, before anything is made for it.

    Raises:
        CheckpointError: it is no hub id, nobody is logged in, the hub cannot be reached, or the
            repository is public where a private one is asked for.
    """
    _check_id(repo_id)
    try:
        if get_token() is None:
            raise LocalTokenNotFoundError("no token")
        if private:
            _check_private(repo_id)
        else:
            HfApi().repo_info(repo_id, timeout=_TIMEOUT)
    except _HUB_ERRORS as error:
        if _status(error) != 404:  # there is none yet: `push` makes it
            reason = _reason(error)
            raise CheckpointError(f"{repo_id}: nothing can be pushed there: {reason}") from None


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Make a repository on the hub, or take the one there is, and put a model's folder into it.

    Weights in safetensors, JSON, text and the model card go; whatever else lies there stays here.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder holds no model, the hub cannot be reached or does not let us
            write, or the repository is public where a private one was asked for.
    """
    if not any((folder / name).is_file() for name in _MODEL_FILES):
        raise CheckpointError(f"{folder}: holds no model, so nothing is pushed")
    _check_id(repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private:
            _check_private(repo_id)
        message = "Add model by Colfolio"
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=_PUSHED, commit_message=message
        )
    except _HUB_ERRORS as error:
        raise CheckpointError(f"{repo_id}: {folder} was not pushed: {_reason(error)}") from None
    return commit.commit_url


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r}: not a hub id: {_first_line(error)}") from None
    if repo_id.count("/") != 1:
        raise CheckpointError(f"{repo_id!r}: not a hub id of the form owner/name")


def _check_private(repo_id: str) -> None:
    if not HfApi().repo_info(repo_id, timeout=_TIMEOUT).private:
        raise CheckpointError(
            f"{repo_id}: is public, and was asked to be private; nothing was pushed. Make it "
            "private on its page, or choose another name"
        )


def _status(error: Exception) -> int | None:
    """Of the hub's answer; None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    answer = _status(error)
    is_unknown = isinstance(error, LocalTokenNotFoundError) or answer == 401
    is_missing = isinstance(error, RepositoryNotFoundError) or answer == 404
    is_told = isinstance(error, HFValidationError | HfHubHTTPError)
    said = _first_line(error)
    reasons = (
        (isinstance(error, GatedRepoError), "it is gated; accept its terms, then `hf auth login`"),
        (isinstance(error, RevisionNotFoundError), "it has no such revision"),
        (is_unknown, "it does not know who asks, or has nothing of that name; `hf auth login`"),
        (is_missing, "there is none of that name, or it is not yours to see"),
        (answer == 403, "your token has no right to do that; `hf auth login` with one that has"),
        (_is_offline(error), "offline mode is on (HF_HUB_OFFLINE); unset it, or give a folder"),
        (is_told, said),
    )
    unreachable = f"the hub cannot be reached ({said}); give a folder, or try again online"
    return next((reason for is_so, reason in reasons if is_so), unreachable)


def _is_offline(error: Exception) -> bool:
    causes = (error, error.__cause__)
    return any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)


def _first_line(error: Exception) -> str:
    told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    return next(iter(str(told or error).strip().splitlines()), type(error).__name__)
