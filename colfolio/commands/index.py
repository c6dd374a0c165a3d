"""`colfolio index`: documents in, an index on disk out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from colfolio.commands.console import console
from colfolio.config import validated
from colfolio.models.precision import Precision, autocast
from colfolio.models.retriever import Retriever
from colfolio.search import IndexSettings, build_index
from colfolio.search.index import Progress as BuildProgress
from colfolio.search.layout import Manifest
from colfolio.search.store import size_on_disk


def index_command(
    model: str,
    documents: str | Path,
    out: Path,
    *,
    views: str | None = None,
    split: str | None = None,
    dpi: float | None = None,
    dtype: str | None = None,
    store_pages: bool = True,
    max_bad_share: float = 0.01,
    precision: Precision = "auto",
) -> Manifest:
    """Index all pages of a folder of documents, of one document, or of a dataset's corpus.

    Args:
        model: a checkpoint folder or hub id.
        documents: a folder, a file, or the hub id of a dataset.
        out: the folder of the index; an index that is there is replaced.
        views: `page`, `strips` or `tiles`; None takes what the model was made for.
        split: of a dataset.
        dpi, dtype, store_pages, max_bad_share: see `IndexSettings`; None takes its default.
        precision: of the model's arithmetic; `auto` is bf16 where the machine computes it natively.

    Raises:
        ColfolioError: the documents cannot be read, or the index cannot be written.
    """
    encoder = Retriever.from_pretrained(model)
    wishes = {
        "views": views or encoder.contract.views,
        "dpi": dpi,
        "dtype": dtype,
        "store_pages": store_pages,
        "max_bad_share": max_bad_share,
    }
    known = {name: value for name, value in wishes.items() if value is not None}
    settings = validated(known, IndexSettings, "index")
    origin = str(Path(model).absolute()) if Path(model).is_dir() else model
    begin = time.monotonic()
    with _progress_bar() as on_progress, autocast(precision, encoder.device):
        manifest = build_index(
            encoder, documents, out, settings, model=origin, split=split, on_progress=on_progress
        )
    _print_summary(manifest, out, time.monotonic() - begin)
    return manifest


@contextmanager
def _progress_bar() -> Iterator[Callable[[BuildProgress], None]]:
    columns = (
        TextColumn("indexing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[pages]:,} pages, {task.fields[views]:,} views"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("", total=None, pages=0, views=0)

        def show(progress: BuildProgress) -> None:
            total = None if progress.done is None else 1.0
            bar.update(
                task,
                total=total,
                completed=progress.done or 0.0,
                pages=progress.pages,
                views=progress.views,
            )

        yield show


def _print_summary(manifest: Manifest, out: Path, seconds: float) -> None:
    megabytes = size_on_disk(out) / 1e6
    console().print(
        f"[bold]{escape(str(out))}[/bold]: {manifest.num_pages:,} pages of "
        f"{manifest.num_documents:,} documents as {manifest.num_views:,} views "
        f"({manifest.views}), {manifest.num_vectors:,} vectors of {manifest.dim} "
        f"({manifest.dtype}), {megabytes:,.1f} MB, {seconds:.1f} s, "
        f"{manifest.num_pages / max(seconds, 1e-9):,.1f} pages/s"
    )
    if manifest.skipped:
        console().print(f"[yellow]{len(manifest.skipped)} left out, in whole or in part:[/yellow]")
        for reason in manifest.skipped:
            console().print(f"  {reason}", markup=False)
