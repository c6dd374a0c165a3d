"""What is cut out of one document, kept in a file of its own that is named by all it depends on.

A shard is a Parquet file with one row an image: strips or whole pages with their texts and hashes.
Its name is a hash of the document's bytes, the settings, and the code that cuts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from colfolio.data.documents import open_document
from colfolio.data.pages.views import BoxF
from colfolio.data.pairs import Pair, StripSettings, page_titles, strip_pairs
from colfolio.data.preparing.deduplicate import (
    PAGE_CELLS,
    STRIP_CELLS,
    difference_hash,
    pixel_digest,
)
from colfolio.errors import DocumentError

_LIBRARIES = ("pypdfium2", "pillow", "numpy")
_JPEG_QUALITY = 90
_BATCH_ROWS = 512
_LETTERS = {"heading": "h", "words": "w"}


@dataclass(frozen=True, slots=True)
class CutSettings:
    """What is cut out of a document; see `prepare.PrepareSettings`."""

    view: Literal["strip", "page"]
    strips: StripSettings
    page_dpi: float
    page_format: Literal["png", "jpeg"]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A document to cut, and the file that its rows go to."""

    path: Path
    shard: Path
    settings: CutSettings
    with_words: bool


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Counts of one document.

    Args:
        pages: pages of the document.
        entries: entries of its outline.
        located: those that were found on their page.
    """

    pages: int
    entries: int
    located: int


@dataclass(frozen=True, slots=True)
class _Row:
    suffix: str
    texts: list[str]
    kind: str
    page: int
    box: BoxF | None
    image: bytes
    digest: bytes
    hash: bytes
    length: float


_SCHEMA = pa.schema(
    [
        ("suffix", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("kind", pa.string()),
        ("page", pa.int64()),
        ("box", pa.list_(pa.float32())),
        ("image", pa.binary()),
        ("digest", pa.binary()),
        ("hash", pa.binary()),
        ("length", pa.float32()),
    ]
)


def shard_key(content: str, settings: CutSettings, with_words: bool) -> str:
    """The name of a document's shard: a hash of its content, the settings and the code."""
    if settings.view == "strip":
        wanted = f"strip {settings.strips.model_dump_json()} {with_words}"
    else:
        wanted = f"page {settings.page_dpi} {settings.page_format}"
    parts = [content, wanted, _code_version()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_whole(shard: Path) -> bool:
    """Whether a shard exists and can be read to its end."""
    try:
        return b"counts" in (pq.read_schema(shard).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def build_shard(job: ShardJob) -> str | None:
    """Cut a document and write its shard; the reason if the document cannot be read."""
    try:
        with open_document(job.path) as document:
            num_pages, num_entries = document.num_pages, len(document.outline())
        if job.settings.view == "page":
            rows, located = _page_rows(job.path, job.settings)
        else:
            rows, located = _strip_rows(job.path, job.settings, job.with_words)
        _write(job.shard, rows, ShardInfo(num_pages, num_entries, located))
    except DocumentError as error:
        return error.reason
    return None


def read_info(shard: Path) -> ShardInfo:
    """The counts of a shard's document."""
    return ShardInfo(**json.loads(pq.read_schema(shard).metadata[b"counts"]))


def read_rows(shard: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a shard."""
    with pq.ParquetFile(shard) as parquet:
        return parquet.read(columns=list(columns))


def no_rows(columns: Sequence[str]) -> pa.Table:
    """Some columns of a shard without rows."""
    return _SCHEMA.empty_table().select(list(columns))


def iterate_rows(shard: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a shard, in pieces that fit in memory."""
    with pq.ParquetFile(shard) as parquet:
        for number in range(parquet.num_row_groups):
            yield parquet.read_row_group(number, columns=list(columns))


def encode_image(
    image: UInt8[np.ndarray, "height width 3"], kind: Literal["png", "jpeg"] = "png"
) -> bytes:
    """An image as PNG or JPEG, in one channel where it has no colour."""
    is_grey = np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(
        image[..., 1], image[..., 2]
    )
    pixels = Image.fromarray(np.ascontiguousarray(image[..., 0]) if is_grey else image)
    encoded = io.BytesIO()
    if kind == "png":
        pixels.save(encoded, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    else:
        pixels.save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return encoded.getvalue()


def _strip_rows(path: Path, settings: CutSettings, with_words: bool) -> tuple[Iterator[_Row], int]:
    found = strip_pairs(path, settings.strips, with_words)
    return map(_row_of, found, _suffixes(found)), sum(pair.kind == "heading" for pair in found)


def _suffixes(found: Iterable[Pair]) -> Iterator[str]:
    """`p12-h3` is the third heading of page 12."""
    numbers: Counter[tuple[int, str]] = Counter()
    for pair in found:
        numbers[pair.page, pair.kind] += 1
        yield f"p{pair.page + 1}-{_LETTERS[pair.kind]}{numbers[pair.page, pair.kind]}"


def _row_of(pair: Pair, suffix: str) -> _Row:
    grey = np.ascontiguousarray(pair.image[..., 0])
    packed, length = difference_hash(grey, STRIP_CELLS, is_cropped=True)
    return _Row(
        suffix=suffix,
        texts=[pair.text],
        kind=pair.kind,
        page=pair.page,
        box=pair.box,
        image=encode_image(pair.image),
        digest=pixel_digest(grey),
        hash=packed,
        length=length,
    )


def _page_rows(path: Path, settings: CutSettings) -> tuple[Iterator[_Row], int]:
    found: dict[int, list[str]] = {}
    for title in page_titles(path):
        found.setdefault(title.page, []).append(title.text)
    return _rendered(path, settings, found), sum(map(len, found.values()))


def _rendered(path: Path, settings: CutSettings, found: dict[int, list[str]]) -> Iterator[_Row]:
    with open_document(path) as document:
        for page in range(document.num_pages):
            image = document.render(page, dpi=settings.page_dpi)
            grey = np.asarray(Image.fromarray(image).convert("L"))
            packed, length = difference_hash(grey, PAGE_CELLS, is_cropped=False)
            yield _Row(
                suffix=f"p{page + 1}",
                texts=found.get(page, []),
                kind="page",
                page=page,
                box=None,
                image=encode_image(image, settings.page_format),
                digest=pixel_digest(image),
                hash=packed,
                length=length,
            )


def _write(shard: Path, rows: Iterable[_Row], counts: ShardInfo) -> None:
    described = {"pages": counts.pages, "entries": counts.entries, "located": counts.located}
    schema = _SCHEMA.with_metadata({"counts": json.dumps(described)})
    aside = shard.with_name(f"{shard.name}.{os.getpid()}.aside")
    remaining = iter(rows)
    try:
        with pq.ParquetWriter(aside, schema, compression="NONE") as writer:
            while batch := list(itertools.islice(remaining, _BATCH_ROWS)):
                columns = {name: [getattr(row, name) for row in batch] for name in schema.names}
                writer.write_table(pa.table(columns, schema=schema))
        aside.replace(shard)
    finally:
        aside.unlink(missing_ok=True)


@functools.cache
def _code_version() -> str:
    """A hash of this package's source, which decides what a shard holds, and of what it calls."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(module.read_bytes())
    for library in _LIBRARIES:
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()
