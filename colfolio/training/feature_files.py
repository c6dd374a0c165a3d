"""Features on disk: append-only files of checked records; each process writes its own, reads all.

A record is a header and the bytes of one tensor. The header is written after the bytes, and each
has a SHA-256 that is checked whenever it is read: a process that dies, a full disk or a flipped bit
costs an entry, and never gives a wrong one. A file is named after the group (what made its
features) and its writer. Whoever is in the middle of a file that another process deletes reads on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_SUFFIX = ".features"
_LOCK = ".lock"
_MAGIC = b"colfeat1"
# magic, address, dtype, tokens, width, SHA-256 of the bytes; then SHA-256 of all that
_FIELDS = struct.Struct("<8s32s16sQQ32s")
_HEADER_SIZE = _FIELDS.size + 32


class _Header(NamedTuple):
    """What a record holds."""

    address: bytes
    dtype: torch.dtype
    tokens: int
    width: int
    digest: bytes

    @property
    def record_size(self) -> int:
        return _HEADER_SIZE + self.tokens * self.width * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class _File:
    """An open file whose records are known up to `end`."""

    descriptor: int
    end: int = 0


class FeatureFiles:
    """Features in the files of one folder. Not safe for threads; any number of processes may share.

    Args:
        folder: made when something is written; nothing else may lie there.
        budget: bytes that all files in the folder may take together, whoever wrote them.
    """

    def __init__(self, folder: Path, budget: float) -> None:
        self._folder, self._budget = folder, budget
        self._files: dict[str, _File] = {}
        self._own: dict[str, str] = {}
        self._index: dict[bytes, tuple[_File, int, _Header]] = {}
        self.num_bytes = 0
        self.fault: str | None = None

    def addresses(self) -> set[bytes]:
        """Where features lie, as far as is known now."""
        return set(self._index)

    def has(self, group: str, address: bytes) -> bool:
        """Whether features lie at an address; if they turn out damaged, `read` gives None."""
        if address not in self._index:
            self._look(group)
        return address in self._index

    def read(self, group: str, address: bytes) -> Float[Tensor, "tokens width"] | None:
        """The features at an address, bit by bit as they were written; None if there are none."""
        if not self.has(group, address):
            return None
        file, begin, header = self._index[address]
        features = torch.empty(header.tokens, header.width, dtype=header.dtype)
        content = bytes_of(features)
        with suppress(OSError):
            _read_all(file.descriptor, content, begin + _HEADER_SIZE)
            if hashlib.sha256(content).digest() == header.digest:
                return features
        del self._index[address]
        return None

    def has_room(self, size: int) -> bool:
        """Whether features of so many bytes would be written, as far as is known now."""
        return self.fault is None and self.num_bytes + _HEADER_SIZE + size <= self._budget

    def write(self, group: str, address: bytes, features: Float[Tensor, "tokens width"]) -> None:
        """Append features (contiguous, on the CPU) that fit the budget and are not there yet.

        What the file system refuses ends all writing: `fault` then says why.
        """
        if not self.has_room(features.nbytes):
            return
        try:
            with self._locked():
                if not self.has(group, address) and self.has_room(features.nbytes):
                    self._append(group, address, features)
        except OSError as error:
            self.fault = f"{self._folder}: features are no longer written to disk: {error.strerror}"

    def keep_only(self, groups: Collection[str]) -> None:
        """Delete the files of all other groups, whoever wrote them."""
        for path in self._sizes():
            if path.name.partition("-")[0] not in groups:
                with suppress(OSError):
                    path.unlink()
        self._look(None)

    def close(self) -> None:
        """Close all files; they stay on disk."""
        for name in list(self._files):
            self._forget(name)

    def _look(self, group: str | None) -> None:
        """Learn which files are there now, and what was added to those of a group."""
        sizes = self._sizes()
        self.num_bytes = sum(sizes.values())
        for name in self._files.keys() - {path.name for path in sizes}:
            self._forget(name)
        for path, size in sizes.items():
            if group is not None and path.name.startswith(f"{group}-"):
                with suppress(OSError):
                    self._scan(path, size)

    def _sizes(self) -> dict[Path, int]:
        sizes: dict[Path, int] = {}
        with suppress(OSError):  # no folder yet, or none any more
            for path in self._folder.glob(f"*{_SUFFIX}"):
                with suppress(FileNotFoundError):
                    sizes[path] = path.stat().st_size
        return sizes

    def _scan(self, path: Path, size: int) -> None:
        """Index the whole records that a file has beyond those that are known."""
        file = self._files.get(path.name)
        if file is None:
            file = self._files[path.name] = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        while file.end + _HEADER_SIZE <= size:
            header = _parsed(os.pread(file.descriptor, _HEADER_SIZE, file.end))
            if header is None or file.end + header.record_size > size:
                return
            self._index[header.address] = (file, file.end, header)
            file.end += header.record_size

    def _forget(self, name: str) -> None:
        file = self._files.pop(name)
        os.close(file.descriptor)
        self._index = {key: place for key, place in self._index.items() if place[0] is not file}
        self._own = {group: own for group, own in self._own.items() if own != name}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes that write to the folder, so that the budget holds."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _append(self, group: str, address: bytes, features: Tensor) -> None:
        file = self._own_file(group)
        content = bytes_of(features)
        digest = hashlib.sha256(content).digest()
        header = _Header(address, features.dtype, len(features), features.shape[1], digest)
        try:
            _write_all(file.descriptor, content, file.end + _HEADER_SIZE)
            _write_all(file.descriptor, memoryview(_packed(header)), file.end)
        except BaseException:
            with suppress(OSError):  # else a torn record stays, which readers skip
                os.ftruncate(file.descriptor, file.end)
            raise
        self._index[address] = (file, file.end, header)
        file.end += header.record_size
        self.num_bytes += header.record_size

    def _own_file(self, group: str) -> _File:
        if group not in self._own:
            name = f"{group}-{uuid.uuid4().hex}{_SUFFIX}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._files[name] = _File(os.open(self._folder / name, flags, 0o666))
            self._own[group] = name
        return self._files[self._own[group]]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU where they lie; writing them changes it."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def _packed(header: _Header) -> bytes:
    name = str(header.dtype).removeprefix("torch.").encode()
    fields = _FIELDS.pack(_MAGIC, header.address, name, header.tokens, header.width, header.digest)
    return fields + hashlib.sha256(fields).digest()


def _parsed(header: bytes) -> _Header | None:
    """A header, or None if these bytes are not a whole one."""
    fields = header[: _FIELDS.size]
    if len(header) < _HEADER_SIZE or hashlib.sha256(fields).digest() != header[_FIELDS.size :]:
        return None
    magic, address, name, tokens, width, digest = _FIELDS.unpack(fields)
    dtype = getattr(torch, name.rstrip(b"\0").decode(), None)
    if magic != _MAGIC or not isinstance(dtype, torch.dtype):
        return None
    return _Header(address, dtype, tokens, width, digest)


def _read_all(descriptor: int, content: memoryview, begin: int) -> None:
    """Fill the content from a file, as far as the file goes."""
    done = 0
    while count := os.preadv(descriptor, [content[done:]], begin + done):
        done += count


def _write_all(descriptor: int, content: memoryview, begin: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], begin + done)
