"""A dataset written from the shards of its documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from colfolio.data.dataset import qrel_table, query_table
from colfolio.data.formats import layout
from colfolio.data.formats.layout import SPLITS
from colfolio.data.formats.layout_writer import stage_readme, stage_split
from colfolio.data.formats.staging import staged
from colfolio.data.preparing import split_rows
from colfolio.data.preparing.prepare_report import PrepareReport, SplitCounts
from colfolio.data.preparing.shards import ShardInfo, read_info
from colfolio.data.preparing.sources import Source
from colfolio.data.preparing.split_rows import SplitQueries, SplitRows
from colfolio.errors import DatasetError

MANIFEST = "dataset.json"
_MOST_NAMED = 20


def needed_splits(splits: Sequence[str]) -> set[str]:
    """Splits whose rows must be known: training images are compared with all held-out ones.

    Validation is compared with test where both are written; alone, both are compared with nothing.
    """
    return set(SPLITS) if "train" in splits else set(splits)


def assemble(
    sources: Sequence[Source],
    out: Path,
    splits: Sequence[str],
    key: str,
    skipped: Sequence[tuple[str, str]],
) -> PrepareReport:
    """Write the dataset of these documents and report on it.

    Args:
        sources: readable documents with their shards, of all needed splits.
        out: the dataset folder; its other splits are removed.
        splits: what to write.
        key: goes into the manifest, for the next run to know what stands there.
        skipped: unreadable files with their reason, for the report.

    Raises:
        DatasetError: no document has an outline, a split has no heading, or no query is left.
    """
    rows = {
        split: split_rows.read_split_rows(
            {source.name: source.shard for source in sources if source.split == split}
        )
        for split in SPLITS
        if split in needed_splits(splits)
    }
    infos = {source.name: read_info(source.shard) for source in sources}
    _check_headings(sources, infos, rows, splits)
    exact, near = _remove_leaks(sources, rows, splits)
    merged = sum(split_rows.merge_equal(rows[split]) for split in splits)
    queries = _queries(rows, splits)
    _check_queries(queries)
    report = PrepareReport(
        documents=len(sources),
        families=len({source.family for source in sources}),
        pages=sum(info.pages for info in infos.values()),
        entries=sum(info.entries for info in infos.values()),
        located=sum(info.located for info in infos.values()),
        strips=sum(each.kinds.count("words") for each in rows.values()),
        exact_removed=exact,
        near_removed=near,
        merged=merged,
        skipped=tuple(skipped),
        splits={split: _counts(sources, split, rows[split], queries[split]) for split in splits},
    )
    _write(out, rows, queries, {"key": key, "report": report.to_dict()})
    return report


def _remove_leaks(
    sources: Sequence[Source], rows: Mapping[str, SplitRows], splits: Sequence[str]
) -> tuple[int, int]:
    """Drop from each split to write what also stands in a split behind it; the counts of both."""
    exact = near = 0
    for split in splits:
        behind = [other for other in SPLITS[SPLITS.index(split) + 1 :] if other in rows]
        known = {source.content for source in sources if source.split in behind}
        copies = {source.name for source in sources if source.content in known}
        counts = split_rows.remove_leaks(rows[split], [rows[other] for other in behind], copies)
        exact, near = exact + counts[0], near + counts[1]
    return exact, near


def _queries(rows: Mapping[str, SplitRows], splits: Sequence[str]) -> dict[str, SplitQueries]:
    queries = {split: split_rows.make_queries(rows[split]) for split in splits}
    if "train" in queries:
        for split in queries.keys() - {"train"}:
            queries[split] = split_rows.mark_seen(queries[split], queries["train"])
    return {split: queries[split] for split in splits}


def _write(
    out: Path,
    rows: Mapping[str, SplitRows],
    queries: Mapping[str, SplitQueries],
    manifest: dict[str, object],
) -> None:
    gone = [split for split in layout.splits_in(out) if split not in queries]
    with staged(out) as staging:
        for split, asked in queries.items():
            stage_split(
                staging,
                split,
                split_rows.corpus_tables(rows[split]),
                query_table(asked.by_key.values()),
                qrel_table(asked.qrels),
            )
        stage_readme(staging, list(queries))
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        staging.path(MANIFEST).write_text(text + "\n", encoding="utf-8")
        staging.commit(
            [layout.file_of(config, split) for split in gone for config in layout.CONFIGS]
            # what a teacher scored were other images
            + [layout.file_of(layout.TEACHER, split) for split in [*gone, *queries]]
        )


def _check_headings(
    sources: Sequence[Source],
    infos: Mapping[str, ShardInfo],
    rows: Mapping[str, SplitRows],
    splits: Sequence[str],
) -> None:
    other_way = (
        "Queries are made from outlines (bookmarks). For other queries write a CSV or JSONL file "
        "with the columns query and image (or document and page)"
    )
    if not any(info.entries for info in infos.values()):
        raise DatasetError(f"none of the {len(sources)} documents has an outline. {other_way}")
    if not any(info.located for info in infos.values()):
        raise DatasetError(
            f"none of the {sum(info.entries for info in infos.values())} outline entries stands in "
            f"the text of its page. {other_way}"
        )
    for split in splits:
        families = sorted({source.family for source in sources if source.split == split})
        if not any(
            kind == "heading" or texts
            for kind, texts in zip(rows[split].kinds, rows[split].texts, strict=True)
        ):
            named = ", ".join(families[:_MOST_NAMED]) or "none"
            raise DatasetError(
                f"split {split!r} has no heading; its document families: {named}. Add families "
                "of documents with outlines (each first-level folder is one), choose another "
                "split_seed, or other shares and splits: with the other two shares set to 0 all "
                f"families go to {split!r}"
            )


def _check_queries(queries: Mapping[str, SplitQueries]) -> None:
    for split, asked in queries.items():
        if not asked.by_key:
            raise DatasetError(
                f"split {split!r} has no query left once images that also stand in held-out "
                "documents are removed; add documents of other origin"
            )


def _counts(
    sources: Sequence[Source], split: str, rows: SplitRows, queries: SplitQueries
) -> SplitCounts:
    asked = list(queries.by_key.values())
    is_known = any(query.seen is not None for query in asked)
    return SplitCounts(
        documents=len(rows.shards),
        families=len({source.family for source in sources if source.split == split}),
        corpus=int(rows.is_kept.sum()),
        queries=len(asked),
        headings=sum(query.kind == "heading" for query in asked),
        seen=sum(bool(query.seen) for query in asked) if is_known else None,
    )
