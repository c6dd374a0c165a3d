"""Decides whether a PDF is of use, picks its pages, and stages their extract."""

from __future__ import annotations

import dataclasses
import gzip
import io
import re
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

import pikepdf
import pypdfium2

from tools.bundle.candidate import Candidate, Entry, Source
from tools.bundle.extract import write_extract
from tools.bundle.outline import is_contents, page_texts, read_entries
from tools.bundle.resources import image_bytes
from tools.bundle.sources import is_whole
from tools.bundle.text import (
    bare_title,
    copyright_holders,
    english_share,
    listing_share,
    text_marks,
)

MOST_INPUT_BYTES = 20_000_000
MOST_INPUT_PAGES = 800
MOST_PAGES = 16
MOST_PAGE_IMAGE_BYTES = 25_000
LEAST_PAGES = 3
LEAST_HEADINGS = 6

_README = r"readme(\.md|\.txt)?(\.gz)?"
_WAYS_TO_BE_DAMAGED = (
    pikepdf.PdfError,
    pypdfium2.PdfiumError,
    OSError,
    ValueError,
    RecursionError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    subprocess.TimeoutExpired,
)


def examine(path: Path, source: Source, staging: Path) -> Candidate | None:
    """The staged extract of one PDF, or None when it is of no use or damaged (told on stdout)."""
    try:
        return _examine(path, source, staging)
    except _WAYS_TO_BE_DAMAGED as error:
        print(f"skipped {path.name}: {type(error).__name__} {error}"[:160], flush=True)
        return None


def _examine(path: Path, source: Source, staging: Path) -> Candidate | None:
    original = _unpacked(path)
    if len(original) > MOST_INPUT_BYTES:
        return None
    document = pypdfium2.PdfDocument(original)
    texts = _english_texts(document)
    entries = read_entries(document, texts) if texts else []
    if _num_headings(entries) < LEAST_HEADINGS:
        return None
    with pikepdf.open(io.BytesIO(original)) as pdf:
        sizes = [image_bytes(page) for page in pdf.pages]
        author = str(pdf.docinfo.get("/Author", ""))
    heavy = {number for number, size in enumerate(sizes) if size > MOST_PAGE_IMAGE_BYTES}
    pages = list(range(len(texts))) if is_whole(source) else _best_pages(texts, entries, heavy)
    kept = [entry for entry in entries if entry.page in set(pages)]
    if len(pages) < LEAST_PAGES or _num_headings(kept) < LEAST_HEADINGS:
        return None
    target = staging / f"{source.family}--{source.name}.pdf"
    extract = write_extract(original, pages, kept, target)
    holders = source.holders or copyright_holders([*_readmes(path), *texts[:3], *texts[-2:]])
    holders = holders or re.sub(r"\s+", " ", author).strip()
    return Candidate(
        source=dataclasses.replace(source, holders=holders),
        total_pages=len(texts),
        pages=pages,
        entries=extract.entries,
        marks=text_marks(" ".join(texts)),
        fonts=extract.fonts,
        size=extract.size,
        staged=target.name,
    )


def _unpacked(path: Path) -> bytes:
    stored = path.read_bytes()
    return gzip.decompress(stored) if path.suffix == ".gz" else stored


def _english_texts(document: pypdfium2.PdfDocument) -> list[str]:
    """The text of each page, or nothing for a document that is of no use here."""
    count = len(document)
    num_entries = sum(1 for _ in document.get_toc(max_depth=8))
    if not LEAST_PAGES <= count <= MOST_INPUT_PAGES or num_entries < LEAST_HEADINGS:
        return []
    if english_share(" ".join(page_texts(document, range(1, min(count, 8))))) < 0.1:
        return []
    texts = page_texts(document, range(count))
    return texts if english_share(" ".join(texts)) >= 0.14 else []


def _num_headings(entries: Sequence[Entry]) -> int:
    return sum(entry.heading for entry in entries)


def _best_pages(
    texts: Sequence[str], entries: Sequence[Entry], heavy: Collection[int]
) -> list[int]:
    """The pages of prose with the most headings, in the order of the document."""
    titles: dict[int, set[str]] = {}
    for entry in entries:
        if entry.heading and len(entry.title) <= 90:
            titles.setdefault(entry.page, set()).add(bare_title(entry.title))
    scores = {}
    for page, names in titles.items():
        text = texts[page]
        if page in heavy or is_contents(text, page, entries) or len(text) < 500:
            continue
        share, listing = english_share(text), listing_share(text)
        if share < 0.16 or listing > 0.07:
            continue
        scores[page] = min(len(names), 5) + min(1.0, len(text) / 2500) + share - 8 * listing
    ranked = sorted(scores, key=lambda page: (-scores[page], page))
    return sorted(ranked[:MOST_PAGES])


def _readmes(path: Path) -> list[str]:
    """The read-me texts beside a PDF."""
    beside = sorted(path.parent.iterdir())
    named = [item for item in beside if re.fullmatch(_README, item.name.lower())]
    return [_unpacked(item).decode("utf-8", "replace") for item in named if item.is_file()]
