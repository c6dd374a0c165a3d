"""Reading an index: its pages, views and vectors, checked against what the manifest promises."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from colfolio.errors import IndexStoreError
from colfolio.search.layout import PageRecord, file_errors, read_manifest

_READ_ROWS = 8192
_UNREADABLE = "the index is damaged and cannot be read; build it again"


@dataclass(frozen=True, slots=True)
class ViewTable:
    """All views of an index as columns, in order of their ids."""

    page_ids: Int64[Tensor, " views"]
    numbers: Int64[Tensor, " views"]
    boxes: Float[Tensor, "views 4"]
    regions: Float[Tensor, "views 4"]
    sizes: Int64[Tensor, "views 2"]
    lengths: Int64[Tensor, " views"]


class VectorStore:
    """An index on disk, opened for reading: its manifest, pages, views and vectors.

    Raises:
        IndexStoreError: no index is there, it is of another format, or parts of it are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        with file_errors(folder, _UNREADABLE):
            database = lancedb.connect(folder / self.manifest.generation)
            self._pages = database.open_table("pages")
            self._views = database.open_table("views")
            found = (self._pages.count_rows(), self._views.count_rows())
        promised = (self.manifest.num_pages, self.manifest.num_views)
        if found != promised:
            raise IndexStoreError(
                f"{folder}: the index is damaged: {found[0]} pages and {found[1]} views, where its "
                f"manifest promises {promised[0]} and {promised[1]}; build it again"
            )

    def pages(self) -> list[tuple[str, int]]:
        """Document and page (from 0) of every page, in the order of the index."""
        columns = self._columns(self._pages, ["id", "document", "page"])
        return list(zip(columns["document"].to_pylist(), columns["page"].to_pylist(), strict=True))

    def page(self, page_id: int) -> PageRecord:
        """Everything the index knows of one page."""
        with file_errors(self.folder, _UNREADABLE):
            row = self._pages.search().where(f"id = {int(page_id)}").to_list()[0]
        names = ("document", "page", "source", "source_bytes", "source_mtime_ns", "dpi", "preview")
        return PageRecord(size=(row["height"], row["width"]), **{name: row[name] for name in names})

    def views(self) -> ViewTable:
        """All views, without their vectors."""
        names = ["id", "page_id", "view", "box", "region", "height", "width", "length"]
        columns = self._columns(self._views, names)
        table = ViewTable(
            page_ids=_tensor(columns["page_id"]),
            numbers=_tensor(columns["view"]),
            boxes=_boxes(columns["box"]),
            regions=_boxes(columns["region"]),
            sizes=torch.stack([_tensor(columns["height"]), _tensor(columns["width"])], dim=1),
            lengths=_tensor(columns["length"]),
        )
        if int(table.lengths.sum()) != self.manifest.num_vectors:
            raise IndexStoreError(
                f"{self.folder}: the index is damaged: its views name {int(table.lengths.sum())} "
                f"vectors, its manifest {self.manifest.num_vectors}; build it again"
            )
        return table

    def vectors(self) -> Iterator[Float[Tensor, "vectors_of_part dim"]]:
        """The vectors of all views in order, in parts, as stored; checked against the checksum.

        Raises:
            IndexStoreError: they are not the vectors that were written (known after the last part).
        """
        checksum = 0
        with file_errors(self.folder, _UNREADABLE):
            query = self._views.search().select(["vectors"])
            for batch in query.to_batches(batch_size=_READ_ROWS):
                flat = batch.column("vectors").flatten().flatten().to_numpy().copy()
                checksum = zlib.crc32(flat.data, checksum)
                yield torch.from_numpy(flat.reshape(-1, self.manifest.dim))
        if checksum != self.manifest.checksum:
            raise IndexStoreError(
                f"{self.folder}: the index is damaged: its vectors do not have the checksum of "
                "those that were written; build it again"
            )

    def check_encoder(self, dim: int, fingerprint: str, model: str) -> None:
        """Refuse an encoder whose vectors this index does not hold.

        Raises:
            IndexStoreError: the dimension or the model differs.
        """
        if dim != self.manifest.dim:
            raise IndexStoreError(
                f"{self.folder}: holds vectors of {self.manifest.dim} dimensions, but {model} "
                f"makes {dim}: search with the model that made it ({self.manifest.model}), or "
                "build the index again"
            )
        if fingerprint != self.manifest.fingerprint:
            raise IndexStoreError(
                f"{self.folder}: was made by another model ({self.manifest.model}, fingerprint "
                f"{self.manifest.fingerprint}) than {model} (fingerprint {fingerprint}): search "
                "with the model that made it, or build the index again"
            )

    def _columns(self, table: lancedb.table.Table, names: list[str]) -> pa.Table:
        with file_errors(self.folder, _UNREADABLE):
            columns = table.search().select(names).to_arrow()
        if not np.array_equal(columns["id"].to_numpy(), np.arange(len(columns))):
            raise IndexStoreError(
                f"{self.folder}: the index is damaged: ids are not in order; build it again"
            )
        return columns


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of the index."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _boxes(column: pa.ChunkedArray) -> Float[Tensor, "rows 4"]:
    return torch.from_numpy(column.combine_chunks().flatten().to_numpy().copy()).view(-1, 4)


def _tensor(column: pa.ChunkedArray) -> Int64[Tensor, " rows"]:
    return torch.from_numpy(column.to_numpy().astype(np.int64))
