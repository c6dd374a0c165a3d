"""Characters of a page's text layer with their boxes, and the words and lines that they form.

A word is what stands between spaces; a line is a run of words that stand on one level, each to the
right of the one before and not far from it. Text that does not run from left to right on the page
as shown (rotated, mirrored) gives no words.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium
from jaxtyping import Float32, Int64

from colfolio.data.pages.ink import BoxF

_WIDEST_GAP = 2.5
_LEAST_SHARED_HEIGHT = 0.4
_TOLERANCE = 0.002
_HYPHEN_AT_LINE_END = 2
_BREAKS = frozenset(b"\t\n\v\f\r")


@dataclass(frozen=True, slots=True)
class PageText:
    """The text layer of a page in reading order: one box a character, spaces and breaks included.

    Args:
        characters: one code point a box; U+FFFD where the font does not say which.
        boxes: `[characters, 4]`, tight around each glyph; empty boxes for spaces and breaks.
    """

    characters: str
    boxes: Float32[np.ndarray, "characters 4"]


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a page in reading order.

    Args:
        texts: one a word, as the text layer has them.
        spans: `[words, 2]`, first character and the one after the last, in the page's characters.
        boxes: `[words, 4]`, fractions of the page.
        lines: `[words]`, number of the line that a word stands in, never falling.
    """

    texts: list[str]
    spans: Int64[np.ndarray, "words 2"]
    boxes: Float32[np.ndarray, "words 4"]
    lines: Int64[np.ndarray, " words"]

    def __len__(self) -> int:
        return len(self.texts)


def read_page_text(page: pypdfium2.PdfPage) -> PageText:
    """The text layer of an open PDF page, in the order of the file."""
    text = page.get_textpage()
    try:
        codes, edges = _characters(text.raw)
    finally:
        text.close()
    boxes = _shown_boxes(edges, page.get_bbox(), page.get_rotation())
    return PageText("".join(map(_character, _in_byte_order(codes))), boxes)


