"""What must fit together in the tables of a split; each error names the culprit."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions when it is imported, so a type checker cannot know them.

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.compute as pc

from colfolio.data.formats.layout import Tables, image_columns
from colfolio.errors import DatasetError


def check_tables(tables: Tables, where: str) -> None:
    """Refuse a split whose parts do not fit together.

    Args:
        tables: as they were read.
        where: names the split in errors.

    Raises:
        DatasetError: a table is empty, a value is missing, an id occurs twice or is unknown, a
            query has no positive, an image or a document lies outside the dataset folder, an image
            file is missing, a teacher score is not finite or given twice.
    """
    _check_unique(tables.corpus, "corpus-id", f"{where}: the corpus")
    _check_unique(tables.queries, "query-id", f"{where}: the queries")
    _check_texts(tables.queries, where)
    _check_places(tables, where)
    _check_judgements(tables, where)
    if tables.teacher is not None:
        _check_teacher(tables.teacher, tables, where)


def is_outside(name: str) -> bool:
    """Whether a path is absolute or climbs with `..`, by the rules of any system.

    >>> [is_outside(name) for name in ("a/b.png", "../b.png", "/b.png", r"C:\\\\b.png", "a..b.png")]
    [False, True, True, True, False]
    """
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    is_absolute = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) is not None
    return ".." in parts or is_absolute


def _check_unique(table: pa.Table, column: str, where: str) -> None:
    if not len(table):
        raise DatasetError(f"{where} has no rows in this split")
    _check_present(table, column, where)
    ids = table.column(column)
    if len(ids.unique()) < len(ids):
        twice = [id_ for id_, count in Counter(ids.to_pylist()).items() if count > 1]
        raise DatasetError(
            f"{where}: {column} must be unique, but {_named(twice)} occurs more than once"
        )


def _check_present(table: pa.Table, column: str, where: str) -> None:
    missing = pc.indices_nonzero(table.column(column).is_null())
    if len(missing):
        raise DatasetError(
            f"{where}: {column} is missing in {len(missing)} of {len(table)} rows, first in row "
            f"{missing[0].as_py() + 1}"
        )


def _check_texts(queries: pa.Table, where: str) -> None:
    _check_present(queries, "query", f"{where}: the queries")
    is_blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(queries.column("query"))), 0)
    blank = queries.column("query-id").filter(is_blank).to_pylist()
    if blank:
        raise DatasetError(f"{where}: the text of query {_named(blank)} is empty")


def _check_places(tables: Tables, where: str) -> None:
    encoded, paths = image_columns(tables.corpus)
    is_path = encoded.is_null()
    absent = tables.corpus.column("corpus-id").filter(pc.and_(is_path, paths.is_null()))
    if len(absent):
        raise DatasetError(
            f"{where}: corpus rows {_named(absent.to_pylist())} have neither image bytes nor a path"
        )
    files = paths.filter(is_path).unique().to_pylist()
    named = list(files)
    if "doc-id" in tables.corpus.column_names:
        named += tables.corpus.column("doc-id").drop_null().unique().to_pylist()
    outside = [name for name in named if is_outside(name)]
    if outside:
        raise DatasetError(
            f"{where}: {_named(outside)} lies outside the dataset folder; name images and "
            "documents by paths inside it, without '..' and not absolute"
        )
    missing = [name for name in files if not (tables.root / name).is_file()]
    if missing:
        raise DatasetError(
            f"{where}: the corpus names {_named(missing)}, but these are not files below "
            f"{tables.root}; put them there, or store the images in the table"
        )


def _check_judgements(tables: Tables, where: str) -> None:
    qrels = tables.qrels
    _check_pairs(qrels, tables, f"{where}: qrels")
    pairs = qrels.group_by(["query-id", "corpus-id"]).aggregate([("score", "count_distinct")])
    torn = pairs.filter(pc.greater(pairs.column("score_count_distinct"), 1))
    if len(torn):
        raise DatasetError(
            f"{where}: qrels give different scores for the same image to query "
            f"{_named(torn.column('query-id').to_pylist())}"
        )
    answered = qrels.column("query-id").filter(pc.greater(qrels.column("score"), 0))
    ids = tables.queries.column("query-id")
    lonely = ids.filter(pc.invert(pc.is_in(ids, answered.combine_chunks()))).to_pylist()
    if lonely:
        raise DatasetError(
            f"{where}: every query needs a positive (a judgement above 0 in qrels), but "
            f"{len(lonely)} of {len(ids)} have none: {_named(lonely)}"
        )


def _check_teacher(teacher: pa.Table, tables: Tables, where: str) -> None:
    _check_pairs(teacher, tables, f"{where}: teacher scores")
    ids = teacher.column("query-id")
    wild = ids.filter(pc.invert(pc.is_finite(teacher.column("score")))).to_pylist()
    if wild:
        raise DatasetError(
            f"{where}: {len(wild)} of {len(teacher)} teacher scores are not finite, first for "
            f"query {wild[0]!r}; leave out what the teacher did not score"
        )
    pairs = teacher.group_by(["query-id", "corpus-id"]).aggregate([("score", "count")])
    twice = pairs.filter(pc.greater(pairs.column("score_count"), 1))
    if len(twice):
        raise DatasetError(
            f"{where}: the teacher scores the same image more than once for query "
            f"{_named(twice.column('query-id').unique().to_pylist())}; keep one score of each pair"
        )


def _check_pairs(table: pa.Table, tables: Tables, where: str) -> None:
    """Refuse a table of scores in which something is missing, or an id that the split lacks."""
    for column, known in (("query-id", tables.queries), ("corpus-id", tables.corpus)):
        _check_present(table, column, where)
        given = table.column(column)
        is_known = pc.is_in(given, known.column(column).combine_chunks())
        unknown = given.filter(pc.invert(is_known)).unique().to_pylist()
        if unknown:
            raise DatasetError(
                f"{where} name the {column} {_named(unknown)}, which the split does not have"
            )
    _check_present(table, "score", where)


def _named(ids: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(id_) for id_ in ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} others"
