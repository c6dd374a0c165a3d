"""CSV and JSONL files of (query, image or document page, negatives) as the tables of a dataset.

Columns: `query`; either `image`, or `document` and `page` (from 1); optionally `negatives` (a list,
or names separated by `;`) and `split`. A negative is named like an image, a page of a document as
`report.pdf#page=3`. Paths are relative to the file and stay below its folder.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import pyarrow as pa

from colfolio.data.documents import open_document
from colfolio.data.formats import layout
from colfolio.data.pages.images import IMAGE_SUFFIXES
from colfolio.data.query_text import query_id
from colfolio.errors import DatasetError, DocumentError

DEFAULT_SPLIT = "train"
_PAGE = re.compile(r"^(?P<path>.+)#page=(?P<page>\d+)$")
_FORMATS = ".csv or .jsonl"


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of the file, and what to call it in an error."""

    where: str
    values: dict[str, Any]


@dataclass(slots=True)
class _Collected:
    """Corpus rows by what they show, query texts by id, and judgements."""

    corpus: dict[tuple[str, int], str] = field(default_factory=dict)
    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[tuple[str, str], int] = field(default_factory=dict)


def splits_in(file: Path) -> list[str]:
    """The splits of a file: the values of its `split` column, else the one that its name says."""
    return list(dict.fromkeys(_split_of(line, file) for line in _lines(file)))


def read_file(file: Path, split: str) -> layout.Tables:
    """The rows of one split as tables; equal queries and equal images become one row each.

    Raises:
        DatasetError: the format is unknown, a column is missing, the split does not exist, a path
            leads out of the folder, a file or page does not exist; file and line are named.
    """
    root = file.parent
    place = functools.cache(functools.partial(_place, root))
    same = _SameImages(root)
    collected = _Collected()
    lines = list(_lines(file))
    chosen = [line for line in lines if _split_of(line, file) == split]
    if lines and not chosen:
        found = ", ".join(dict.fromkeys(_split_of(line, file) for line in lines))
        raise DatasetError(
            f"{file}: there is no split {split!r}; splits found: {found}. A column 'split' names "
            "the split of each row; without it the file is one split: that of its name "
            f"(test.csv), else {DEFAULT_SPLIT!r}" + layout.hint_of(split)
        )
    for line in chosen:
        try:
            _collect(line, collected, lambda name: same.first(place(name)))
        except DatasetError as error:
            raise DatasetError(f"{line.where}: {error}") from None
    return _tables(collected, file)


def _lines(file: Path) -> Iterator[_Line]:
    reader = {".csv": _csv_lines, ".jsonl": _json_lines}.get(file.suffix.lower())
    if reader is None:
        raise DatasetError(f"{file}: is of an unknown kind; expected {_FORMATS}")
    try:
        yield from reader(file)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: is not UTF-8 text ({error})") from None
    except csv.Error as error:
        raise DatasetError(f"{file}: is not valid CSV ({error})") from None


def _csv_lines(file: Path) -> Iterator[_Line]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        _check_columns(list(reader.fieldnames or []), str(file))
        for values in reader:
            if None in values:
                raise DatasetError(
                    f"{file}, line {reader.line_num}: has more cells than the header"
                )
            given = {name: value for name, value in values.items() if value}
            yield _Line(f"{file}, line {reader.line_num}", given)


def _json_lines(file: Path) -> Iterator[_Line]:
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{where}: is not valid JSON ({error})") from None
            if not isinstance(values, dict):
                raise DatasetError(f"{where}: expected a JSON object, found {line.strip()[:40]!r}")
            _check_columns(list(values), where)
            yield _Line(where, values)


def _check_columns(found: list[str], where: str) -> None:
    missing = [] if "query" in found else ["'query'"]
    if "image" not in found and not {"document", "page"} <= set(found):
        missing.append("'image' (or 'document' and 'page')")
    if missing:
        raise DatasetError(
            f"{where}: column {' and '.join(missing)} is missing; columns found: "
            f"{', '.join(map(str, found)) or 'none'}"
        )


def _split_of(line: _Line, file: Path) -> str:
    by_name = file.stem if file.stem in layout.SPLITS else DEFAULT_SPLIT
    return str(line.values.get("split") or by_name)


