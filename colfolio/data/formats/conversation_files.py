"""Files of conversations, Parquet or JSONL, as one Arrow table a split, checked as a whole."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions when it is imported, so a type checker cannot know them.

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from colfolio.data.formats.layout import CONFIGS, hint_of, ordered
from colfolio.data.formats.tabular import inside
from colfolio.errors import DatasetError

SEEN = ("image", "video", "frames")
TEXTS = ("question", "answer")
SECONDS = "seconds_per_frame"
_COLUMNS = (*TEXTS, *SEEN, SECONDS)
_PATTERNS = (
    "{split}.jsonl",
    "{split}.parquet",
    "{split}-*-of-*.parquet",
    "data/{split}-*-of-*.parquet",
    "{split}/*.parquet",
    "{split}/*.jsonl",
)


def read_table(folder: Path, split: str) -> pa.Table:
    """The rows of a split, whose values and paths are all there.

    Raises:
        DatasetError: there is no such folder or split, it is a dataset for retrieval, a file is
            damaged, a row lacks a text or what is seen or has two of it, or names a file that is
            not there or lies outside of the folder.
    """
    _check_folder(folder)
    files = _files(folder, split)
    if not files:
        found = ", ".join(splits_in(folder)) or "none"
        raise DatasetError(
            f"{folder}: there is no split {split!r} of conversations ({split}.jsonl, or Parquet "
            f"files of that name); splits found: {found}" + hint_of(split)
        )
    if len({file.suffix for file in files}) > 1:
        named = ", ".join(str(file.relative_to(folder)) for file in files)
        raise DatasetError(f"{folder}: split {split!r} is in JSONL and in Parquet: {named}")
    try:
        table = pa.concat_tables([_read(file) for file in files], promote_options="default")
    except pa.ArrowException as error:
        raise DatasetError(f"{folder}: files of split {split!r} do not fit: {error}") from None
    where = f"{folder.resolve().name}, split {split!r}"
    _check_texts(table, where)
    _check_seen(table, where)
    _check_paths(table, folder, where)
    return table


def splits_in(folder: Path) -> list[str]:
    """The splits of conversations in a folder; none if it is another dataset, or no folder."""
    if not folder.is_dir() or _is_retrieval(folder):
        return []
    names = {path.name.split(".")[0].split("-")[0] for path in folder.glob("*")}
    names |= {path.name.split("-")[0] for path in folder.glob("data/*.parquet")}
    return ordered(
        split
        for split in names - {"data"}  # a folder of all splits
        if any(set(TEXTS) <= set(_column_names(file)) for file in _files(folder, split)[:1])
    )


def refuse_conversations(folder: Path) -> None:
    """Refuse a folder of conversations where a dataset for retrieval is needed.

    Raises:
        DatasetError: it is one.
    """
    splits = splits_in(folder)
    if splits:
        raise DatasetError(
            f"{folder}: holds conversations (question and answer, splits {', '.join(splits)}), and "
            "train.objective retrieval learns from queries and the pages that answer them; set "
            "train.objective to generation, or name a dataset for retrieval"
        )


def _is_retrieval(folder: Path) -> bool:
    return any((folder / config).is_dir() for config in CONFIGS)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: conversations are a folder with train.jsonl or Parquet files, and this is "
            "no folder"
        )
    if _is_retrieval(folder):
        raise DatasetError(
            f"{folder}: is a dataset for retrieval ({', '.join(CONFIGS)}), and train.objective "
            "generation learns from conversations: rows of question, answer and image, video or "
            "frames; set train.objective to retrieval, or name a folder of conversations"
        )


def _files(folder: Path, split: str) -> list[Path]:
    found = [sorted(folder.glob(pattern.format(split=split))) for pattern in _PATTERNS]
    return [file for files in found for file in files]


def _column_names(file: Path) -> list[str]:
    """Columns of a file, as its first line or its schema tells; of a damaged one none."""
    try:
        if file.suffix == ".parquet":
            return pq.read_schema(file).names
        with file.open(encoding="utf-8-sig") as text:
            return list(json.loads(next(text, "{}")))
    except (pa.ArrowException, OSError, ValueError, TypeError):
        return []


def _read(file: Path) -> pa.Table:
    if file.suffix == ".jsonl":
        return _read_lines(file)
    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            names = parquet.schema_arrow.names
            return parquet.read(columns=[name for name in _COLUMNS if name in names])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as Parquet ({error})") from None


def _read_lines(file: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{file}, line {number}: is not valid JSON ({error})") from None
            if not isinstance(values, dict):
                raise DatasetError(f"{file}, line {number}: expected a JSON object")
            rows.append(values)
    try:
        columns = {name: pa.array([row.get(name) for row in rows]) for name in _COLUMNS}
    except (pa.ArrowException, TypeError) as error:
        raise DatasetError(f"{file}: a column holds values of several kinds ({error})") from None
    return pa.table(
        {name: each for name, each in columns.items() if not pa.types.is_null(each.type)}
    )


def _check_texts(table: pa.Table, where: str) -> None:
    if not len(table):
        raise DatasetError(f"{where}: has no rows")
    for name in TEXTS:
        if name not in table.column_names:
            raise DatasetError(
                f"{where}: column {name!r} is missing; columns found: "
                f"{', '.join(table.column_names) or 'none'}"
            )
        values = table.column(name)
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise DatasetError(f"{where}: column {name!r} must hold texts, holds {values.type}")
        _refuse(pc.is_null(values), f"{where}: {name} is missing")
    answers = pc.utf8_length(pc.utf8_trim_whitespace(table.column("answer")))
    _refuse(pc.equal(answers, 0), f"{where}: the answer is empty, so nothing is to be learnt")


def _check_seen(table: pa.Table, where: str) -> None:
    given = [
        table.column(name).is_valid().to_numpy() for name in SEEN if name in table.column_names
    ]
    count = np.sum(given, axis=0) if given else np.zeros(len(table), dtype=np.int64)
    rule = f"{where}: a row has one of {', '.join(SEEN)}"
    _refuse(pa.array(count != 1), rule)
    if "frames" in table.column_names:
        lengths = pc.list_value_length(table.column("frames"))
        _refuse(pc.equal(lengths, 0), f"{where}: a clip has at least one frame")
    if SECONDS in table.column_names:
        seconds = table.column(SECONDS).cast(pa.float64())
        is_fit = pc.and_(pc.is_finite(seconds), pc.greater(seconds, 0.0))
        _refuse(pc.invert(is_fit), f"{where}: {SECONDS} is above 0 and finite")


def _check_paths(table: pa.Table, folder: Path, where: str) -> None:
    for name in SEEN:
        if name in table.column_names:
            for path in _paths(table.column(name), f"{where}: column {name!r}"):
                if not (folder / inside(path, folder)).is_file():
                    raise DatasetError(f"{where}: there is no file {path!r} in {folder}")


def _paths(values: pa.ChunkedArray, where: str) -> list[str]:
    """The files that a column names, each once."""
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _paths(pc.list_flatten(values), where)
    if pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}:
        is_stored = pc.struct_field(values, "bytes").is_valid()
        named = pc.struct_field(values, "path").filter(pc.invert(is_stored))
        return named.drop_null().unique().to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values.drop_null().unique().to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return []
    raise DatasetError(f"{where} must hold paths or encoded images, holds {kind}")


def _refuse(is_wrong: Any, rule: str) -> None:
    rows: Sequence[int] = pc.indices_nonzero(pc.fill_null(is_wrong, False)).to_pylist()
    if rows:
        raise DatasetError(f"{rule}; {len(rows)} rows do not, the first is row {rows[0] + 1}")