def words_of(text: PageText, aspect: float) -> Words:
    """The words of a page that run from left to right.

    Args:
        aspect: width of the page divided by its height.
    """
    spans = _word_spans(text.characters)
    if len(spans):
        spans = spans[_runs_rightwards(text.boxes, spans, aspect)]
    if not len(spans):
        return Words([], spans, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    boxes = _joined_boxes(text.boxes, spans)
    on_page = ((boxes >= -_TOLERANCE) & (boxes <= 1 + _TOLERANCE)).all(axis=1)
    spans, boxes = spans[on_page], boxes[on_page].clip(0, 1)
    texts = [text.characters[first:end] for first, end in spans.tolist()]
    return Words(texts, spans, boxes, _line_numbers(boxes, aspect))


def joined_box(boxes: Float32[np.ndarray, "parts 4"]) -> BoxF:
    """The smallest box around all boxes."""
    left, top = boxes[:, :2].min(axis=0).tolist()
    right, bottom = boxes[:, 2:].max(axis=0).tolist()
    return left, top, right, bottom


def _word_spans(characters: str) -> Int64[np.ndarray, "words 2"]:
    solid = np.fromiter((not c.isspace() for c in characters), np.bool_, len(characters))
    edges = np.flatnonzero(np.diff(solid, prepend=False, append=False))
    return edges.reshape(-1, 2).astype(np.int64)


def _runs_rightwards(
    boxes: Float32[np.ndarray, "characters 4"], spans: Int64[np.ndarray, "words 2"], aspect: float
) -> np.ndarray:
    first, last = boxes[spans[:, 0]], boxes[spans[:, 1] - 1]
    across = (last[:, 0] + last[:, 2] - first[:, 0] - first[:, 2]) * aspect
    down = np.abs(last[:, 1] + last[:, 3] - first[:, 1] - first[:, 3])
    has_area = np.logical_and(first[:, 2] > first[:, 0], last[:, 3] > last[:, 1])
    is_single = spans[:, 1] - spans[:, 0] == 1
    return has_area & (is_single | (across > 1.5 * down))


def _joined_boxes(
    boxes: Float32[np.ndarray, "characters 4"], spans: Int64[np.ndarray, "words 2"]
) -> Float32[np.ndarray, "words 4"]:
    """Boxes around ascending spans that do not overlap; characters without area do not count."""
    empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
    low = np.where(empty[:, None], np.float32(np.inf), boxes[:, :2])
    high = np.where(empty[:, None], np.float32(-np.inf), boxes[:, 2:])
    # reduceat wants every start; the stretches between words are computed too, then skipped
    places = spans.reshape(-1)
    places = places[:-1] if places[-1] == len(boxes) else places
    low = np.minimum.reduceat(low, places, axis=0)[::2]
    high = np.maximum.reduceat(high, places, axis=0)[::2]
    return np.concatenate([low, high], axis=1)


def _line_numbers(
    boxes: Float32[np.ndarray, "words 4"], aspect: float
) -> Int64[np.ndarray, " words"]:
    if not len(boxes):
        return np.zeros(0, np.int64)
    before, after = boxes[:-1], boxes[1:]
    heights = np.minimum(before[:, 3] - before[:, 1], after[:, 3] - after[:, 1])
    tallest = np.maximum(before[:, 3] - before[:, 1], after[:, 3] - after[:, 1])
    tallest = np.maximum(tallest, 0.7 * np.median(boxes[:, 3] - boxes[:, 1]))  # dots are low
    shared = np.minimum(before[:, 3], after[:, 3]) - np.maximum(before[:, 1], after[:, 1])
    gap = (after[:, 0] - before[:, 2]) * aspect
    together = (
        (shared > _LEAST_SHARED_HEIGHT * heights)
        & (gap > -0.3 * tallest)
        & (gap < _WIDEST_GAP * tallest)
    )
    return np.concatenate([[0], np.cumsum(~together)]).astype(np.int64)


def _characters(text: object) -> tuple[list[int], Float32[np.ndarray, "characters 4"]]:
    """Code points and `(left, bottom, right, top)` in page coordinates."""
    count = max(0, pdfium.FPDFText_CountChars(text))
    unicode_of, box_of = pdfium.FPDFText_GetUnicode, pdfium.FPDFText_GetCharBox
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    codes = [unicode_of(text, index) for index in range(count)]
    edges = []
    for index in range(count):
        if box_of(text, index, left, right, bottom, top):
            edges.append((left.value, bottom.value, right.value, top.value))
        else:
            edges.append((0.0, 0.0, 0.0, 0.0))
    return codes, np.array(edges, np.float32).reshape(count, 4)


def _in_byte_order(codes: list[int]) -> list[int]:
    """Codes with swapped bytes put right, on pages that hold no East Asian text.

    Some Ghostscript versions wrote the letters of a ligature into a PDF in the wrong byte order:
    "fi" comes out as U+6600 U+6900.
    """
    found = np.array(codes, np.int64)
    swapped = ((found & 0xFF) << 8) | (found >> 8)
    is_asian = (found >= 0x3400) & (found < 0xD800)
    is_latin = (swapped > 0x20) & (swapped < 0x250)
    if not is_asian.any() or (is_asian & ~is_latin).any():
        return codes
    return np.where(is_asian, swapped, found).tolist()


def _character(code: int) -> str:
    if code == _HYPHEN_AT_LINE_END:
        return "-"
    is_control = code < 0x20 and code not in _BREAKS
    is_surrogate = 0xD800 <= code < 0xE000
    return "\ufffd" if is_control or is_surrogate or code > 0x10FFFF else chr(code)


def _shown_boxes(
    edges: Float32[np.ndarray, "characters 4"],
    page: tuple[float, float, float, float],
    rotation: int,
) -> Float32[np.ndarray, "characters 4"]:
    """Page coordinates (origin at the bottom left) to fractions of the page as it is shown."""
    left, bottom, right, top = page
    width, height = max(right - left, 1e-6), max(top - bottom, 1e-6)
    x0, x1 = (edges[:, 0] - left) / width, (edges[:, 2] - left) / width
    y0, y1 = (top - edges[:, 3]) / height, (top - edges[:, 1]) / height
    shown = {
        0: (x0, y0, x1, y1),
        90: (1 - y1, x0, 1 - y0, x1),
        180: (1 - x1, 1 - y1, 1 - x0, 1 - y0),
        270: (y0, 1 - x1, y1, 1 - x0),
    }[rotation]
    return np.stack(shown, axis=1).astype(np.float32)