def _collect(line: _Line, collected: _Collected, locate: Callable[[str], tuple[str, int]]) -> None:
    text = " ".join(str(line.values.get("query") or "").split())
    if not text:
        raise DatasetError("the query is empty")
    query = query_id(text)
    collected.queries[query] = text
    wanted = [(_positive(line), 1), *((name, 0) for name in _negatives(line))]
    for name, score in wanted:
        shown = locate(name)
        document = collected.corpus.setdefault(shown, _corpus_id(shown))
        if collected.qrels.setdefault((query, document), score) != score:
            raise DatasetError(f"{name} is both a positive and a negative of {text!r}")


def _positive(line: _Line) -> str:
    image, document = line.values.get("image"), line.values.get("document")
    if image and document:
        raise DatasetError("has both an image and a document; give one of them")
    if image:
        return str(image)
    page = line.values.get("page")
    if not document or page is None:
        raise DatasetError("needs an image, or a document and a page")
    if not str(page).isdecimal():
        raise DatasetError(f"page must be a number from 1, found {page!r}")
    return f"{document}#page={page}"


def _negatives(line: _Line) -> list[str]:
    given = line.values.get("negatives") or []
    names = given.split(";") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"negatives must be a list of names, found {given!r}")
    return [name.strip() for name in names if name.strip()]


def _place(root: Path, name: str) -> tuple[str, int]:
    """The path below the root, with `/`, and the page from 0 that a name means."""
    matched = _PAGE.match(name)
    path = inside(matched["path"] if matched else name, root)
    page = int(matched["page"]) - 1 if matched else 0
    if page < 0:
        raise DatasetError(f"{name}: pages count from 1")
    file = root / path
    if not file.is_file():
        raise DatasetError(f"{path}: there is no such file in {root}")
    is_image = file.suffix.lower() in IMAGE_SUFFIXES
    if not is_image or page:
        try:
            num_pages = _num_pages(file)
        except DocumentError as error:
            raise DatasetError(str(error)) from None
        if page >= num_pages:
            raise DatasetError(f"{path}: has {num_pages} pages, so no page {page + 1}")
    if not is_image and not matched:
        raise DatasetError(f"{path}: is a document; say which page, as in {path}#page=1")
    return path, page


def inside(name: str, root: Path) -> str:
    """A path below the root, relative to it; an absolute path may lead there as well.

    Raises:
        DatasetError: the path contains `..` or leads out of the root.
    """
    path = PurePath(name)
    if path.is_absolute() and path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    if path.is_absolute() or ".." in path.parts:
        raise DatasetError(
            f"{name!r} lies outside the dataset folder {root}; name files by paths inside it, "
            "without '..'"
        )
    return path.as_posix()


@functools.lru_cache(maxsize=1024)
def _num_pages(file: Path) -> int:
    with open_document(file) as document:
        return document.num_pages


class _SameImages:
    """Which of several files with the same bytes came first; only files of equal size are read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._by_size: dict[int, list[str]] = {}
        self._first: dict[str, str] = {}

    def first(self, shown: tuple[str, int]) -> tuple[str, int]:
        """The place under which these bytes were first seen."""
        path, page = shown
        if path not in self._first:
            self._first[path] = self._find(path)
        return self._first[path], page

    def _find(self, path: str) -> str:
        known = self._by_size.setdefault((self._root / path).stat().st_size, [])
        digest = self._digest(path) if known else b""
        same = next((other for other in known if self._digest(other) == digest), path)
        if same == path:
            known.append(path)
        return same

    @functools.cached_property
    def _digests(self) -> dict[str, bytes]:
        return {}

    def _digest(self, path: str) -> bytes:
        if path not in self._digests:
            content = (self._root / path).read_bytes()
            self._digests[path] = hashlib.sha256(content).digest()
        return self._digests[path]


def _corpus_id(shown: tuple[str, int]) -> str:
    path, page = shown
    is_image = PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES
    return path if is_image else f"{path}#p{page + 1}"


def _tables(collected: _Collected, file: Path) -> layout.Tables:
    shown = list(collected.corpus)
    corpus = {
        "corpus-id": list(collected.corpus.values()),
        "image": [{"bytes": None, "path": path} for path, _ in shown],
        "doc-id": [path for path, _ in shown],
        "page-number": [page for _, page in shown],
    }
    queries = {"query-id": list(collected.queries), "query": list(collected.queries.values())}
    qrels = {
        "query-id": [query for query, _ in collected.qrels],
        "corpus-id": [document for _, document in collected.qrels],
        "score": list(collected.qrels.values()),
    }
    tables = []
    for config, columns in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        types = {column.name: column.type for column in layout.COLUMNS[config]}
        arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
        tables.append(pa.table(arrays))
    return layout.Tables(*tables, root=file.parent, name=file.name)
