"""Writes chosen pages of a PDF and their outline into a new file, and nothing else."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pikepdf
import pypdfium2

from tools.bundle.candidate import Entry
from tools.bundle.distil import distil
from tools.bundle.outline import page_texts, read_entries
from tools.bundle.resources import page_fonts

_DROPPED_FROM_PAGES = (
    "/Annots",
    "/Thumb",
    "/StructParents",
    "/B",
    "/AA",
    "/Metadata",
    "/PieceInfo",
    "/Tabs",
)
_DROPPED_FROM_ROOT = ("/Metadata", "/PageMode", "/OpenAction", "/Names", "/AcroForm", "/Outlines")


@dataclass(frozen=True, slots=True)
class Extract:
    """What a written extract holds.

    Args:
        entries: its outline as read from it, with the pages of the original.
        fonts: base names.
        size: bytes.
    """

    entries: list[Entry]
    fonts: list[str]
    size: int


def write_extract(
    original: bytes, pages: Sequence[int], entries: Sequence[Entry], target: Path
) -> Extract:
    """Write pages and the outline entries that point to them.

    Args:
        original: the whole PDF.
        pages: from 0, rising.
        entries: of the original; those of other pages are left out.
        target: replaced if it exists.

    Raises:
        ValueError: the written outline does not read back.
    """
    _copy_pages(original, pages, target)
    distil(target)
    fonts: set[str] = set()
    with pikepdf.open(io.BytesIO(target.read_bytes())) as extract:
        _drop(extract.Root, _DROPPED_FROM_ROOT)
        _drop(extract.trailer, ("/Info", "/ID"))
        _write_outline(extract, entries, pages)
        for page in extract.pages:
            fonts.update(page_fonts(page))
        _save(extract, target)
    return Extract(_read_back(pages, entries, target), sorted(fonts), target.stat().st_size)


def _copy_pages(original: bytes, pages: Sequence[int], target: Path) -> None:
    """Copy pages into a new file without their annotations, metadata and other attachments."""
    with pikepdf.open(io.BytesIO(original)) as source, pikepdf.new() as extract:
        for number in pages:
            page = source.pages[number]
            _drop(page.obj, _DROPPED_FROM_PAGES)
            extract.pages.append(page)
        extract.remove_unreferenced_resources()
        _save(extract, target)


def _drop(dictionary: pikepdf.Object, keys: Sequence[str]) -> None:
    for key in keys:
        if key in dictionary:
            del dictionary[key]


def _save(extract: pikepdf.Pdf, target: Path) -> None:
    """Write a file compactly, the same bytes for the same pages."""
    extract.save(
        target,
        deterministic_id=True,
        object_stream_mode=pikepdf.ObjectStreamMode.generate,
        compress_streams=True,
        recompress_flate=True,
    )


def _write_outline(extract: pikepdf.Pdf, entries: Sequence[Entry], pages: Sequence[int]) -> None:
    """Write the entries of the kept pages as the outline of the extract, nested."""
    place = {page: number for number, page in enumerate(pages)}
    with extract.open_outline() as outline:
        open_items: list[tuple[int, list[pikepdf.OutlineItem]]] = [(-1, outline.root)]
        for entry in entries:
            if entry.page not in place:
                continue
            while open_items[-1][0] >= entry.level:
                open_items.pop()
            if entry.top is None:
                item = pikepdf.OutlineItem(entry.title, place[entry.page], "Fit")
            else:
                item = pikepdf.OutlineItem(entry.title, place[entry.page], "XYZ", top=entry.top)
            open_items[-1][1].append(item)
            open_items.append((entry.level, item.children))


def _read_back(pages: Sequence[int], entries: Sequence[Entry], target: Path) -> list[Entry]:
    """Judge the entries anew by the written file, which is what the demo will read."""
    document = pypdfium2.PdfDocument(target)
    written = read_entries(document, page_texts(document, range(len(document))))
    num_kept = sum(entry.page in set(pages) for entry in entries)
    if len(written) != num_kept:
        raise ValueError(f"outline of {target.name} has {len(written)} of {num_kept} entries")
    return [dataclasses.replace(entry, page=pages[entry.page]) for entry in written]
