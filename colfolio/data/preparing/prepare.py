"""Folders of PDFs and images to a dataset: split by family, without leaks, resumable at any moment.

Each document is cut once into a shard below `OUT/.cache`; the dataset is then written from shards.
The result depends on the documents and the settings alone, not on how often the work was cut off
nor on how many processes did it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from colfolio.data.formats import layout
from colfolio.data.formats.layout import SPLITS
from colfolio.data.formats.staging import disk_errors, holds_tables, recover
from colfolio.data.preparing import assemble
from colfolio.data.preparing.assemble import MANIFEST, needed_splits
from colfolio.data.preparing.prepare_report import PrepareReport
from colfolio.data.preparing.shards import ShardJob, build_shard, is_whole
from colfolio.data.preparing.sources import PrepareSettings, Source, find_sources
from colfolio.data.preparing.workers import run_jobs
from colfolio.errors import DatasetError

_CACHE = ".cache"
_MOST_NAMED = 20

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
    with disk_errors(out), _locked(out / _CACHE):
        sources = find_sources(documents, out / _CACHE, settings)
        key = _dataset_key(sources, settings)
        splits, finished = _standing(out, key, settings.splits)
        if finished is not None:
            return finished
        needed = [source for source in sources if source.split in needed_splits(splits)]
        skipped = _cut(needed, settings, on_progress)
        usable = [source for source in needed if source.name not in dict(skipped)]
        report = assemble.assemble(usable, out, splits, key, skipped)
        _prune(out / _CACHE, sources)
    return report


def _dataset_key(sources: Sequence[Source], settings: PrepareSettings) -> str:
    """A hash of all that the dataset depends on, but for which splits are written."""
    dumped = settings.model_dump_json(exclude={"splits", "processes", "max_bad_share"})
    parts = [dumped, *(f"{each.name}\t{each.split}\t{each.shard.name}" for each in sources)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _standing(out: Path, key: str, splits: Sequence[str]) -> tuple[list[str], PrepareReport | None]:
    """The splits to write, and the report of the dataset that stands there if nothing is to do."""
    recover(out)
    present = layout.splits_in(out)
    manifest = _read_manifest(out)
    if manifest is None and holds_tables(out):
        raise DatasetError(
            f"{out}: holds a dataset that was not made by `colfolio prepare`; choose another folder"
        )
    if manifest is not None and manifest["key"] == key:
        wanted = [split for split in SPLITS if split in {*splits, *present}]
        is_finished = set(splits) <= set(present)
        return wanted, PrepareReport.from_dict(manifest["report"]) if is_finished else None
    if not set(present) <= set(splits):
        raise DatasetError(
            f"{out}: holds the splits {', '.join(present)}, made from other documents or settings; "
            f"writing only {', '.join(splits)} would mix them: prepare all or choose another folder"
        )
    return [split for split in SPLITS if split in splits], None


def _cut(
    sources: Sequence[Source], settings: PrepareSettings, on_progress: OnProgress | None
) -> list[tuple[str, str]]:
    """Make the shards that are missing; the files that could not be read, with the reason."""
    missing = {source.shard: source for source in sources if not is_whole(source.shard)}
    jobs = sorted(missing.values(), key=lambda source: _size(source.path), reverse=True)
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
        listed = "\n".join(f"  {name}: {reason}" for name, reason in skipped[:_MOST_NAMED])
        more = f"\n  and {len(skipped) - _MOST_NAMED} others" if len(skipped) > _MOST_NAMED else ""
        raise DatasetError(
            f"{len(skipped)} of {len(sources)} files cannot be read, more than "
            f"{settings.max_bad_share:.0%}; repair or remove them, or raise max_bad_share:\n"
            f"{listed}{more}"
        )
    return skipped


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_manifest(out: Path) -> dict | None:
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _prune(cache: Path, sources: Sequence[Source]) -> None:
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
