"""Pairs of a text and its picture, cut out of PDFs: headings by their outline title, and words.

The text layer says what stands where; the picture is what `views.strip_image` makes of the ink at
that place, so a pair looks exactly like a strip that an index finds on a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from colfolio.config import Settings
from colfolio.data.documents import Document, OutlineEntry, content_hash, open_document
from colfolio.data.pages.ink import BoxF, GreyPage
from colfolio.data.pages.text_layer import Words, joined_box, words_of
from colfolio.data.pages.titles import clean_text, locate_titles
from colfolio.data.pages.views import (
    NATURAL,
    snap_to_ink,
    strip_image,
    strip_width,
    varied_placement,
)

_LEAST_LETTERS = 4
_WORD_COUNTS = (0.12, 0.20, 0.22, 0.18, 0.12, 0.08, 0.05, 0.03)


class StripSettings(Settings):
    """How pairs are cut out of documents.

    Args:
        dpi: resolution at which pages are rendered; at 144, 10-point text needs hardly any scaling.
        strips_per_page: strips of words taken from a page, at most.
        words_per_strip: words in such a strip, at most; short strips are more frequent.
        seed: with the document's content and the page it decides which words, and their jitter.
        jitter: vary size and place of the ink in strips of words, so that a model tolerates it.
        partial: of some strips of words only a part is the query, as a title is part of its line.
    """

    dpi: float = Field(default=144.0, ge=36, le=600)
    strips_per_page: int = Field(default=45, ge=0)
    words_per_strip: int = Field(default=8, ge=1, le=len(_WORD_COUNTS))
    seed: int = Field(default=0, ge=0)
    jitter: bool = True
    partial: bool = True


@dataclass(frozen=True, slots=True)
class Pair:
    """A text, and the picture of that text on a page."""

    text: str
    kind: Literal["heading", "words"]
    page: int
    box: BoxF
    image: UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, slots=True)
class PageTitle:
    """An outline title that stands on the page to which its entry points."""

    text: str
    page: int


def strip_pairs(path: Path, settings: StripSettings, with_words: bool) -> list[Pair]:
    """The headings of a document with their crops; also strips of consecutive words if wanted.

    Titles that do not stand on their page, or stand there only in a table of contents, are left
    out; an image and a PDF without outline have no headings.

    Raises:
        DocumentError: the document, or one of its pages, cannot be read.
    """
    content = int(content_hash(path)[:16], 16)
    pairs: list[Pair] = []
    with open_document(path) as document:
        titles = _titles_by_page(document.outline())
        for page in range(document.num_pages):
            if not with_words and page not in titles:
                continue
            words = _words(document, page)
            if not len(words):
                continue
            pixels = document.render_grey(page, dpi=settings.dpi)
            pairs += _headings(pixels, words, titles.get(page, []), page)
            if with_words:
                generator = np.random.default_rng([settings.seed, content, page])
                pairs += _word_strips(pixels, words, page, settings, generator)
    return pairs


def page_titles(path: Path) -> list[PageTitle]:
    """The outline titles that stand on the page to which they point, as the page spells them.

    Raises:
        DocumentError: the document, or one of its pages, cannot be read.
    """
    found: dict[PageTitle, None] = {}
    with open_document(path) as document:
        for page, entries in sorted(_titles_by_page(document.outline()).items()):
            for place in locate_titles(_words(document, page), entries):
                found[PageTitle(place.text, page)] = None
    return list(found)


def _titles_by_page(entries: Sequence[OutlineEntry]) -> dict[int, list[OutlineEntry]]:
    titles: dict[int, list[OutlineEntry]] = {}
    for entry in entries:
        titles.setdefault(entry.page, []).append(entry)
    return titles


def _words(document: Document, page: int) -> Words:
    width, height = document.page_size(page)
    return words_of(document.text_boxes(page), width / height)


def _headings(
    pixels: GreyPage, words: Words, entries: Sequence[OutlineEntry], page: int
) -> list[Pair]:
    pairs = []
    for place in locate_titles(words, entries):
        box = snap_to_ink(pixels, place.box)
        if box is not None:
            pairs.append(Pair(place.text, "heading", page, box, strip_image(pixels, box)))
    return pairs


def _word_strips(
    pixels: GreyPage,
    words: Words,
    page: int,
    settings: StripSettings,
    generator: np.random.Generator,
) -> list[Pair]:
    aspect = pixels.shape[1] / pixels.shape[0]
    runs = _runs(words, aspect, settings.words_per_strip, generator)
    chosen = generator.permutation(len(runs))[: settings.strips_per_page]
    pairs = []
    for first, end in (runs[row] for row in sorted(chosen.tolist())):
        asked = slice(*_asked_for(first, end, generator)) if settings.partial else slice(first, end)
        text = clean_text(" ".join(words.texts[asked]))
        box = snap_to_ink(pixels, joined_box(words.boxes[first:end]))
        if box is None or not is_readable(text):
            continue
        if generator.random() < 0.5:
            box = _with_rows_of_line(pixels, words, first, box)
        placement = varied_placement(generator) if settings.jitter else NATURAL
        pairs.append(Pair(text, "words", page, box, strip_image(pixels, box, placement)))
    return pairs


def _runs(
    words: Words, aspect: float, most: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Every line cut into runs of random length that fit a strip; runs of unreadable words fall."""
    weights = np.array(_WORD_COUNTS[:most])
    lengths = generator.choice(most, size=max(1, len(words)), p=weights / weights.sum()) + 1
    is_last = np.append(np.diff(words.lines) > 0, True)
    ends = np.flatnonzero(is_last)[np.searchsorted(np.flatnonzero(is_last), range(len(words)))] + 1
    runs, first = [], 0
    while first < len(words):
        end = min(first + int(lengths[first]), int(ends[first]))
        while end > first + 1 and not _fits(words, first, end, aspect):
            end -= 1
        if _fits(words, first, end, aspect) and is_readable(" ".join(words.texts[first:end])):
            runs.append((first, end))
        first = end
    return runs


def _asked_for(first: int, end: int, generator: np.random.Generator) -> tuple[int, int]:
    """The words of a run that its query names: all, or in a third of longer runs, most of them."""
    spare = (end - first) // 3
    if not spare or generator.random() < 0.67:
        return first, end
    before = int(generator.integers(0, spare + 1))
    return first + before, end - int(generator.integers(0, spare - before + 1))


def _fits(words: Words, first: int, end: int, aspect: float) -> bool:
    return strip_width(joined_box(words.boxes[first:end]), aspect) <= NATURAL.ink_width


def is_readable(text: str) -> bool:
    """Whether a text is made of words: mostly letters, at least four, nothing unmapped.

    >>> [is_readable(text) for text in ("Figure 2.1 shows", "= 4.0", "the", "a \ufffd b cde")]
    [True, False, False, False]
    """
    letters = sum(character.isalpha() for character in text)
    solid = sum(not character.isspace() for character in text)
    return (
        letters >= _LEAST_LETTERS
        and letters >= 0.6 * solid
        and text.isprintable()
        and ("\ufffd" not in text)
    )


def _with_rows_of_line(pixels: GreyPage, words: Words, first: int, box: BoxF) -> BoxF:
    members = np.flatnonzero(words.lines == words.lines[first])
    line = snap_to_ink(pixels, joined_box(words.boxes[members]))
    if line is None:
        return box
    return box[0], min(line[1], box[1]), box[2], max(line[3], box[3])
