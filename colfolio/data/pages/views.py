"""Views of a page, each an image with its box; and the one normalisation of text strips.

A strip is a line of text, or a piece of one, as an image 28 pixels high: paper white, ink black and
20 pixels high, its aspect kept. Heading crops, training strips and the strips that an index finds
on a page all come from `strip_image`, so that what a model learns is what it will see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from colfolio.data.pages.ink import (
    LEAST_CONTRAST,
    BoxF,
    ColourPage,
    GreyPage,
    PixelBox,
    common_grey,
    ink_mask,
    tight_box,
    to_grey,
)
from colfolio.data.pages.lines import PageInk, find_lines, word_runs
from colfolio.data.pages.skew import box_before_shear, sheared, slope_of

STRIP_HEIGHT = 28
STRIP_MAX_WIDTH = 392
WHOLE_PAGE: BoxF = (0.0, 0.0, 1.0, 1.0)

_WIDTH_STEP = 28
_WORD_GAP = 0.15
_WHOLE_UP_TO = 1.3
_ALSO_WHOLE_UP_TO = 1.8


@dataclass(frozen=True, slots=True)
class View:
    """One image of a document, and the part of the page that it shows."""

    image: UInt8[np.ndarray, "height width 3"]
    box: BoxF


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the ink lies in a strip, in pixels; training varies it, indexing never does."""

    ink_height: int = 20
    top: int = 4
    left: int = 4

    @property
    def ink_width(self) -> int:
        """The widest ink that a strip holds without being scaled down."""
        return STRIP_MAX_WIDTH - 2 * self.left


NATURAL = Placement()


def varied_placement(generator: np.random.Generator) -> Placement:
    """A placement a little off the natural one, in size and in both directions."""
    height = int(generator.integers(17, 23))
    top = (STRIP_HEIGHT - height) // 2 + int(generator.integers(-2, 3))
    return Placement(height, top, int(generator.integers(2, 11)))


