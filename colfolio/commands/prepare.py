"""`colfolio prepare`: documents to a dataset, with a bar, the time left, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from colfolio.commands.console import console
from colfolio.config import apply_override, validated
from colfolio.data.preparing.prepare import prepare
from colfolio.data.preparing.prepare_report import PrepareReport
from colfolio.data.preparing.sources import PrepareSettings


def prepare_command(
    documents: Path,
    out: Path,
    view: str,
    splits: list[str] | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Make a dataset of documents and print what it holds.

    Args:
        documents: a folder whose first-level folders are document families, or one file.
        out: the dataset folder.
        view: "strip" or "page".
        splits: only these; None is all.
        overrides: `key=value` for the settings, as in `strips.strips_per_page=20`.
    """
    values: dict[str, Any] = {"view": view}
    if splits:
        values["splits"] = splits
    for override in overrides:
        apply_override(values, override)
    settings = validated(values, PrepareSettings, "prepare")
    columns = (
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[document]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task("", total=None, document="")

        def show(done: int, total: int, document: str) -> None:
            progress.update(task, completed=done, total=total, document=document)

        report = prepare(documents, out, settings, show)
    _print_report(report, out)


def _print_report(report: PrepareReport, out: Path) -> None:
    console().print(
        f"{report.documents:,} documents of {report.families:,} families, {report.pages:,} pages\n"
        f"{report.located:,} outline titles found on their pages, "
        f"{report.entries - report.located:,} dropped; {report.strips:,} strips of words\n"
        f"removed from a split, as they also stand in one behind it: "
        f"{report.exact_removed:,} equal images, {report.near_removed:,} nearly equal; "
        f"merged within a split: {report.merged:,}"
    )
    table = Table(
        "split", "documents", "families", "images", "queries", "headings", "seen in training"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for split, counts in report.splits.items():
        seen = "" if counts.seen is None else f"{counts.seen:,}"
        numbers = (
            counts.documents,
            counts.families,
            counts.corpus,
            counts.queries,
            counts.headings,
        )
        table.add_row(split, *(f"{number:,}" for number in numbers), seen)
    console().print(table)
    if report.skipped:
        console().print(f"skipped, as they cannot be read: {len(report.skipped)}")
        for document, reason in report.skipped:
            console().print(f"  {document}: {reason}", markup=False)
    console().print(f"written to {out}", markup=False)
