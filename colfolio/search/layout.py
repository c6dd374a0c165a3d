"""What an index consists of on disk: the manifest, the columns of its tables, its file errors.

An index is a folder. `colfolio-index.json` is its manifest and names the one generation folder
that counts; replacing that small file is the only step that changes what a reader sees. A build
that dies leaves a generation that no manifest names, and the next build removes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import ValidationError

from colfolio.config import Settings
from colfolio.data.pages.ink import BoxF
from colfolio.errors import IndexStoreError

MANIFEST = "colfolio-index.json"
FORMAT = 2

VectorType = Literal["float16", "float32"]
ViewKind = Literal["page", "strips", "tiles"]

PAGES_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("document", pa.string()),
        ("page", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source", pa.string()),
        ("source_bytes", pa.int64()),
        ("source_mtime_ns", pa.int64()),
        ("dpi", pa.float32()),
        ("preview", pa.binary()),
    ]
)


def views_schema(dim: int, dtype: VectorType) -> pa.Schema:
    """Columns of the table of views: one row a view, its vectors as a list of fixed-size lists."""
    vector = pa.list_(pa.float16() if dtype == "float16" else pa.float32(), dim)
    return pa.schema(
        [
            ("id", pa.int64()),
            ("document", pa.string()),
            ("page", pa.int32()),
            ("view", pa.int32()),
            ("page_id", pa.int64()),
            ("box", pa.list_(pa.float32(), 4)),
            ("region", pa.list_(pa.float32(), 4)),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("length", pa.int32()),
            ("vectors", pa.list_(vector)),
        ]
    )


class Manifest(Settings):
    """What an index promises: who made it, of what, and how much of it there is.

    `fingerprint` is the encoder's; `checksum` is the CRC-32 of all vectors as stored, in order;
    `skipped` lists the documents that could not be read, with the reason.
    """

    format: int = FORMAT
    generation: str
    model: str
    fingerprint: str
    dim: int
    dtype: VectorType
    views: ViewKind
    num_documents: int
    num_pages: int
    num_views: int
    num_vectors: int
    checksum: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PageRecord:
    """A page in the index, and how it can be shown again.

    Args:
        document: its name; page: counted from 0.
        size: height and width in pixels, as it was indexed.
        source: the file it came from, or an empty string where there is none; with that file's
            size in bytes and time of change, so that another file of that name is not taken for it.
        dpi: the resolution at which a page of a PDF was rendered.
        preview: a small encoded image of the page, or None.
    """

    document: str
    page: int
    size: tuple[int, int]
    source: str
    source_bytes: int
    source_mtime_ns: int
    dpi: float
    preview: bytes | None


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """A view in the index.

    Args:
        page_id: the row of its page; view: its number there.
        box: the part of the page that it shows.
        region: the part of the page that its image covers: of a strip, the box and white margins.
        size: height and width of its image in pixels.
    """

    page_id: int
    view: int
    box: BoxF
    region: BoxF
    size: tuple[int, int]


def read_manifest(folder: Path) -> Manifest:
    """What the index at a folder promises.

    Raises:
        IndexStoreError: there is no index, or one that this version cannot read.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise IndexStoreError(
            f"{folder}: no index is here (no {MANIFEST}); make one with `colfolio index`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise IndexStoreError(f"{folder / MANIFEST}: cannot be read: {error}") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise IndexStoreError(
            f"{folder / MANIFEST}: is damaged, or of another version ({error.error_count()} "
            "faults); build the index again"
        ) from None
    if manifest.format != FORMAT:
        raise IndexStoreError(
            f"{folder}: is an index of format {manifest.format}, this version reads {FORMAT}; "
            "build it again"
        )
    return manifest


@contextmanager
def file_errors(folder: Path, failing: str) -> Iterator[None]:
    """Raise what the file system or LanceDB reports as an `IndexStoreError` naming the folder."""
    try:
        yield
    except IndexStoreError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise IndexStoreError(f"{folder}: {failing}: {error}") from error
