"""The seal of a checkpoint folder: hashes of its files and fields, kept when it is saved.

It tells of edits by hand and of damage, not of forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from colfolio.config import Settings
from colfolio.errors import CheckpointError
from colfolio.models.files import CONFIG_FILE, TOKENIZER_FILE

_FILES = (CONFIG_FILE, TOKENIZER_FILE)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of configuration and tokenizer, as far as they are in a folder."""
    return {name: _hash_file(folder / name) for name in _FILES if (folder / name).is_file()}


def check_files(folder: Path, promised: Mapping[str, str], contract_file: str) -> None:
    """Refuse a folder whose configuration or tokenizer is not the one that was saved.

    Args:
        promised: what `file_hashes` gave; a file that it does not name is not looked at.

    Raises:
        CheckpointError: one was changed, or is missing.
    """
    for name in _FILES:
        _check_file(folder / name, promised.get(name), contract_file)


def seal_of(contract: Settings) -> dict[str, str]:
    """A digest of each field that was set; fields that a later version adds are not."""
    values = contract.model_dump(mode="json", exclude={"seal"}, exclude_unset=True)
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for name, value in values.items()
    }


def check_seal(
    contract: Settings, seal: Mapping[str, str], contract_file: str, origin: str, *, has_hash: bool
) -> None:
    """Refuse a contract that is not the one that was saved.

    Args:
        seal: what `seal_of` gave; empty where a folder was never sealed.
        has_hash: the contract names the hash of weights, which it has only with a seal.

    Raises:
        CheckpointError: a field was changed since, or the seal was taken away.
    """
    if has_hash and not seal:
        raise CheckpointError(
            f"{origin}: {contract_file} has a weights_hash and no seal, with which it was saved, "
            "so it was changed since; take the file as it was"
        )
    found = seal_of(contract)
    names = sorted({*found, *seal})
    changed = [name for name in names if found.get(name) != seal.get(name)]
    if seal and changed:
        told = ", ".join(f"{name} (now {getattr(contract, name, None)!r})" for name in changed)
        raise CheckpointError(
            f"{origin}: {contract_file} was changed after it was saved: {told}; take the file as "
            "it was, or set the model's `contract` and save the model anew"
        )


def check_hash(promised: str, found: str, field: str, origin: str) -> None:
    """Refuse weights that have not the hash that a field of the contract says.

    Raises:
        CheckpointError: names both.
    """
    if found != promised:
        raise CheckpointError(
            f"{origin}: the weights are not those that were saved: {field} is {promised}, but "
            f"they have {found}; copy the folder again"
        )


def _check_file(path: Path, promised: str | None, contract_file: str) -> None:
    if promised is None:
        return
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name}, which {contract_file} names")
    found = _hash_file(path)
    if found != promised:
        raise CheckpointError(
            f"{path}: was changed after it was saved: {contract_file} says SHA-256 {promised}, it "
            f"has {found}; take the file as it was"
        )


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
