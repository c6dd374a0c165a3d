"""The small files of a checkpoint folder, and a folder that appears only when it is whole."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
_MARK_FILES = ("colfolio.json", "colfolio_chat.json")
# Every file that is written into a folder of ours, in any format. A model card is none of them: it
# is where people write by hand, so a folder that has one is not replaced.
_WRITTEN = re.compile(
    r"colfolio(_chat)?\.json|(generation_)?config\.json|tokenizer(_config)?\.json"
    r"|chat_template\.jinja|((video_)?pre)?processor_config\.json"
    r"|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
    r"|adapter_config\.json|adapter_model\.safetensors"
    r"|modules\.json|config_sentence_transformers\.json|sentence_bert_config\.json"
    r"|1_Dense(/config\.json|/model\.safetensors)?"
    r"|(2_MultiVectorMask|3_Normalize)(/config\.json)?"
)
_DEEPEST = 100  # levels of JSON; far below what exhausts Python's stack, far above what is in use


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


def parse_json(
    text: str, make_object: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> Any:
    """The value of a JSON text.

    Args:
        make_object: of the pairs of each object; None takes a plain dict.

    Raises:
        ValueError: it is no JSON, or nested deeper than any file of a checkpoint.
    """
    deep = f"nested deeper than {_DEEPEST} levels"
    try:
        value = json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError(deep) from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return value
    raise ValueError(deep)


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

    A folder that is wholly ours is replaced: it has a contract, and no file but those that we
    write. Another that is not empty is left as it is.

    Args:
        folder: a link is followed, and stays.
        marks: what is replaced holds one of these files.

    Raises:
        CheckpointError: the folder exists and holds something else, or did so once all was
            written.
    """
    target = _target(folder)
    was_free = _is_free(target)
    if not was_free:
        _check_ours(target, marks)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        yield aside
        if was_free or _is_free(target):
            _take(target, aside)
        else:
            _check_ours(target, marks)  # again: much may have happened meanwhile
            replace_folder(target, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(folder: Path, aside: Path) -> None:
    """Rename a finished folder into the place of another, which goes once the new one stands.

    If that fails or is interrupted, the one that was there is there again.
    """
    before = aside.with_name(f"{aside.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(before)
        aside.rename(folder)
    finally:
        if before.exists() and not folder.exists():  # also after Ctrl-C
            before.rename(folder)
        shutil.rmtree(before, ignore_errors=True)


def _read(path: Path, kind: type) -> Any:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, kind):
        raise CheckpointError(
            f"{path}: cannot be read: must hold a {kind.__name__}, holds {type(values).__name__}"
        )
    return values


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _target(folder: Path) -> Path:
    """Where a folder is, without links, `.` and `..`."""
    try:
        target = folder.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"{folder}: leads nowhere: {error}") from None
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(
            f"{folder}: is a folder that this process works in, and would be replaced by another; "
            "give a new folder inside it, or go out of it"
        )
    return target


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _check_ours(folder: Path, marks: tuple[str, ...]) -> None:
    """Refuse to replace a folder of which we have not written every file."""
    is_known = any((folder / mark).is_file() for mark in marks)
    if not is_known or not _has_contract(folder):
        raise CheckpointError(
            f"{folder}: exists and is no checkpoint of Colfolio; choose another folder"
        )
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    foreign = [name for name in found if not _WRITTEN.fullmatch(name)]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise CheckpointError(
            f"{folder}: holds {', '.join(foreign[:5])}{more}, which saving did not write and would "
            "delete; choose another folder, or move that away"
        )


def _has_contract(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _MARK_FILES):
        return True
    try:
        return CONTRACT_MARK in read_json(folder / CONFIG_FILE)
    except CheckpointError:
        return False


def _take(folder: Path, aside: Path) -> None:
    """Rename a finished folder into a place that is free."""
    try:
        with suppress(FileNotFoundError):
            folder.rmdir()  # which fails unless it is empty
        aside.rename(folder)
    except OSError:
        if _is_free(folder):
            raise
        raise CheckpointError(
            f"{folder}: was free, and something was put there while this was written; choose "
            "another folder"
        ) from None
