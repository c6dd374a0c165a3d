"""The output of frozen layers, kept across epochs: in memory first, then on disk, then not at all.

An epoch visits every row once. Whatever policy throws out an old entry to make room for a new one,
least recently used above all, then throws out what will be asked for first: its hit rate is 0 as
soon as the rows exceed the budget. So whoever comes first stays, and the hit rate is the share of
rows that fit.

An entry is found only by the fingerprint of all that computed it (`frozen_part.py`) together with
the digest of its row's content. Other weights, another border or other pixels ask for another
entry, so that a stale one cannot be served.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from colfolio.config import Settings
from colfolio.training.feature_files import FeatureFiles, bytes_of

_MEBIBYTE = 2**20


class FeatureCacheSettings(Settings):
    """How much of the output of frozen layers is kept across epochs; never changes the gradient.

    Args:
        ram_mb: mebibytes of features in the memory of each process.
        disk_mb: mebibytes that the files in the cache's folder may grow to, those of all processes
            and of earlier runs together.
    """

    ram_mb: float = Field(default=0.0, ge=0)
    disk_mb: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Features in memory; `version` is torch's count of writes to them."""

    group: str
    features: Tensor
    version: int


class FeatureCache:
    """Features by what computed them (`part`) and of which row (`key`); safe for threads.

    `hits` and `misses` count what `get` found and did not. `disk_fault` says why nothing more is
    written to disk, where the file system refused it; training goes on without.

    Args:
        settings: the budgets.
        folder: for the files, nothing else may lie there; processes that share it read each other's
            entries, and one that comes later finds them again. None: only memory.

    Raises:
        ValueError: the settings want a disk, and there is no folder.
    """

    def __init__(self, settings: FeatureCacheSettings, folder: Path | None) -> None:
        if settings.disk_mb and folder is None:
            raise ValueError(
                f"disk_mb is {settings.disk_mb}, but the feature cache has no folder; "
                "name one, or set disk_mb to 0"
            )
        self._ram_budget = settings.ram_mb * _MEBIBYTE
        self._files: FeatureFiles | None = None
        if folder is not None and settings.disk_mb:
            self._files = FeatureFiles(folder, settings.disk_mb * _MEBIBYTE)
        self._kept: dict[bytes, _Kept] = {}
        self._lock = threading.RLock()
        self.ram_bytes = self.hits = self.misses = 0

    @property
    def entries(self) -> int:
        """Rows that are kept, in memory or on disk."""
        with self._lock:
            on_disk = self._files.addresses() if self._files else set()
            return len(self._kept.keys() | on_disk)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files in the folder, as last seen."""
        return self._files.num_bytes if self._files else 0

    @property
    def disk_fault(self) -> str | None:
        """Why nothing more is written to disk, or None."""
        return self._files.fault if self._files else None

    def has(self, part: str, key: bytes) -> bool:
        """Whether features are there, without reading or counting."""
        group, address = _place(part, key)
        with self._lock:
            is_kept = address in self._kept
            return is_kept or (self._files is not None and self._files.has(group, address))

    def get(self, part: str, key: bytes) -> Float[Tensor, "tokens width"] | None:
        """Features on the CPU, bit by bit as they were put, or None.

        They are the cache's own: read them, never write to them. An entry that was written to in
        place is not served again.
        """
        group, address = _place(part, key)
        with self._lock, torch.inference_mode(False):  # torch must count writes to what comes out
            features = self._from_ram(address)
            if features is None and self._files:
                features = self._files.read(group, address)
                if features is not None and self._has_ram(features):
                    self._keep(group, address, features)
            if features is None:
                self.misses += 1
            else:
                self.hits += 1
            return features

    def put(self, part: str, key: bytes, features: Float[Tensor, "tokens width"]) -> None:
        """Keep a copy of features, if there is room and they are not there yet."""
        if features.ndim != 2:
            raise ValueError(f"features are [tokens, width], received {list(features.shape)}")
        group, address = _place(part, key)
        if address in self._kept or not self._has_room(features):
            return
        own = _copy(features)  # before the lock: it may have to wait for the device
        with self._lock:
            if self._has_ram(own):
                self._keep(group, address, own)
            elif self._files:
                self._files.write(group, address, own)

    def keep_only(self, parts: Collection[str]) -> None:
        """Forget what other parts made, files of all processes included.

        Call it at the beginning, and when a fingerprint has changed: what the old one made is never
        served, but takes room. Processes that share a folder must name the same parts.
        """
        groups = {_group(part) for part in parts}
        with self._lock:
            for address in [key for key, kept in self._kept.items() if kept.group not in groups]:
                self._release(address)
            if self._files:
                self._files.keep_only(groups)

    def drop(self) -> None:
        """Forget everything, files of all processes included: the part thaws."""
        self.keep_only(())

    def close(self) -> None:
        """Free the memory and close the files, which stay for a run that is resumed."""
        with self._lock:
            self._kept.clear()
            self.ram_bytes = 0
            if self._files:
                self._files.close()

    def _has_room(self, features: Tensor) -> bool:
        on_disk = self._files is not None and self._files.has_room(features.nbytes)
        return on_disk or self._has_ram(features)

    def _has_ram(self, features: Tensor) -> bool:
        return self.ram_bytes + features.nbytes <= self._ram_budget

    def _keep(self, group: str, address: bytes, features: Tensor) -> None:
        if address not in self._kept:
            self._kept[address] = _Kept(group, features, features._version)
            self.ram_bytes += features.nbytes

    def _from_ram(self, address: bytes) -> Tensor | None:
        kept = self._kept.get(address)
        if kept is not None and kept.features._version != kept.version:
            self._release(address)
            return None
        return kept.features if kept else None

    def _release(self, address: bytes) -> None:
        self.ram_bytes -= self._kept.pop(address).features.nbytes


def row_key(*contents: bytes | Tensor) -> bytes:
    """SHA-256 of all that goes into a row: encoded bytes, settings, token ids, patches, grids.

    >>> row_key(b"page", b"") == row_key(b"", b"page")
    False
    """
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, Tensor):
            digest.update(f"{content.dtype} {list(content.shape)}\n".encode())
            digest.update(bytes_of(content.detach().cpu().contiguous()))
        else:
            digest.update(f"bytes {len(content)}\n".encode())
            digest.update(content)
    return digest.digest()


def _place(part: str, key: bytes) -> tuple[str, bytes]:
    """The group of a part, and the address of a row in it, which no other part and key have."""
    group = _group(part)
    return group, hashlib.sha256(group.encode() + key).digest()


def _group(part: str) -> str:
    return hashlib.sha256(part.encode()).hexdigest()


def _copy(features: Tensor) -> Tensor:
    """The features alone in memory of their own on the CPU, free of what they are a view of."""
    with torch.inference_mode(False), torch.no_grad():  # torch must count writes to it
        return torch.empty(features.shape, dtype=features.dtype).copy_(features)
