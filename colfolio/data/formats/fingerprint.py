"""A hash of what a split holds, whatever files it was read from and however they are chunked."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions when it is imported, so a type checker cannot know them.

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from colfolio.data.formats.layout import Tables, image_columns


def fingerprint_of(tables: Tables) -> str:
    """SHA-256 over ids, texts, judgements, teacher scores and encoded images, in hexadecimal."""
    digest = hashlib.sha256()
    scored = [] if tables.teacher is None else [tables.teacher]
    for table in (tables.queries, tables.qrels, *scored, tables.corpus):
        for name in sorted(set(table.column_names) - {"image"}):
            digest.update(name.encode())
            _add_column(digest, table.column(name))
    encoded, paths = image_columns(tables.corpus)
    _add_column(digest, encoded)
    for path in paths.filter(encoded.is_null()).unique().to_pylist():
        with (tables.root / path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _add_column(digest: hashlib._Hash, column: pa.ChunkedArray) -> None:
    if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        digest.update(repr(column.to_pylist()).encode())
        return
    lengths = pc.fill_null(pc.binary_length(column).cast(pa.int64()), -1)
    digest.update(lengths.to_numpy().tobytes())
    for chunk in column.chunks:
        _, offsets, content = chunk.drop_null().buffers()
        if content is not None and len(chunk) > chunk.null_count:
            values = chunk.drop_null()
            ends = np.frombuffer(offsets, np.int32)[values.offset :][: len(values) + 1]
            digest.update(memoryview(content)[int(ends[0]) : int(ends[-1])])
