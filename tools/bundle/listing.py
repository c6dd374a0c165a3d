"""Copies the chosen extracts into the bundle and lists their sources in SOURCES.md."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tools.bundle.candidate import Candidate
from tools.bundle.text import is_placeholder

PREFACE = """# Sources of the bundled documents

These are extracts of freely licensed documentation: chosen pages, unmodified in appearance, with
the part of the outline that points to them.  Links, annotations, metadata and attachments were
left out and most fonts cut down to the glyphs in use, so every file is a changed version of its
original.  The whole originals, and the sources
from which they were made, are in the named Debian packages (and the source packages of these) of
Debian 12 "bookworm".  Licences were read from the copyright files of the packages; for the TeX Live
packages from the list of licences per TeX package that comes with them.  The texts of the licences
are in the folder `LICENSES`; those of the Creative Commons licences without a file there are at
https://creativecommons.org/licenses/.  `LPPL` alone stands for the LaTeX Project Public License
where the list names no version, `LPPL-1.3` for version 1.3 or later (the text is that of 1.3c).

`python -m tools.bundle` made the extracts and this list.
"""


def deliver(chosen: Sequence[Candidate], staging: Path, target: Path) -> None:
    """Copy the chosen extracts and list their sources; PDFs of an earlier bundle are removed."""
    target.mkdir(parents=True, exist_ok=True)
    for old in sorted(target.glob("*/*.pdf")):
        old.unlink()
    for item in chosen:
        folder = target / item.source.family
        folder.mkdir(exist_ok=True)
        shutil.copyfile(staging / item.staged, folder / f"{item.source.name}.pdf")
    for folder in sorted(target.iterdir()):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    (target / "SOURCES.md").write_text(sources_text(chosen), encoding="utf-8")


def sources_text(chosen: Sequence[Candidate]) -> str:
    """The text of SOURCES.md."""
    rows = [
        "| File | Original | Debian package | Pages | Licence | Copyright or author |",
        "|---|---|---|---|---|---|",
    ]
    for item in chosen:
        source = item.source
        package = f"{source.package} {source.version}"
        if source.project:
            package += f" (TeX package {source.project})"
        pages = f"{_page_ranges(item.pages)} of {item.total_pages}"
        holders = _tidy_holders(source.holders) or "as stated in the original"
        rows.append(
            f"| {source.key}.pdf | {source.original} | {package} | {pages} "
            f"| {source.licence} | {holders} |"
        )
    return PREFACE + "\n" + "\n".join(rows) + "\n"


def _page_ranges(pages: Sequence[int]) -> str:
    """Page indices as ranges that count from 1."""
    ranges: list[list[int]] = []
    for page in pages:
        if ranges and ranges[-1][1] == page:
            ranges[-1][1] = page + 1
        else:
            ranges.append([page + 1, page + 1])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


def _tidy_holders(text: str) -> str:
    """The names of copyright holders without addresses, signs and placeholders."""
    text = re.split(r"`|%|,? \S*@| ,|, \(|, GitHub|, and is|\d{4}", text.replace("|", "/"))[0]
    text = text.strip(" ,;\u00a9")
    return "" if is_placeholder(text) else text
