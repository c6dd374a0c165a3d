"""Tensors of a checkpoint folder: safetensors alone, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from colfolio.errors import CheckpointError, NotFiniteError
from colfolio.models.files import parse_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHOWN = 20


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: of its one safetensors file, or of the shards that its index names.

    Raises:
        CheckpointError: weights are pickled, damaged, of another dtype than floating point, not
            finite, outside the folder, or not exactly those that the index tells.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX_FILE).exists():
        if files != [WEIGHTS_FILE]:
            raise CheckpointError(_without_weights(folder, files))
        return read_tensors(folder / WEIGHTS_FILE)
    index = _read_index(folder / INDEX_FILE)
    stray = sorted(set(files) - set(index.values()))
    if stray:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: does not name {listed(stray)}, which lies beside it; remove "
            "the one or the other"
        )
    weights: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        shard = read_tensors(folder / name)
        _check_shard(shard, {key for key in index if index[key] == name}, folder / name)
        weights |= shard
    return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in their dtypes.

    Raises:
        CheckpointError: it is missing, damaged, no safetensors file, or a link out of its folder; a
            tensor is not of floating point, or holds what is not a finite number.
    """
    _check_place(path)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = f"cannot be read, it may be cut short: {error}"
        if path.is_file() and _is_pickled(path):
            reason = f"is {_PICKLE}"
        raise CheckpointError(f"{path}: {reason}") from None
    wrong = [f"{name} ({w.dtype})" for name, w in weights.items() if w.dtype not in _DTYPES]
    if wrong:
        raise CheckpointError(
            f"{path}: weights are float32, bfloat16, float16 or float64, but not {listed(wrong)}; "
            "quantised weights are not read"
        )
    endless = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    if endless:
        raise NotFiniteError(f"{path}: NaN or infinite numbers in {listed(endless)}")
    return weights


def check_dtypes(weights: Mapping[str, Tensor], projection: str, origin: str) -> None:
    """Refuse a backbone of several dtypes; the projection may be in float32 above any of them.

    Args:
        projection: what the names of its tensors begin with.

    Raises:
        CheckpointError: names tensors of the rarer dtypes.
    """
    dtypes = {
        name: tensor.dtype for name, tensor in weights.items() if not name.startswith(projection)
    }
    counts = sorted(set(dtypes.values()), key=list(dtypes.values()).count)
    own = {weights[name].dtype for name in weights if name.startswith(projection)}
    rare = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype != counts[-1]]
    if rare:
        raise CheckpointError(
            f"{origin}: a backbone is of one dtype, here {counts[-1]}, but not {listed(rare)}"
        )
    if len(own) > 1 or not own <= {torch.float32, *counts}:
        raise CheckpointError(
            f"{origin}: the projection ({projection}*) is of one dtype, {counts[-1]} as the "
            f"backbone or float32, but here {listed(sorted(map(str, own)))}"
        )


def write_weights(weights: dict[str, Tensor], path: Path, max_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as one safetensors file, or above a size as shards and an index beside it.

    Args:
        path: of the one file; shards are named after it.
        max_bytes: of a file; a tensor that is larger has one of its own.

    Raises:
        CheckpointError: it cannot be written.
    """
    shards = _shards(weights, max_bytes)
    if len(shards) == 1:
        _write_file(weights, path)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        _write_file({key: weights[key] for key in names}, path.with_name(name))
        index |= dict.fromkeys(names, name)
    size = sum(tensor.nbytes for tensor in weights.values())
    values = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
    text = json.dumps(values, indent=2) + "\n"
    path.with_name(f"{path.name}.index.json").write_text(text, encoding="utf-8")


def listed(names: Iterable[str]) -> str:
    """Names for an error: the first of many, and how many more."""
    told = list(names)
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return ", ".join(told[:_SHOWN]) + more or "none"


_PICKLE = (
    "pickled, and reading that may run any code; ask its author for safetensors, or convert it "
    "where you trust it"
)


def _without_weights(folder: Path, files: list[str]) -> str:
    if files:
        return (
            f"{folder}: holds {listed(files)}; weights are in {WEIGHTS_FILE} alone, or in several "
            f"files that {INDEX_FILE} names"
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        return f"{folder}: no safetensors file; {listed(pickled)} is {_PICKLE}"
    return f"{folder}: no safetensors file, so here are no weights"


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by plain names of files beside the index."""
    if (path.parent / WEIGHTS_FILE).exists():
        raise CheckpointError(f"{path}: lies beside {WEIGHTS_FILE}; remove the one or the other")
    _check_place(path)
    try:
        values = parse_json(path.read_text(encoding="utf-8"), _unique)
        shards = values["weight_map"]
        if not isinstance(shards, dict) or not shards:
            raise ValueError("weight_map maps no tensors to files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as an index of shards: {error!r}") from None
    for name, file in shards.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(
                f"{path}: {name} is said to be in {file!r}; a shard is a safetensors file beside "
                "the index, named without a folder"
            )
    return shards


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON in which no key stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"twice: {listed(sorted({key for key in keys if keys.count(key) > 1}))}")
    return values


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0") and name[0] != "."


def _check_shard(shard: Mapping[str, Tensor], expected: set[str], path: Path) -> None:
    missing, extra = sorted(expected - set(shard)), sorted(set(shard) - expected)
    if missing or extra:
        raise CheckpointError(
            f"{path}: not the tensors that {INDEX_FILE} tells. Missing: {listed(missing)}. "
            f"Unexpected: {listed(extra)}."
        )


def _check_place(path: Path) -> None:
    """Refuse a link out of the folder; the hub's cache links each file to its own `blobs`."""
    folder, real = path.parent.resolve(), path.resolve()
    blobs = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    is_cached = real.parent in blobs
    if real.parent != folder and not is_cached:
        raise CheckpointError(
            f"{path}: is a link out of its folder, to {real}; put the file itself there"
        )


def _is_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    return start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _is_finite(tensor: Tensor) -> bool:
    """In one pass and without a copy: NaN is both the least and the greatest."""
    return not tensor.numel() or all(math.isfinite(float(edge)) for edge in tensor.aminmax())


def _shards(weights: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order of name, put together up to a size."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(weights):
        if shards[-1] and size + weights[name].nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weights[name].nbytes
    return shards


def _write_file(weights: dict[str, Tensor], path: Path) -> None:
    """Write one file that is readable like any other of the user."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk is not an OSError here
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
    path.chmod(mode)  # safetensors lets nobody else read it
