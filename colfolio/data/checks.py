"""What must fit together in the tables of a split, each with an error that names the culprit."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.compute as pc

from colfolio.data.layout import Tables, image_columns
from colfolio.errors import DatasetError


def _check_ids(tables: Tables, where: str) -> None:
    for table, column, what in (
        (tables.corpus, "corpus-id", "the corpus"),
        (tables.queries, "query-id", "the queries"),
    ):
        if not len(table):
            raise DatasetError(f"{where}: {what} of this split has no rows")
        _check_nulls(table, (column,), where)
        ids = table.column(column)
        if len(ids.unique()) < len(ids):
            twice = [id_ for id_, count in Counter(ids.to_pylist()).items() if count > 1]
            raise DatasetError(
                f"{where}: {column} must be unique, but {_named(twice)} occurs more than once"
            )
    _check_nulls(tables.qrels, ("query-id", "corpus-id", "score"), where)
    for column, known in (("query-id", tables.queries), ("corpus-id", tables.corpus)):
        given = tables.qrels.column(column)
        unknown = given.filter(pc.invert(pc.is_in(given, known.column(column).combine_chunks())))
        if len(unknown):
            raise DatasetError(
                f"{where}: qrels name {column} {_named(unknown.unique().to_pylist())}, which "
                f"the split does not have"
            )


def _check_nulls(table: pa.Table, columns: Sequence[str], where: str) -> None:
    for column in columns:
        missing = pc.indices_nonzero(table.column(column).is_null())
        if len(missing):
            raise DatasetError(
                f"{where}: {column} is empty in row {missing[0].as_py() + 1}"
                f" and {len(missing) - 1} others; each row needs one"
            )


def _check_places(tables: Tables, where: str) -> None:
    image = tables.corpus.column("image")
    encoded, paths = pc.struct_field(image, 0), pc.struct_field(image, 1)
    without = pc.and_(pc.is_null(encoded), pc.is_null(paths))
    if pc.any(without).as_py():
        row = pc.index(without, True).as_py()
        id_ = tables.corpus.column("corpus-id")[row].as_py()
        raise DatasetError(f"{where}: corpus row {id_!r} has neither image bytes nor a path")
    used = paths.filter(pc.is_null(encoded))
    named = used.unique().to_pylist()
    if "doc-id" in tables.corpus.column_names:
        named += tables.corpus.column("doc-id").drop_null().unique().to_pylist()
    for name in named:
        if is_outside(name):
            raise DatasetError(
                f"{where}: {name!r} lies outside the dataset folder; name images and documents by "
                "paths inside it, without '..' and not absolute"
            )


def is_outside(name: str) -> bool:
    """Whether a path is absolute or climbs with `..`, by the rules of any system."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    return (
        ".." in parts
        or name.startswith(("/", "\\"))
        or re.match(r"[A-Za-z]:[\\/]", name) is not None
    )


def _named(ids: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(id_) for id_ in ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} others"


