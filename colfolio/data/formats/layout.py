"""The ViDoRe/BEIR Parquet layout: its columns, and the tables of a split read from a folder.

A dataset folder holds `corpus/`, `queries/` and `qrels/`, one or more Parquet files a split in
each, and a README whose `configs:` tell `datasets` where they are. A split may have a table in
`teacher/` as well: what another model scored, for distillation.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from colfolio.data.formats.staging import present
from colfolio.errors import DatasetError

CONFIGS = ("corpus", "queries", "qrels")
TEACHER = "teacher"  # a split may lack it
SPLITS = ("train", "validation", "test")
_FILE_NAME = re.compile(r"^(?P<split>.+?)(?:-\d{5}-of-\d{5}.*)?\.parquet$")
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the layout: its name, the other names it goes by, its type."""

    name: str
    aliases: tuple[str, ...]
    type: pa.DataType
    feature: dict[str, Any]
    is_required: bool = True


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_BOX = pa.list_(pa.float32())
_BOX_FEATURE = {"feature": _value("float32"), "_type": "Sequence"}
_QUERY_ID = Column("query-id", ("query_id", "_id", "id"), pa.string(), _value("string"))
_CORPUS_ID = Column("corpus-id", ("corpus_id", "_id", "id"), pa.string(), _value("string"))
_DOC_ID = ("doc_id",)
_PAGE = ("page_number", "page_number_in_doc", "page")
COLUMNS: dict[str, tuple[Column, ...]] = {
    "corpus": (
        _CORPUS_ID,
        Column("image", (), _IMAGE, {"_type": "Image"}),
        Column("doc-id", _DOC_ID, pa.string(), _value("string"), is_required=False),
        Column("page-number", _PAGE, pa.int64(), _value("int64"), is_required=False),
        Column("box", (), _BOX, _BOX_FEATURE, is_required=False),
        Column("kind", (), pa.string(), _value("string"), is_required=False),
    ),
    "queries": (
        _QUERY_ID,
        Column("query", ("text",), pa.string(), _value("string")),
        Column("kind", (), pa.string(), _value("string"), is_required=False),
        Column("seen", (), pa.bool_(), _value("bool"), is_required=False),
    ),
    "qrels": (
        Column("query-id", ("query_id",), pa.string(), _value("string")),
        Column("corpus-id", ("corpus_id",), pa.string(), _value("string")),
        Column("score", (), pa.int64(), _value("int64")),
    ),
    TEACHER: (
        Column("query-id", ("query_id",), pa.string(), _value("string")),
        Column("corpus-id", ("corpus_id",), pa.string(), _value("string")),
        Column("score", (), pa.float32(), _value("float32")),
    ),
}


def schema_of(config: str) -> pa.Schema:
    """The Arrow schema of a table, with the features that `datasets` reads."""
    columns = COLUMNS[config]
    features = {column.name: column.feature for column in columns}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.schema([(column.name, column.type) for column in columns], metadata=metadata)


def file_of(config: str, split: str) -> str:
    """Where the table of a split stands in its folder."""
    return f"{config}/{split}-00000-of-00001.parquet"


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of a split under their own column names, and where they came from.

    Args:
        corpus: columns as in `COLUMNS`; optional ones may be missing.
        queries: likewise.
        qrels: likewise.
        root: the folder that image paths are relative to.
        name: the dataset's name, for people.
        teacher: columns as in `COLUMNS`; None if nobody scored the split.
    """

    corpus: pa.Table
    queries: pa.Table
    qrels: pa.Table
    root: Path
    name: str
    teacher: pa.Table | None = None


def splits_in(folder: Path) -> list[str]:
    """The splits that all three tables of a folder have: train, validation, test, then others."""
    files = _split_files(folder)
    return ordered(set.intersection(*(set(files[config]) for config in CONFIGS)))


def scored_splits_in(folder: Path) -> list[str]:
    """The splits that have teacher scores, in the order of `splits_in`."""
    return ordered(_split_files(folder)[TEACHER])


def read_split(folder: Path, split: str, name: str) -> Tables:
    """The tables of one split.

    Raises:
        DatasetError: the split does not exist (those that do are listed), a file is damaged, a
            column is missing or of the wrong type.
    """
    files = _split_files(folder)
    for config in CONFIGS:
        if split not in files[config]:
            found = ", ".join(ordered(files[config])) or "none"
            raise DatasetError(
                f"{name}: there is no split {split!r} of {config!r}; splits found: {found}"
                + hint_of(split)
            )
    tables = [_read_table(files[config][split], config) for config in CONFIGS]
    scored = files[TEACHER].get(split)
    teacher = _read_table(scored, TEACHER) if scored else None
    return Tables(*tables, root=folder, name=name, teacher=teacher)


def hint_of(split: str) -> str:
    """What to do about a split that is missing, as the end of an error; often nothing."""
    if split != "validation":
        return ""
    return "; set validation.split=null in the recipe to train without one"


def read_readme(path: Path) -> tuple[dict[str, Any], str]:
    """The YAML front matter of a dataset's README, empty if there is none, and the text below."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}, text
    try:
        values = yaml.safe_load(found.group(1))
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}, text[found.end() :]


