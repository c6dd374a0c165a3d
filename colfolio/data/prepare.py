"""Folders of PDFs and images to a dataset: split by family, without leaks, resumable at any moment.

Each document is cut once into a shard below `OUT/.cache`; the dataset is then written from shards.
The result depends on the documents and the settings alone, not on how often the work was cut off
nor on how many processes did it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from colfolio.config import Settings
from colfolio.data import assemble, layout
from colfolio.data.assemble import SplitQueries, SplitRows
from colfolio.data.dataset import qrel_table, query_table
from colfolio.data.documents import content_hash, find_documents
from colfolio.data.layout import SPLITS
from colfolio.data.pairs import StripSettings
from colfolio.data.shards import (
    CutSettings,
    ShardInfo,
    ShardJob,
    build_shard,
    is_whole,
    read_info,
    shard_key,
)
from colfolio.data.workers import run_jobs
from colfolio.errors import DatasetError

MANIFEST = "dataset.json"
_CACHE = ".cache"
_NAMED = 20


class Shares(Settings):
    """What part of the document families goes to each split; their sum is taken as the whole."""

    train: float = Field(default=0.70, ge=0)
    validation: float = Field(default=0.08, ge=0)
    test: float = Field(default=0.22, ge=0)


class PrepareSettings(Settings):
    """How documents become a dataset.

    Args:
        view: "strip": crops of headings, and in the training split strips of words; "page": whole
            pages, and the outline titles that stand on them.
        strips: how strips are cut.
        page_dpi: resolution of whole pages.
        page_format: how whole pages are stored.
        splits: the splits to write; leaving one out never moves a family to another.
        shares: sizes of the splits.
        split_seed: another seed puts families into other splits.
        max_bad_share: more unreadable files than this part of all is an error.
        processes: at most this many work at once; None is one a core.
    """

    view: Literal["strip", "page"] = "strip"
    strips: StripSettings = Field(default_factory=StripSettings)
    page_dpi: float = Field(default=144.0, ge=36, le=600)
    page_format: Literal["png", "jpeg"] = "png"
    splits: tuple[str, ...] = SPLITS
    shares: Shares = Field(default_factory=Shares)
    split_seed: int = 0
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    processes: int | None = Field(default=None, ge=1)

    @property
    def cut(self) -> CutSettings:
        """What decides the content of a shard."""
        return CutSettings(self.view, self.strips, self.page_dpi, self.page_format)


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What one split holds."""

    documents: int
    families: int
    corpus: int
    queries: int
    headings: int
    seen: int | None


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was found, dropped and written.

    Args:
        entries: outline entries of the documents.
        located: entries found on their page; `entries - located` were dropped.
        strips: strips of words cut.
        exact_removed: training images equal to a held-out one.
        near_removed: training images nearly equal to a held-out one.
        merged: images equal to another of their split, made one row with it.
        skipped: files that could not be read, with the reason.
        splits: what each split holds.
    """

    documents: int
    families: int
    pages: int
    entries: int
    located: int
    strips: int
    exact_removed: int
    near_removed: int
    merged: int
    skipped: tuple[tuple[str, str], ...]
    splits: dict[str, SplitCounts]


@dataclass(frozen=True, slots=True)
class _Source:
    """A document: its name in the dataset, its family and split, and its shard."""

    name: str
    path: Path
    family: str
    split: str
    shard: Path


OnProgress = Callable[[int, int, str], None]


def prepare(
    documents: Path,
    out: Path,
    settings: PrepareSettings,
    on_progress: OnProgress | None = None,
) -> PrepareReport:
    """Make a dataset of documents.

    Args:
        documents: a folder, whose first-level folders are document families, or one file.
        out: the dataset folder; a dataset there is replaced at the very end, in one go.
        settings: what is cut and how it is split.
        on_progress: told files done, files in all, and the file just done.

    Raises:
        DocumentError: there are no documents.
        DatasetError: too many unreadable files, no outline, a split without content, a full disk,
            or a folder that holds something else.
    """
    paths = find_documents(documents)
    root = documents if documents.is_dir() else documents.parent
    with layout.disk_errors(out), _locked(out / _CACHE):
        sources = _sources(paths, root, out / _CACHE, settings)
        key = _dataset_key(sources, settings)
        splits, finished = _standing(out, key, settings.splits)
        if finished is not None:
            return finished
        needed = [source for source in sources if source.split in _needed(splits)]
        skipped = _cut(needed, settings, on_progress)
        usable = [source for source in needed if source.name not in dict(skipped)]
        report = _assemble(usable, out, splits, key, skipped)
        _prune(out / _CACHE, sources)
    return report


def split_of(family: str, settings: PrepareSettings) -> str:
    """The split of a document family: its name alone decides, so that other families never do."""
    shares = settings.shares.model_dump()
    digest = hashlib.sha256(f"{settings.split_seed}/{family}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares.values())
    chosen = SPLITS[0]
    for split in SPLITS:
        if shares[split] > 0:
            chosen = split
            if place < shares[split]:
                break
        place -= shares[split]
    return chosen


def _needed(splits: Sequence[str]) -> set[str]:
    """Splits whose rows must be known: training images are compared with all held-out ones."""
    return set(SPLITS) if "train" in splits else set(splits)


def _sources(
    paths: Sequence[Path], root: Path, cache: Path, settings: PrepareSettings
) -> list[_Source]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        contents = list(threads.map(content_hash, paths))
    sources = []
    for path, content in zip(paths, contents, strict=True):
        name = path.relative_to(root).as_posix()
        family = path.stem if path.parent == root else path.relative_to(root).parts[0]
        split = split_of(family, settings)
        shard = cache / f"{shard_key(content, settings.cut, split == 'train')}.parquet"
        sources.append(_Source(name, path, family, split, shard))
    return sorted(sources, key=lambda source: source.name)


def _dataset_key(sources: Sequence[_Source], settings: PrepareSettings) -> str:
    """A hash of all that the dataset depends on, but for which splits are written."""
    dumped = settings.model_dump_json(exclude={"splits", "processes"})
    parts = [dumped, *(f"{each.name}\t{each.split}\t{each.shard.name}" for each in sources)]
    code = [Path(__file__), Path(str(assemble.__file__)), Path(str(layout.__file__))]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _standing(out: Path, key: str, splits: Sequence[str]) -> tuple[list[str], PrepareReport | None]:
    """The splits to write, and the report of the dataset that stands there if nothing is to do."""
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise DatasetError(
            f"splits are {', '.join(SPLITS)}; received {', '.join(splits) or 'none'}"
        )
    layout.recover(out)
    present = layout.splits_in(out)
    manifest = _read_manifest(out)
    if not present:
        return list(splits), None
    if manifest is None:
        raise DatasetError(
            f"{out}: holds a dataset that was not made by `colfolio prepare`; choose another folder"
        )
    if manifest["key"] == key:
        wanted = [split for split in SPLITS if split in {*splits, *present}]
        is_finished = set(splits) <= set(present)
        return wanted, _report_of(manifest["report"]) if is_finished else None
    if not set(present) <= set(splits):
        raise DatasetError(
            f"{out}: holds the splits {', '.join(present)}, made from other documents or settings; "
            f"writing only {', '.join(splits)} would mix them: prepare all or choose another folder"
        )
    return list(splits), None


def _cut(
    sources: Sequence[_Source], settings: PrepareSettings, on_progress: OnProgress | None
) -> list[tuple[str, str]]:
    """Make the shards that are missing; the files that could not be read, with the reason."""
    missing = {source.shard: source for source in sources if not is_whole(source.shard)}
    jobs = sorted(missing.values(), key=lambda source: -source.path.stat().st_size)
    done = len(sources) - len(jobs)

    def tell(number: int) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, len(sources), jobs[number].name)

    if on_progress is not None:
        on_progress(done, len(sources), "")
    reasons = run_jobs(
        build_shard,
        [
            ShardJob(each.path, each.shard, settings.cut, with_words=each.split == "train")
            for each in jobs
        ],
        settings.processes or os.cpu_count() or 1,
        tell,
        lambda _: "crashes the PDF reader",
    )
    bad = {job.shard: reason for job, reason in zip(jobs, reasons, strict=True) if reason}
    skipped = [(source.name, bad[source.shard]) for source in sources if source.shard in bad]
    if len(skipped) > settings.max_bad_share * len(sources):
        listed = "\n".join(f"  {name}: {reason}" for name, reason in skipped[:_NAMED])
        more = f"\n  and {len(skipped) - _NAMED} others" if len(skipped) > _NAMED else ""
        raise DatasetError(
            f"{len(skipped)} of {len(sources)} files cannot be read, more than "
            f"{settings.max_bad_share:.0%}; repair or remove them, or raise max_bad_share:\n"
            f"{listed}{more}"
        )
    return skipped


def _assemble(
    sources: Sequence[_Source],
    out: Path,
    splits: Sequence[str],
    key: str,
    skipped: Sequence[tuple[str, str]],
) -> PrepareReport:
    rows = {
        split: assemble.read_split_rows(
            {source.name: source.shard for source in sources if source.split == split}
        )
        for split in SPLITS
        if split in _needed(splits)
    }
    infos = {source.name: read_info(source.shard) for source in sources}
    _check_headings(sources, infos, rows, splits)
    exact = near = 0
    if "train" in rows:
        held_out = [each for split, each in rows.items() if split != "train"]
        exact, near = assemble.remove_leaks(rows["train"], held_out)
    merged = sum(assemble.merge_equal(rows[split]) for split in splits)
    queries = _queries(rows, splits)
    _check_queries(queries)
    report = PrepareReport(
        documents=len(sources),
        families=len({source.family for source in sources}),
        pages=sum(info.pages for info in infos.values()),
        entries=sum(info.entries for info in infos.values()),
        located=sum(info.located for info in infos.values()),
        strips=sum(
            each.kinds.count("words") + each.kinds.count("rendered") for each in rows.values()
        ),
        exact_removed=exact,
        near_removed=near,
        merged=merged,
        skipped=tuple(skipped),
        splits={split: _counts(sources, split, rows[split], queries[split]) for split in splits},
    )
    _write(out, rows, queries, {"key": key, "report": dataclasses.asdict(report)})
    return report


def _queries(rows: Mapping[str, SplitRows], splits: Sequence[str]) -> dict[str, SplitQueries]:
    queries = {split: assemble.make_queries(rows[split]) for split in splits}
    if "train" in queries:
        for split in queries.keys() - {"train"}:
            queries[split] = assemble.mark_seen(queries[split], queries["train"])
    return {split: queries[split] for split in splits}


def _write(
    out: Path,
    rows: Mapping[str, SplitRows],
    queries: Mapping[str, SplitQueries],
    manifest: dict[str, object],
) -> None:
    gone = [split for split in layout.splits_in(out) if split not in queries]
    with layout.staged(out) as staging:
        for split, asked in queries.items():
            layout.stage_split(
                staging,
                split,
                assemble.corpus_tables(rows[split]),
                query_table(asked.by_key.values()),
                qrel_table(asked.qrels),
            )
        layout.stage_readme(staging, list(queries))
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        staging.path(MANIFEST).write_text(text + "\n", encoding="utf-8")
        staging.commit(
            [layout.file_of(config, split) for split in gone for config in layout.CONFIGS]
        )


def _check_headings(
    sources: Sequence[_Source],
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
            named = ", ".join(families[:_NAMED]) or "none"
            raise DatasetError(
                f"split {split!r} has no heading; its document families: {named}. Add documents "
                f"with outlines, choose another split_seed, or set shares.{split}=0 and leave it "
                "out of splits"
            )


def _check_queries(queries: Mapping[str, SplitQueries]) -> None:
    for split, asked in queries.items():
        if not asked.by_key:
            raise DatasetError(
                f"split {split!r} has no query left once images that also stand in held-out "
                "documents are removed; add documents of other origin"
            )


def _counts(
    sources: Sequence[_Source], split: str, rows: SplitRows, queries: SplitQueries
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


def _read_manifest(out: Path) -> dict | None:
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _report_of(values: dict) -> PrepareReport:
    splits = {split: SplitCounts(**counts) for split, counts in values["splits"].items()}
    skipped = tuple((name, reason) for name, reason in values["skipped"])
    return PrepareReport(**{**values, "splits": splits, "skipped": skipped})


def _prune(cache: Path, sources: Sequence[_Source]) -> None:
    """Drop shards that these documents and settings do not use."""
    used = {source.shard.name for source in sources}
    for path in cache.iterdir():
        if path.name not in used and path.suffix in (".parquet", ".aside"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Keep a second `prepare` out of the same folder; the lock of a killed process is gone."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"{cache.parent}: another prepare is writing there") from None
        yield
