"""Queries, a corpus of images that are decoded when asked for, and which image answers which query.

A dataset is a folder in the ViDoRe/BEIR layout, one of the hub, or a CSV or JSONL file. Pages are
counted from 0.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8
from PIL import Image

from colfolio.data.documents import open_document
from colfolio.data.formats import hub, layout, tabular
from colfolio.data.formats.checks import check_tables
from colfolio.data.formats.conversation_files import refuse_conversations
from colfolio.data.formats.fingerprint import fingerprint_of
from colfolio.data.formats.layout import Tables, optional_column
from colfolio.data.formats.layout_writer import stage_readme, stage_split
from colfolio.data.formats.staging import staged
from colfolio.data.pages.images import IMAGE_SUFFIXES, load_image
from colfolio.data.pages.views import BoxF

PAGE_DPI = 144.0
_BATCH_ROWS = 4096
_Score = TypeVar("_Score", int, float)
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Query:
    """A text that is looked for.

    Args:
        id: unique in its split.
        kind: "heading" or "words" in datasets of our own, "" where the dataset does not say.
        seen: whether the text is also a query of the training split; None where that is not known.
    """

    id: str
    text: str
    kind: str = ""
    seen: bool | None = None


@dataclass(frozen=True, slots=True)
class CorpusRow:
    """One image to be written into a dataset.

    Args:
        id: unique in its split.
        image: an encoded image, as PNG or JPEG.
        document: the document that it shows; of the same name in an index of these documents.
        page: from 0.
        box: what part of the page it shows; None is the whole page.
    """

    id: str
    image: bytes
    document: str
    page: int = 0
    box: BoxF | None = None
    kind: str = ""


class Corpus:
    """The images of a split, encoded as they were stored.

    Args:
        table: columns as in `layout.COLUMNS`.
        root: the folder that image paths are relative to.
    """

    def __init__(self, table: pa.Table, root: Path) -> None:
        self.ids: list[str] = table.column("corpus-id").to_pylist()
        self._table = table
        self._root = root
        self._bytes, self._paths = layout.image_columns(table)

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def documents(self) -> list[str]:
        """The document that each row shows; a row that does not say is a document of its own."""
        given = optional_column(self._table, "doc-id")
        return [
            document if document is not None else id_
            for document, id_ in zip(given, self.ids, strict=True)
        ]

    @functools.cached_property
    def pages(self) -> list[int]:
        """The page of each row, from 0; where that is not known, a negative number of its own."""
        given = optional_column(self._table, "page-number")
        return [page if page is not None else -1 - row for row, page in enumerate(given)]

    @functools.cached_property
    def kinds(self) -> list[str]:
        """What each row shows: "heading", "words", "page"; "" where the dataset does not say."""
        return [kind or "" for kind in optional_column(self._table, "kind")]

    @functools.cached_property
    def boxes(self) -> list[BoxF | None]:
        """The part of its page that each row shows; None is the whole page."""
        return [tuple(box) if box else None for box in optional_column(self._table, "box")]

    @functools.cached_property
    def page_keys(self) -> Int64[np.ndarray, " rows"]:
        """Equal numbers for rows that show the same page of the same document."""
        numbers: dict[tuple[str, int], int] = {}
        pages = zip(self.documents, self.pages, strict=True)
        return np.array([numbers.setdefault(page, len(numbers)) for page in pages], dtype=np.int64)

    def image(self, row: int) -> UInt8[np.ndarray, "height width 3"]:
        """The decoded image of a row.

        Raises:
            DocumentError: the image, or the document that the row names, cannot be read.
        """
        source = self._source(row)
        if isinstance(source, bytes) or _is_image(source):
            return load_image(source)
        with open_document(source) as document:
            return document.render(max(0, self.pages[row]), dpi=PAGE_DPI)

    def image_size(self, row: int) -> tuple[int, int]:
        """Height and width of `image(row)`, from the header of the image where there is one."""
        source = self._source(row)
        if isinstance(source, bytes):
            return _png_size(source) or _header_size(io.BytesIO(source)) or self._decoded_size(row)
        if _is_image(source):
            return _header_size(source) or self._decoded_size(row)
        return self._decoded_size(row)

    def encoded(self, row: int) -> bytes:
        """The image of a row as it is stored, in the table or in a file; of a page, a new PNG.

        A row that names a page of a document is rendered for it.
        """
        source = self._source(row)
        if isinstance(source, bytes):
            return source
        if _is_image(source):
            return source.read_bytes()
        stream = io.BytesIO()
        Image.fromarray(self.image(row)).save(stream, "PNG")
        return stream.getvalue()

    def _decoded_size(self, row: int) -> tuple[int, int]:
        height, width = self.image(row).shape[:2]
        return height, width

    def _source(self, row: int) -> bytes | Path:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)}")
        encoded = self._bytes[row].as_py()
        return encoded if encoded is not None else self._root / self._paths[row].as_py()


class RetrievalDataset:
    """One split: queries, the corpus they are asked of, and relevance judgements.

    Args:
        tables: the split as it was read; what does not fit together is refused here.
        split: its name.

    Attributes:
        qrels: query id -> corpus id -> score; above 0 is relevant, 0 is a judged negative.

    Raises:
        DatasetError: an id occurs twice, a query has no positive, a judgement names an unknown id,
            the corpus or the queries are empty, an image or document lies outside the dataset, an
            image file is missing, a teacher score is not finite or given twice.
    """

    def __init__(self, tables: Tables, split: str) -> None:
        self.name, self.split = tables.name, split
        self._tables = tables
        check_tables(tables, f"{tables.name}, split {split!r}")
        self.corpus = Corpus(tables.corpus, tables.root)
        self.queries = _queries_of(tables.queries)
        self.qrels = _qrels_of(tables.qrels, self.queries)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the content: ids, texts, judgements, teacher scores and encoded images."""
        return fingerprint_of(self._tables)

    @functools.cached_property
    def teacher(self) -> dict[str, dict[str, float]] | None:
        """Query id -> corpus id -> what another model scored; None if the split has no such table.

        It says nothing of pairs that it leaves out, and may leave out queries.
        """
        return None if self._tables.teacher is None else _by_query(self._tables.teacher)

    def positives(self, query_id: str) -> list[str]:
        """The corpus ids that answer a query."""
        return [id_ for id_, score in self.qrels[query_id].items() if score > 0]

    def negatives(self, query_id: str) -> list[str]:
        """The corpus ids that are judged not to answer a query."""
        return [id_ for id_, score in self.qrels[query_id].items() if score <= 0]


