"""The small files of a checkpoint folder, and a folder that appears only when it is whole."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PretrainedConfig

from colfolio.errors import CheckpointError
from colfolio.models.families import CONFIG_ERRORS, family_of

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
# In config.json of our own folders: without a contract beside it the folder is damaged.
CONTRACT_MARK = "colfolio_contract"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    return _read(path, dict)


def read_json_list(path: Path) -> list[Any]:
    """The list in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    return _read(path, list)


def write_json(values: Mapping[str, Any] | list[Any], path: Path) -> None:
    """Write values, names in order."""
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def load_config(folder: Path) -> PretrainedConfig:
    """The backbone's configuration in a folder."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, so this is no checkpoint")
    return backbone_config(read_json(path), str(path))


def backbone_config(values: Mapping[str, Any], origin: str) -> PretrainedConfig:
    """The configuration of a backbone of `families.py` that these values describe.

    Raises:
        CheckpointError: its family is none of the table, it has code of its own, or it cannot be.
    """
    refuse_code(values, origin)
    family = family_of(values.get("model_type"), origin)
    try:
        config = family.config.from_dict(
            {name: value for name, value in values.items() if name != CONTRACT_MARK}
        )
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{origin}: cannot be read: {error}") from None
    config.dtype = None
    return config


def refuse_code(values: Mapping[str, Any], origin: str) -> None:
    """Refuse a configuration that names code of its own, at whatever depth.

    Raises:
        CheckpointError: it does; nothing of that code was run.
    """
    for name, value in values.items():
        if name == "auto_map" or (name == "trust_remote_code" and value):
            raise CheckpointError(
                f"{origin}: has {name} {value!r}, so the model is of code that comes with it; such "
                "code is never run here. If its family is one of the known, remove the key"
            )
        if isinstance(value, Mapping):
            refuse_code(value, origin)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, by its `tokenizer.json`."""
    path = folder / TOKENIZER_FILE
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {TOKENIZER_FILE}") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder."""
    text = tokenizer.to_str(pretty=True)  # its own `save` raises bare Exception
    (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path, marks: tuple[str, ...] = (CONFIG_FILE,)) -> Iterator[Path]:
    """An empty folder to write into; it takes its name when all is written, or never.

    Args:
        marks: a folder that holds one of these files is replaced; another that is not empty is not.

    Raises:
        CheckpointError: the folder exists and holds something else than a checkpoint.
    """
    is_folder = folder.is_dir() or not folder.exists()
    is_free = is_folder and not (folder.exists() and any(folder.iterdir()))
    if not is_free and not any((folder / mark).exists() for mark in marks):
        raise CheckpointError(f"{folder}: exists and is no checkpoint; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        yield aside
        _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(path: Path, kind: type) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, kind):
        raise CheckpointError(
            f"{path}: cannot be read: must hold a {kind.__name__}, holds {type(values).__name__}"
        )
    return values


def _swap(aside: Path, folder: Path) -> None:
    """Put a finished folder in the place of another; at no moment is there none for long."""
    if folder.exists():
        old = aside.with_name(aside.name + ".old")
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)