def strip_image(
    page: ColourPage | GreyPage, box: BoxF, placement: Placement = NATURAL
) -> UInt8[np.ndarray, "28 strip_width 3"]:
    """A line of text, or a piece of one, as a strip.

    The ink's rows are scaled to `placement.ink_height` at natural aspect; a line too wide for
    `STRIP_MAX_WIDTH` is scaled down as a whole and lies in the middle of its rows. White fills the
    right side to a multiple of 28 pixels.

    Args:
        page: RGB or grey; dark or tinted paper becomes white, and light ink black.
        box: tight around the ink, as `snap_to_ink` gives it.
    """
    left, top, right, bottom = _pixel_box(page, box)
    above = min(top, 3)
    grey = to_grey(page[top - above : bottom + 3, left:right])
    crop = grey[above : above + bottom - top]
    scale = min(placement.ink_height / (bottom - top), placement.ink_width / (right - left))
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    resized = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
    ink = _black_on_white(np.asarray(resized), _paper_around(grey, above, bottom - top))
    full = min(STRIP_MAX_WIDTH, -(-(width + 2 * placement.left) // _WIDTH_STEP) * _WIDTH_STEP)
    strip = np.full((STRIP_HEIGHT, full), 255, np.uint8)
    row = min(placement.top + (placement.ink_height - height) // 2, STRIP_HEIGHT - height)
    strip[row : row + height, placement.left : placement.left + width] = ink
    return np.repeat(strip[:, :, None], 3, axis=2)


def snap_to_ink(page: ColourPage | GreyPage, box: BoxF) -> BoxF | None:
    """The box drawn tight around the ink that lies in it, or None where there is none."""
    left, top, right, bottom = _pixel_box(page, box)
    left, top = max(0, left - 1), max(0, top - 1)
    grey = to_grey(page[top : bottom + 1, left : right + 1])
    tight = tight_box(ink_mask(grey, common_grey(grey)))
    if tight is None:
        return None
    return _fractions(page, (left + tight[0], top + tight[1], left + tight[2], top + tight[3]))


def find_strips(page: ColourPage | GreyPage) -> list[View]:
    """The lines of text found in a page's pixels, as strips.

    A line up to 1.3 times too wide for one strip is scaled down. A wider one is cut at gaps between
    words into overlapping pieces, as wide as fits, that begin about half a strip after one another:
    a phrase of up to half a strip lies whole in at least one of them. Up to 1.8 times too wide, as
    long headings are, it also gives one strip of the whole line. The lines of a crooked scan are
    made level first (up to three degrees); boxes are those of the page as it was given.
    """
    ink = PageInk.of(to_grey(page))
    slope = slope_of(ink.ink)
    if slope:
        ink = PageInk.of(sheared(ink.grey, slope))
    views = []
    for line in find_lines(ink):
        for part in _pieces(ink, line):
            image = strip_image(ink.grey, _fractions(page, part))
            place = box_before_shear(part, ink.grey.shape, slope) if slope else part
            views.append(View(image, _fractions(page, place)))
    return views


def page_views(page: ColourPage, kind: Literal["page", "strips", "tiles"]) -> list[View]:
    """What of a page enters an index: the whole of it, its strips, or four overlapping tiles.

    Tiles are two by two; each covers 55 % of the width and of the height, so that neighbours share
    a tenth of the page and what lies on a cut stands whole in one of them.
    """
    if kind == "page":
        return [View(page, WHOLE_PAGE)]
    if kind == "strips":
        return find_strips(page)
    height, width = page.shape[:2]
    views = []
    for top, bottom in _halves(height):
        for left, right in _halves(width):
            box = _fractions(page, (left, top, right, bottom))
            views.append(View(page[top:bottom, left:right].copy(), box))
    return views


def strip_width(box: BoxF, aspect: float) -> float:
    """Pixels that the ink of a box takes in a strip at natural scale; the page's width / height."""
    return (box[2] - box[0]) * aspect / (box[3] - box[1]) * NATURAL.ink_height


def _pieces(page: PageInk, line: PixelBox) -> list[PixelBox]:
    """A line that fits a strip as it is; else overlapping pieces with cuts at the widest gaps."""
    left, top, right, bottom = line
    most = NATURAL.ink_width * (bottom - top) / NATURAL.ink_height
    if right - left <= _WHOLE_UP_TO * most:
        return [line]
    words = word_runs(page.ink[top:bottom, left:right], _WORD_GAP * (bottom - top))
    starts, ends = words[:, 0], words[:, 1]
    gaps = np.concatenate([[right - left], starts[1:] - ends[:-1], [right - left]])
    steps = int(np.ceil((right - left - most) / (0.5 * most)))
    pieces = [line] if right - left <= _ALSO_WHOLE_UP_TO * most else []
    for step in range(steps):
        begin = step * (right - left - most) / steps
        slack = 0.1 * most if step else 0.0
        first = _widest_gap(gaps[:-1], starts, begin - slack, begin + slack)
        limit = starts[first] + most
        last = max(first, _widest_gap(gaps[1:], ends, limit - 0.12 * most, limit))
        pieces.append((left + int(starts[first]), top, left + int(ends[last]), bottom))
    begin = right - left - most
    first = _widest_gap(gaps[:-1], starts, begin, begin + 0.12 * most)
    pieces.append((left + int(starts[first]), top, right, bottom))
    return list(dict.fromkeys(pieces))


def _widest_gap(gaps: np.ndarray, places: np.ndarray, low: float, high: float) -> int:
    """Of the places in a range the one at the widest gap; without any, the nearest outside."""
    first = int(np.searchsorted(places, low, side="left"))
    end = int(np.searchsorted(places, high, side="right"))
    if first >= end:
        return min(max(0, end - 1), len(places) - 1)
    return first + int(np.argmax(gaps[first:end]))


def _halves(length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    size = min(length, round(length * 0.55) + 1)
    return (0, size), (length - size, length)


def _pixel_box(page: np.ndarray, box: BoxF) -> PixelBox:
    height, width = page.shape[:2]
    left, right = max(0, round(box[0] * width)), min(width, round(box[2] * width))
    top, bottom = max(0, round(box[1] * height)), min(height, round(box[3] * height))
    if right <= left or bottom <= top:
        raise ValueError(f"box {box} holds no pixel of a page of {width} x {height} pixels")
    return left, top, right, bottom


def _fractions(page: np.ndarray, box: PixelBox) -> BoxF:
    height, width = page.shape[:2]
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _paper_around(grey: GreyPage, above: int, height: int) -> int:
    """The paper's grey, read from the rows above and below the ink where there are any."""
    around = np.concatenate([grey[:above], grey[above + height :]])
    return common_grey(around if around.size else grey)


def _black_on_white(ink: GreyPage, paper: int) -> GreyPage:
    darkest, lightest = int(ink.min()), int(ink.max())
    blackest = darkest if paper - darkest >= lightest - paper else lightest
    if abs(paper - blackest) < LEAST_CONTRAST:
        return np.full_like(ink, 255)
    table = (np.arange(256) - blackest) * (255 / (paper - blackest))
    return np.clip(table, 0, 255).astype(np.uint8)[ink]
