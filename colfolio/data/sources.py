"""The documents that a dataset is made of, and the split that each belongs to."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from colfolio.config import Settings
from colfolio.data.documents import content_hash, find_documents
from colfolio.data.layout import SPLITS
from colfolio.data.pairs import StripSettings
from colfolio.data.shards import CutSettings, shard_key


class Shares(Settings):
    """What part of the document families goes to each split; their sum is taken as the whole."""

    train: float = Field(default=0.70, ge=0)
    validation: float = Field(default=0.08, ge=0)
    test: float = Field(default=0.22, ge=0)


class PrepareSettings(Settings):
    """How documents become a dataset.

    Args:
        view: "strip": crops of headings, and in the training split strips of words; "page": whole
            pages, and the outline titles that stand on them.
        strips: how strips are cut.
        page_dpi: resolution of whole pages.
        page_format: how whole pages are stored.
        splits: the splits to write; leaving one out never moves a family to another.
        shares: sizes of the splits.
        split_seed: another seed puts families into other splits.
        max_bad_share: more unreadable files than this part of all is an error.
        processes: at most this many work at once; None is one a core.
    """

    view: Literal["strip", "page"] = "strip"
    strips: StripSettings = Field(default_factory=StripSettings)
    page_dpi: float = Field(default=144.0, ge=36, le=600)
    page_format: Literal["png", "jpeg"] = "png"
    splits: tuple[str, ...] = SPLITS
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
    """A document: its name in the dataset, its family and split, and its shard."""

    name: str
    path: Path
    family: str
    split: str
    shard: Path


def find_sources(documents: Path, cache: Path, settings: PrepareSettings) -> list[Source]:
    """Every document, sorted by name, with its family, its split and the place of its shard.

    Raises:
        DocumentError: there are none, or one cannot be opened.
    """
    paths = find_documents(documents)
    root = documents if documents.is_dir() else documents.parent
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        contents = list(threads.map(content_hash, paths))
    sources = []
    for path, content in zip(paths, contents, strict=True):
        name = path.relative_to(root).as_posix()
        family = path.stem if path.parent == root else path.relative_to(root).parts[0]
        split = split_of(family, settings)
        shard = cache / f"{shard_key(content, settings.cut, split == 'train')}.parquet"
        sources.append(Source(name, path, family, split, shard))
    return sorted(sources, key=lambda source: source.name)


def split_of(family: str, settings: PrepareSettings) -> str:
    """The split of a document family: its name alone decides, so that other families never do."""
    shares = settings.shares.model_dump()
    digest = hashlib.sha256(f"{settings.split_seed}/{family}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares.values())
    chosen = SPLITS[0]
    for split in SPLITS:
        if shares[split] > 0:
            chosen = split
            if place < shares[split]:
                break
        place -= shares[split]
    return chosen
