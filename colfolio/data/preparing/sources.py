"""The documents that a dataset is made of, and the split that each belongs to."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from pydantic import Field, model_validator

from colfolio.config import Settings
from colfolio.data.documents import content_hash, find_documents
from colfolio.data.formats.layout import SPLITS
from colfolio.data.pairs import StripSettings
from colfolio.data.preparing.shards import CutSettings, shard_key
from colfolio.errors import DocumentError


class Shares(Settings):
    """What part of the document families goes to each split; their sum is taken as the whole."""

    train: float = Field(default=0.70, ge=0)
    validation: float = Field(default=0.08, ge=0)
    test: float = Field(default=0.22, ge=0)

    @model_validator(mode="after")
    def _check_sum(self) -> Shares:
        if self.train + self.validation + self.test <= 0:
            raise ValueError("at least one share must be above 0")
        return self


class PrepareSettings(Settings):
    """How documents become a dataset.

    Args:
        view: "page": whole pages, and the outline titles that stand on them; "strip": crops of
            headings, and in the training split strips of words.
        strips: how strips are cut.
        page_dpi: resolution of whole pages.
        page_format: how whole pages are stored.
        splits: the splits to write; leaving one out never moves a family to another. Training
            images are always compared with all held-out ones, validation images with those of test
            only where both splits are written: a held-out split prepared alone may share images
            with the other.
        shares: sizes of the splits.
        split_seed: another seed puts families into other splits.
        max_bad_share: more unreadable files than this part of all is an error.
        processes: at most this many work at once; None is one a core.
    """

    view: Literal["strip", "page"] = "page"
    strips: StripSettings = Field(default_factory=StripSettings)
    page_dpi: float = Field(default=144.0, ge=36, le=600)
    page_format: Literal["png", "jpeg"] = "png"
    splits: tuple[Literal["train", "validation", "test"], ...] = Field(default=SPLITS, min_length=1)
    shares: Shares = Field(default_factory=Shares)
    split_seed: int = 0
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    processes: int | None = Field(default=None, ge=1)

    @property
    def cut(self) -> CutSettings:
        """What decides the content of a shard."""
        return CutSettings(self.view, self.strips, self.page_dpi, self.page_format)


@dataclass(frozen=True, slots=True)
class Source:
    """A document that becomes part of a dataset.

    Args:
        name: its path below the folder of documents, with `/`.
        family: the first folder of the name, or the file's stem where it lies in no folder.
        content: hash of its bytes.
        shard: where what is cut out of it is kept.
    """

    name: str
    path: Path
    family: str
    split: str
    content: str
    shard: Path


def find_sources(documents: Path, cache: Path, settings: PrepareSettings) -> list[Source]:
    """Every document, sorted by name, with its family, its split and the place of its shard.

    Raises:
        DocumentError: there are none, or the name of one is no Unicode.
    """
    paths = find_documents(documents)
    root = documents if documents.is_dir() else documents.parent
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        contents = list(threads.map(_content_or_nothing, paths))
    families = [_family(path.relative_to(root)) for path in paths]
    split_of = assign_splits(set(families), settings)
    sources = []
    for path, family, content in zip(paths, families, contents, strict=True):
        split = split_of[family]
        shard = cache / f"{shard_key(content, settings.cut, split == 'train')}.parquet"
        name = path.relative_to(root).as_posix()
        sources.append(Source(name, path, family, split, content, shard))
    return sorted(sources, key=lambda source: source.name)


def assign_splits(families: Collection[str], settings: PrepareSettings) -> dict[str, str]:
    """The split of each document family, by a hash of its name alone.

    So no family ever moves because others come or go, but in a small set: a split that got none
    takes the family next to it in the order of hashes, if its own split keeps another.
    """
    shares = {split: share for split, share in settings.shares.model_dump().items() if share > 0}
    ends = dict(zip(shares, itertools.accumulate(shares.values()), strict=True))
    whole = sum(shares.values())
    place = {family: _place(family, settings.split_seed) * whole for family in families}
    last = list(shares)[-1]
    split_of = {
        family: next((split for split in ends if place[family] < ends[split]), last)
        for family in sorted(families)
    }
    for split, share in shares.items():
        counts = Counter(split_of.values())
        middle = ends[split] - share / 2
        spare = [family for family in split_of if counts[split_of[family]] > 1]
        if not counts[split] and spare:
            split_of[min(spare, key=lambda family: (abs(place[family] - middle), family))] = split
    return split_of


def _place(family: str, seed: int) -> float:
    """A number in [0, 1) drawn from the name of a family."""
    digest = hashlib.sha256(f"{seed}/{family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _family(name: PurePath) -> str:
    family = name.parts[0] if len(name.parts) > 1 else name.stem
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise DocumentError(ascii(str(name)), "has a name that is no Unicode; rename it") from None
    return family


def _content_or_nothing(path: Path) -> str:
    """Hash of a file's bytes; its name where it cannot be read, which cutting it will report."""
    try:
        return content_hash(path)
    except DocumentError:
        return f"unreadable {path}"
