"""The text and the outline of a PDF, each entry checked against the page that it points to."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pypdfium2

from tools.bundle.candidate import Entry
from tools.bundle.text import bare_title, normalise, num_letters

_PLACE_OF_TOP = {1: 1, 3: 0, 7: 0}  # XYZ, FitH and FitBH: which of their numbers is the height


def page_texts(document: pypdfium2.PdfDocument, pages: Sequence[int]) -> list[str]:
    """The text of each of these pages."""
    return [_page_text(document, page) for page in pages]


def read_entries(document: pypdfium2.PdfDocument, texts: Sequence[str]) -> list[Entry]:
    """The outline entries that have a page.

    Args:
        document: open.
        texts: of all its pages.
    """
    normal = [normalise(text) for text in texts]
    lines = [[bare_title(line) for line in text.splitlines()] for text in texts]
    entries = []
    for bookmark in document.get_toc(max_depth=8):
        title = re.sub(r"\s+", " ", bookmark.get_title() or "").strip()
        destination = bookmark.get_dest()
        page = destination.get_index() if destination else None
        if destination is None or page is None or not 0 <= page < len(texts) or not title:
            continue
        bare = bare_title(title)
        found = num_letters(bare) >= 4 and bare in normal[page]
        heading = found and _is_heading(bare, lines[page])
        entries.append(Entry(title, bookmark.level, page, _top_of(destination), found, heading))
    return entries


def is_contents(text: str, page: int, entries: Sequence[Entry]) -> bool:
    """Whether a page is a table of contents, a list of figures, or an index."""
    if len(re.findall(r"(?:\. ?){4,}", text)) >= 4:
        return True
    flat = normalise(text)
    if re.match(r"(table of )?contents\b|index\b|list of (figures|tables)", flat):
        return True
    titles = {bare_title(entry.title) for entry in entries if abs(entry.page - page) > 1}
    there = sum(len(title) >= 12 and title in flat for title in titles)
    numbered = len(re.findall(r"(?m)[^\d\s]\s+\d{1,3}(?:, ?\d{1,3})*\s*$", text))
    return there >= 6 or numbered >= 16


def _page_text(document: pypdfium2.PdfDocument, number: int) -> str:
    page = document[number]
    textpage = page.get_textpage()
    text = textpage.get_text_range()
    textpage.close()
    page.close()
    return text


def _is_heading(title: str, lines: Sequence[str]) -> bool:
    """Whether the title, or the first line of a long one, stands on a line of its own."""
    return any(line == title or (len(line) >= 24 and title.startswith(line)) for line in lines)


def _top_of(destination: pypdfium2.PdfDest) -> float | None:
    """The height on the page that a destination names, if it names one."""
    mode, numbers = destination.get_view()
    place = _PLACE_OF_TOP.get(mode)
    if place is None or place >= len(numbers) or numbers[place] == 0:
        return None
    return round(float(numbers[place]), 2)