def optional_column(table: pa.Table, name: str) -> list:
    """The values of a column, or as many None where the table has no such column."""
    return table.column(name).to_pylist() if name in table.column_names else [None] * len(table)


def image_columns(corpus: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The encoded bytes and the paths of a corpus; one of both is null in each row."""
    flat = corpus.select(["image"]).flatten()
    return flat.column(0), flat.column(1)


def ordered(splits: Iterable[str]) -> list[str]:
    """Split names in their usual order: train, validation, test, then others by name."""
    known = {split: place for place, split in enumerate(SPLITS)}
    return sorted(splits, key=lambda split: (known.get(split, len(SPLITS)), split))


def _split_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Parquet files by config and split: as the README says, else by their names."""
    files = present(folder)
    patterns = _patterns(files.get("README.md"))
    found: dict[str, dict[str, list[Path]]] = {}
    for config in (*CONFIGS, TEACHER):
        found[config] = {
            split: [files[name] for name in sorted(files) if _matches(name, wanted)]
            for split, wanted in patterns.get(config, {}).items()
        }
        found[config] = {split: some for split, some in found[config].items() if some}
        if not found[config]:
            found[config] = _by_name(files, config)
    return found


def _patterns(readme: Path | None) -> dict[str, dict[str, list[str]]]:
    patterns: dict[str, dict[str, list[str]]] = {}
    matter, _ = read_readme(readme) if readme is not None else ({}, "")
    for config in matter.get("configs") or []:
        try:
            entries = config["data_files"]
            patterns[config["config_name"]] = {
                entry["split"]: [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
                for entry in entries
            }
        except (TypeError, KeyError):  # another of the forms that the hub allows: go by file names
            continue
    return patterns


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return name.endswith(".parquet") and any(fnmatch.fnmatch(name, each) for each in patterns)


def _by_name(present: dict[str, Path], config: str) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name in sorted(present):
        path = PurePosixPath(name)
        matched = _FILE_NAME.match(path.name)
        if matched and path.parent == PurePosixPath(config):
            found.setdefault(matched["split"], []).append(present[name])
    return found


def _read_table(files: Sequence[Path], config: str) -> pa.Table:
    parts = [_read_file(file, config) for file in files]
    return pa.concat_tables(parts, promote_options="default")


def _read_file(file: Path, config: str) -> pa.Table:
    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            names = _column_names(parquet.schema_arrow.names, file, config)
            table = parquet.read(columns=list(names.values()))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as Parquet ({error})") from None
    columns = {}
    for column in COLUMNS[config]:
        if column.name in names:
            columns[column.name] = _cast(table.column(names[column.name]), column, file)
    return pa.table(columns)


def _column_names(given: Sequence[str], file: Path, config: str) -> dict[str, str]:
    """Our name -> the name in the file, of every column that is there."""
    names = {}
    for column in COLUMNS[config]:
        name = next((each for each in (column.name, *column.aliases) if each in given), None)
        if name is not None:
            names[column.name] = name
        elif column.is_required:
            raise DatasetError(
                f"{file}: column {column.name!r} is missing; columns found: {', '.join(given)}; "
                f"a {config} file needs "
                + ", ".join(repr(each.name) for each in COLUMNS[config] if each.is_required)
            )
    return names


def _cast(values: pa.ChunkedArray, column: Column, file: Path) -> pa.ChunkedArray:
    try:
        if column.type == _IMAGE:
            return _image_column(values)
        return values.cast(column.type)
    except (pa.ArrowException, KeyError) as error:
        raise DatasetError(
            f"{file}: column {column.name!r} is of type {values.type}, which does not fit "
            f"{column.type} ({error})"
        ) from None


def _image_column(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Images as a struct of bytes and path, from such a struct, bare bytes, or bare paths."""
    if pa.types.is_struct(values.type):
        names = [field.name for field in values.type]
        if names == ["bytes", "path"]:
            return values.cast(_IMAGE)
        chunks = [
            pa.StructArray.from_arrays(
                [
                    chunk.field(name).cast(kind) if name in names else pa.nulls(len(chunk), kind)
                    for name, kind in (("bytes", pa.binary()), ("path", pa.string()))
                ],
                names=["bytes", "path"],
            )
            for chunk in values.chunks
        ]
        return pa.chunked_array(chunks, type=_IMAGE)
    is_path = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    chunks = []
    for chunk in values.cast(pa.string() if is_path else pa.binary()).chunks:
        absent = pa.nulls(len(chunk), pa.binary() if is_path else pa.string())
        fields = [absent, chunk] if is_path else [chunk, absent]
        chunks.append(pa.StructArray.from_arrays(fields, names=["bytes", "path"]))
    return pa.chunked_array(chunks, type=_IMAGE)
