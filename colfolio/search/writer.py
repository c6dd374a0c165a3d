"""Writing an index: built aside as a new generation, made to count by replacing one file."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import torch

from colfolio.batch import MultiVectors
from colfolio.errors import IndexStoreError
from colfolio.search.layout import (
    MANIFEST,
    PAGES_SCHEMA,
    Manifest,
    PageRecord,
    VectorType,
    ViewKind,
    ViewRecord,
    file_errors,
    views_schema,
)

_GENERATION = "generation-"
_ASIDE = MANIFEST + ".new"
# Views are handed to LanceDB in parts of about this many bytes: few fragments, bounded memory.
_PART_BYTES = 32 << 20


@contextmanager
def create_store(folder: Path, dim: int, dtype: VectorType) -> Iterator[StoreWriter]:
    """A writer to a new generation of the index at a folder; nothing counts before `commit`.

    Raises:
        IndexStoreError: the folder holds something other than an index, another build writes to
            it, or it cannot be written to.
    """
    existed = folder.is_dir()
    with _locked(folder):
        _remove_unnamed(folder)
        try:
            yield StoreWriter(folder, f"{_GENERATION}{uuid.uuid4().hex}", dim, dtype)
        finally:
            _remove_unnamed(folder)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()


class StoreWriter:
    """Appends pages with their views to one generation; made by `create_store`."""

    def __init__(self, folder: Path, generation: str, dim: int, dtype: VectorType) -> None:
        self._folder, self._generation = folder, generation
        self._dim: int = dim
        self._dtype: VectorType = dtype
        self._schema = views_schema(dim, dtype)
        with self._file_errors():
            database = lancedb.connect(folder / generation)
            self._pages = database.create_table("pages", schema=PAGES_SCHEMA)
            self._views = database.create_table("views", schema=self._schema)
        self._page_parts: list[pa.RecordBatch] = []
        self._view_parts: list[pa.RecordBatch] = []
        self._checksum = 0
        self._documents: set[str] = set()
        self.num_pages = self.num_views = self.num_vectors = 0

    def add(
        self, pages: Sequence[PageRecord], views: Sequence[ViewRecord], vectors: MultiVectors | None
    ) -> None:
        """Append pages and all views of these pages.

        Args:
            pages: in the order of the index.
            views: in the order of their pages; `page_id` counts from 0 over all pages ever added.
            vectors: one row a view, or None where there is no view.

        Raises:
            ValueError: the vectors have another dimension.
            IndexStoreError: vectors are not finite in the stored type, or the index cannot be
                written (a full disk).
        """
        if pages:
            self._page_parts.append(_page_batch(pages, self.num_pages))
        if views:
            assert vectors is not None
            assert len(views) == len(vectors)
            flat = self._stored(pages, views, vectors)
            self._view_parts.append(self._view_batch(pages, views, vectors, flat))
            self._checksum = zlib.crc32(flat.data, self._checksum)
            self.num_views += len(views)
            self.num_vectors += len(flat)
        self.num_pages += len(pages)
        self._documents.update(page.document for page in pages)
        if sum(part.nbytes for part in self._page_parts + self._view_parts) > _PART_BYTES:
            self._flush()

    def commit(
        self, *, model: str, fingerprint: str, views: ViewKind, skipped: Sequence[str]
    ) -> Manifest:
        """Make this generation the index; the one before it no longer counts."""
        self._flush()
        manifest = Manifest(
            generation=self._generation,
            model=model,
            fingerprint=fingerprint,
            dim=self._dim,
            dtype=self._dtype,
            views=views,
            num_documents=len(self._documents),
            num_pages=self.num_pages,
            num_views=self.num_views,
            num_vectors=self.num_vectors,
            checksum=self._checksum,
            skipped=tuple(skipped),
        )
        with self._file_errors():
            _replace_manifest(self._folder, manifest)
        return manifest

    def _flush(self) -> None:
        with self._file_errors():
            if self._page_parts:
                self._pages.add(pa.Table.from_batches(self._page_parts))
            if self._view_parts:
                self._views.add(pa.Table.from_batches(self._view_parts))
        self._page_parts, self._view_parts = [], []

    def _stored(
        self, pages: Sequence[PageRecord], views: Sequence[ViewRecord], vectors: MultiVectors
    ) -> np.ndarray:
        """The vectors as they are stored, `[vectors, dim]`."""
        if vectors.vectors.shape[1] != self._dim:
            raise ValueError(f"vectors of {vectors.vectors.shape[1]} dimensions, not {self._dim}")
        stored = vectors.vectors.detach().cpu().to(getattr(torch, self._dtype))
        faults = (~torch.isfinite(stored).all(dim=1)).nonzero()  # [faults, 1]
        if len(faults):
            view = views[int(torch.searchsorted(vectors.offsets, faults[0], right=True)) - 1]
            page = pages[view.page_id - self.num_pages]
            raise IndexStoreError(
                f"{page.document}, page {page.page + 1}, view {view.view + 1}: its vectors must be "
                f"finite numbers within the range of {self._dtype}; check the model's weights"
            )
        return np.ascontiguousarray(stored.numpy())

    def _view_batch(
        self,
        pages: Sequence[PageRecord],
        views: Sequence[ViewRecord],
        vectors: MultiVectors,
        flat: np.ndarray,
    ) -> pa.RecordBatch:
        on_page = [pages[view.page_id - self.num_pages] for view in views]
        columns = [
            np.arange(self.num_views, self.num_views + len(views)),
            [page.document for page in on_page],
            [page.page for page in on_page],
            [view.view for view in views],
            [view.page_id for view in views],
            [view.box for view in views],
            [view.region for view in views],
            [view.size[0] for view in views],
            [view.size[1] for view in views],
            vectors.lengths.numpy(),
        ]
        arrays = [
            pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=False)
        ]
        rows = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), self._dim)
        offsets = pa.array(vectors.offsets.numpy(), pa.int32())
        arrays.append(pa.ListArray.from_arrays(offsets, rows))
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _file_errors(self):
        return file_errors(self._folder, "the index cannot be written")


def _page_batch(pages: Sequence[PageRecord], first: int) -> pa.RecordBatch:
    rows = [
        {
            "id": first + number,
            "document": page.document,
            "page": page.page,
            "height": page.size[0],
            "width": page.size[1],
            "source": page.source,
            "source_bytes": page.source_bytes,
            "source_mtime_ns": page.source_mtime_ns,
            "dpi": page.dpi,
            "preview": page.preview,
        }
        for number, page in enumerate(pages)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=PAGES_SCHEMA)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one build: the lock goes with the process, however that ends."""
    with file_errors(folder, "the index cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in folder.iterdir() if not _is_ours(path)]
        if foreign:
            raise IndexStoreError(
                f"{folder}: holds {foreign[0]!r}, which is no part of an index: name a new folder, "
                "an empty one, or an index to replace"
            )
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IndexStoreError(
                f"{folder}: another build is writing this index: wait for it to end"
            ) from None
        yield
    finally:
        os.close(handle)


def _is_ours(path: Path) -> bool:
    return path.name in (MANIFEST, _ASIDE) or path.name.startswith((_GENERATION, "."))


def _remove_unnamed(folder: Path) -> None:
    """Remove every generation that the manifest does not name."""
    manifest = folder / MANIFEST
    with file_errors(folder, "the index cannot be written"):
        named = manifest.read_text(encoding="utf-8", errors="replace") if manifest.exists() else ""
        (folder / _ASIDE).unlink(missing_ok=True)
        for path in folder.glob(f"{_GENERATION}*"):
            if path.name not in named:
                shutil.rmtree(path)


def _replace_manifest(folder: Path, manifest: Manifest) -> None:
    aside = folder / _ASIDE
    with aside.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / MANIFEST)
