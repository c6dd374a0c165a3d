"""From rows of documents to the tables of splits: duplicates out, equal texts made one query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from colfolio.data.dataset import Query
from colfolio.data.preparing.deduplicate import MAX_SHARE, Hashes, near_duplicates
from colfolio.data.preparing.shards import iterate_rows, no_rows, read_rows
from colfolio.data.query_text import query_id, text_key

_DESCRIBING = ["suffix", "texts", "kind", "digest", "hash", "length"]
_KIND_OF_QUERY = {"heading": "heading", "page": "heading", "words": "words"}
_WRITE_BYTES = 32 * 2**20


@dataclass(slots=True)
class SplitRows:
    """The rows of one split, without their images.

    Args:
        shards: document -> its shard, in the order of the rows.
        ids: corpus id of each row.
        texts: what each row shows; none for a page without a title.
        kinds: "heading", "words" or "page".
        digests: of the pixels.
        hashes: perceptual.
        is_kept: False for rows that are removed or merged into an equal one.
        merged_into: id of a merged row -> id of the row it is equal to.
    """

    shards: dict[str, Path]
    ids: list[str]
    texts: list[list[str]]
    kinds: list[str]
    digests: list[bytes]
    hashes: Hashes
    is_kept: Bool[np.ndarray, " rows"]
    merged_into: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SplitQueries:
    """The queries of a split by key, and its judgements."""

    by_key: dict[str, Query]
    qrels: list[tuple[str, str, int]]


def read_split_rows(shards: Mapping[str, Path]) -> SplitRows:
    """The rows of all documents of a split, in the order of the documents."""
    documents = list(shards)
    tables = [read_rows(shards[document], _DESCRIBING) for document in documents]
    ids = [
        f"{document}#{suffix}"
        for document, table in zip(documents, tables, strict=True)
        for suffix in table.column("suffix").to_pylist()
    ]
    table = pa.concat_tables([no_rows(_DESCRIBING), *tables])
    return SplitRows(
        shards=dict(shards),
        ids=ids,
        texts=table.column("texts").to_pylist(),
        kinds=table.column("kind").to_pylist(),
        digests=table.column("digest").to_pylist(),
        hashes=_hashes_of(table),
        is_kept=np.ones(len(ids), dtype=bool),
    )


def remove_leaks(
    rows: SplitRows, held_out: Sequence[SplitRows], copies: Set[str] = frozenset()
) -> tuple[int, int]:
    """Drop rows of a split that equal a held-out row, or nearly so; the counts of both.

    Args:
        rows: its `is_kept` is changed.
        held_out: the splits that keep such a row.
        copies: documents with the bytes of a held-out one; all their rows are dropped.
    """
    known = {digest for others in held_out for digest in others.digests}
    is_exact = np.array(
        [
            digest in known or id_.rpartition("#")[0] in copies
            for id_, digest in zip(rows.ids, rows.digests, strict=True)
        ],
        dtype=bool,
    )
    most = MAX_SHARE["page" if "page" in rows.kinds else "strip"]
    is_near = np.zeros(len(rows.ids), dtype=bool)
    for others in held_out:
        is_near |= near_duplicates(rows.hashes, others.hashes, most)
    rows.is_kept &= ~(is_exact | is_near)
    return int(is_exact.sum()), int((is_near & ~is_exact).sum())


def merge_equal(rows: SplitRows) -> int:
    """Make rows of the same pixels one row, the first; how many were merged into another."""
    first: dict[bytes, str] = {}
    for row in np.flatnonzero(rows.is_kept).tolist():
        id_ = first.setdefault(rows.digests[row], rows.ids[row])
        if id_ != rows.ids[row]:
            rows.is_kept[row] = False
            rows.merged_into[rows.ids[row]] = id_
    return len(rows.merged_into)


def make_queries(rows: SplitRows) -> SplitQueries:
    """One query a text, relevant to every row that shows it; headings first, in order of rows."""
    texts: dict[str, tuple[str, str]] = {}
    judged: dict[tuple[str, str], None] = {}
    for id_, shown, kind, is_kept in zip(
        rows.ids, rows.texts, rows.kinds, rows.is_kept, strict=True
    ):
        target = id_ if is_kept else rows.merged_into.get(id_)
        if target is None:
            continue
        for text in shown:
            key, kind_of_query = text_key(text), _KIND_OF_QUERY[kind]
            if key not in texts or (kind_of_query == "heading" and texts[key][1] != "heading"):
                texts[key] = (text, kind_of_query)
            judged[key, target] = None
    ordered = sorted(texts, key=lambda key: texts[key][1] != "heading")
    by_key = {key: Query(query_id(key), *texts[key]) for key in ordered}
    return SplitQueries(by_key, [(by_key[key].id, target, 1) for key, target in judged])


def mark_seen(queries: SplitQueries, training: SplitQueries) -> SplitQueries:
    """The same queries, each knowing whether its text is also a query of the training split."""
    marked = {
        key: Query(query.id, query.text, query.kind, key in training.by_key)
        for key, query in queries.by_key.items()
    }
    return SplitQueries(marked, queries.qrels)


def corpus_tables(rows: SplitRows) -> Iterator[pa.Table]:
    """The kept rows with their images, as tables of the layout, read shard by shard."""
    start, waiting = 0, []
    for document, shard in rows.shards.items():
        for table in iterate_rows(shard, ["kind", "page", "box", "image"]):
            chosen = slice(start, start + len(table))
            start += len(table)
            ids = pa.array(rows.ids[chosen], pa.string())
            kept = _corpus_table(table, ids, document).filter(pa.array(rows.is_kept[chosen]))
            waiting.append(kept)
            if sum(each.nbytes for each in waiting) >= _WRITE_BYTES:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _corpus_table(table: pa.Table, ids: pa.Array, document: str) -> pa.Table:
    encoded = table.column("image").combine_chunks()
    image = pa.StructArray.from_arrays(
        [encoded, pa.nulls(len(table), pa.string())], names=["bytes", "path"]
    )
    return pa.table(
        {
            "corpus-id": ids,
            "image": image,
            "doc-id": pa.array([document] * len(table), pa.string()),
            "page-number": table.column("page"),
            "box": table.column("box"),
            "kind": table.column("kind"),
        }
    )


def _hashes_of(table: pa.Table) -> Hashes:
    packed = b"".join(table.column("hash").to_pylist())
    words = np.frombuffer(packed, np.uint64).reshape(
        len(table), len(packed) // 8 // max(1, len(table))
    )
    return Hashes(words, np.array(table.column("length").to_pylist(), dtype=np.float32))