def load_dataset(source: str | Path, split: str) -> RetrievalDataset:
    """One split of a dataset.

    Args:
        source: a folder in the ViDoRe/BEIR layout, the id of such a dataset on the hub, or a CSV or
            JSONL file with the columns `query` and `image`, or `document` and `page` (from 1), and
            optionally `negatives` and `split`; its paths are relative to the file.
        split: such as "train" or "test".

    Raises:
        DatasetError: there is no such dataset or split, or its parts do not fit together.
    """
    path = Path(source)
    if path.is_file():
        return RetrievalDataset(tabular.read_file(path, split), split)
    refuse_conversations(path)
    folder = path if path.is_dir() else hub.download(str(source))
    name = path.resolve().name if path.is_dir() else str(source)
    return RetrievalDataset(layout.read_split(folder, split, name), split)


def splits_of(source: str | Path) -> list[str]:
    """The splits of a dataset: train, validation, test, then others by name."""
    path = Path(source)
    if path.is_file():
        return tabular.splits_in(path)
    return layout.splits_in(path if path.is_dir() else hub.download(str(source)))


def write_split(
    folder: Path,
    split: str,
    corpus: Iterable[CorpusRow],
    queries: Iterable[Query],
    qrels: Mapping[str, Mapping[str, int]],
    teacher: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write one split into a dataset folder; its files appear together or not at all.

    Args:
        folder: a new or existing dataset folder; its other splits stay.
        split: replaced if it exists.
        corpus: may be a generator; rows are written as they come.
        queries: each has an entry in `qrels`.
        qrels: query id -> corpus id -> score.
        teacher: likewise, what another model scored; None for no such table.
    """
    others = layout.splits_in(folder) if folder.is_dir() else []
    scored = {*layout.scored_splits_in(folder)} - {split} if folder.is_dir() else set()
    tables = [query_table(queries), qrel_table(_triples(qrels))]
    if teacher is not None:
        tables.append(_score_table(_triples(teacher), layout.TEACHER))
        scored.add(split)
    with staged(folder) as staging:
        stage_split(staging, split, _batches(corpus), *tables)
        stage_readme(staging, sorted({*others, split}), sorted(scored))
        # scores of the images that stood there before are none of those that stand there now
        staging.commit([] if split in scored else [layout.file_of(layout.TEACHER, split)])


def query_table(queries: Iterable[Query]) -> pa.Table:
    """Queries as a table of the layout."""
    rows = list(queries)
    columns = {
        "query-id": [query.id for query in rows],
        "query": [query.text for query in rows],
        "kind": [query.kind or None for query in rows],
        "seen": [query.seen for query in rows],
    }
    return _to_table(columns, "queries")


def qrel_table(triples: Sequence[tuple[str, str, int]]) -> pa.Table:
    """Judgements (query id, corpus id, score) as a table of the layout."""
    return _score_table(triples, "qrels")


def _score_table(triples: Sequence[tuple[str, str, int | float]], config: str) -> pa.Table:
    columns = {
        "query-id": [query for query, _, _ in triples],
        "corpus-id": [document for _, document, _ in triples],
        "score": [score for _, _, score in triples],
    }
    return _to_table(columns, config)


def _triples(scores: Mapping[str, Mapping[str, _Score]]) -> list[tuple[str, str, _Score]]:
    return [(query, id_, score) for query in scores for id_, score in scores[query].items()]


def _batches(corpus: Iterable[CorpusRow]) -> Iterable[pa.Table]:
    rows: list[CorpusRow] = []
    for row in corpus:
        rows.append(row)
        if len(rows) == _BATCH_ROWS:
            yield _corpus_table(rows)
            rows = []
    if rows:
        yield _corpus_table(rows)


def _corpus_table(rows: Sequence[CorpusRow]) -> pa.Table:
    columns = {
        "corpus-id": [row.id for row in rows],
        "image": [{"bytes": row.image, "path": None} for row in rows],
        "doc-id": [row.document for row in rows],
        "page-number": [row.page for row in rows],
        "box": [row.box for row in rows],
        "kind": [row.kind or None for row in rows],
    }
    return _to_table(columns, "corpus")


def _to_table(columns: Mapping[str, list], config: str) -> pa.Table:
    schema = layout.schema_of(config)
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema})


def _queries_of(table: pa.Table) -> list[Query]:
    ids, texts = table.column("query-id").to_pylist(), table.column("query").to_pylist()
    kinds, seen = optional_column(table, "kind"), optional_column(table, "seen")
    return [
        Query(id_, text, kind or "", is_seen)
        for id_, text, kind, is_seen in zip(ids, texts, kinds, seen, strict=True)
    ]


def _qrels_of(table: pa.Table, queries: Sequence[Query]) -> dict[str, dict[str, int]]:
    return {query.id: {} for query in queries} | _by_query(table)


def _by_query(table: pa.Table) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[str, Any]] = {}
    columns = (table.column(name).to_pylist() for name in ("query-id", "corpus-id", "score"))
    for query, document, score in zip(*columns, strict=True):
        scores.setdefault(query, {})[document] = score
    return scores


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width from a PNG's first chunk; None for other formats or with EXIF inside."""
    if not encoded.startswith(_PNG) or b"eXIf" in encoded or b"exif" in encoded:
        return None
    width, height = struct.unpack(">II", encoded[16:24])
    return height, width


def _header_size(source: io.BytesIO | Path) -> tuple[int, int] | None:
    try:
        with Image.open(source) as image:
            if image.format == "TIFF":  # Pillow turns these itself, when depends on its version
                return None
            width, height = image.size
            is_turned = image.getexif().get(0x0112, 1) >= 5
    except (OSError, ValueError, SyntaxError):
        return None
    return (width, height) if is_turned else (height, width)
