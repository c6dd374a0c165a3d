"""Lines of text found in the pixels of a page: a recursive XY cut over projection profiles.

Nothing here reads a text layer: a scan gives lines as a printed page does. A page is cut at empty
rows and at wide empty columns until a part cannot be cut further. A part that is no line yet is
opened up where possible: frames and rules are erased, a panel of another colour gets its own paper,
lines that touch are parted at the valley between them. What then does not look like a line of text
(rules, dots, figures) is dropped. Lengths are in points, on a page whose longer side is taken to
measure 11 inches, so that one set of limits serves every resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from colfolio.data.pages.ink import GreyPage, InkMask, PixelBox, common_grey, ink_mask, tight_box

_LONG_SIDE_PT = 792.0
_GUTTER_PT = 8.0
_LINE_HEIGHT_PT = (3.5, 60.0)
_LEAST_WIDTH_PT = 8.0
_USUAL_HEIGHT_PT = 9.0
_INK_SHARE = (0.04, 0.7)
_DEEPEST = 16


@dataclass(frozen=True, slots=True)
class PageInk:
    """A page's pixels while it is cut; the ink of opened parts is changed in place."""

    grey: GreyPage
    ink: InkMask
    point: float

    @classmethod
    def of(cls, grey: GreyPage) -> PageInk:
        """A page whose paper is its most frequent grey."""
        sample = np.ascontiguousarray(grey[::4, ::4])
        return cls(grey, ink_mask(grey, common_grey(sample)), max(grey.shape) / _LONG_SIDE_PT)


def find_lines(page: PageInk) -> list[PixelBox]:
    """Boxes of the lines of text on a page, tight around their ink, from top to bottom by part."""
    height, width = page.grey.shape
    parts: list[PixelBox] = []
    _cut(page, (0, 0, width, height), parts, 0)
    heights = [
        bottom - top for left, top, right, bottom in parts if right - left > 3 * (bottom - top)
    ]
    usual = float(np.median(heights)) if heights else _USUAL_HEIGHT_PT * page.point
    lines = []
    for part in parts:
        is_block = part[3] - part[1] > 1.6 * usual and part[2] - part[0] > 3 * usual
        for line in _parted(page, part) if is_block else [part]:
            if _is_line(page, line):
                lines.append(line)
    return lines


def word_runs(ink: InkMask, least_gap: float) -> Int64[np.ndarray, "runs 2"]:
    """First column and the one after the last of each stretch of ink between wide enough gaps."""
    return _runs(_filled(ink, 0), least_gap)


def _cut(page: PageInk, box: PixelBox, parts: list[PixelBox], depth: int) -> None:
    """Cut at empty rows, then each band at wide empty columns, and so on; uncut parts are added."""
    left, top, right, bottom = box
    bands = _runs(_filled(page.ink[top:bottom, left:right], 1), 1.0)
    for first, end in bands.tolist():
        row, row_end = top + first, top + end
        columns = _columns(page, page.ink[row:row_end, left:right])
        for column, column_end in columns.tolist():
            part = (left + column, row, left + column_end, row_end)
            was_cut = len(bands) + len(columns) > 2
            if depth < _DEEPEST and (was_cut or _opened(page, part)):
                _cut(page, part, parts, depth + 1)
            else:
                parts.append(part)


def _columns(page: PageInk, band: InkMask) -> Int64[np.ndarray, "runs 2"]:
    """Where a band is cut into columns; a gap inside a single line has to be wider."""
    height, gutter = len(band), _GUTTER_PT * page.point
    filled = _filled(band, 0)
    if height < 2.5 * gutter:
        return _runs(filled, max(gutter, 2.0 * height))
    columns = _runs(filled, gutter)
    if (
        len(columns) > 1
        and height < _LINE_HEIGHT_PT[1] * page.point
        and _is_one_line(band, columns)
    ):
        return _runs(filled, max(gutter, 1.2 * height))
    return columns


def _is_one_line(band: InkMask, columns: Int64[np.ndarray, "runs 2"]) -> bool:
    """Whether the parts of a tall band are words in large type, all on one level."""
    tops, bottoms = [0], [len(band)]
    for first, end in columns.tolist():
        if end - first < 0.5 * len(band):
            continue
        rows = _runs(_filled(band[:, first:end], 1), 1.0)
        sizes = rows[:, 1] - rows[:, 0]
        largest = int(sizes.argmax())
        if (sizes > 0.5 * sizes[largest]).sum() > 1:
            return False
        tops.append(int(rows[largest, 0]))
        bottoms.append(int(rows[largest, 1]))
    return min(bottoms) - max(tops) > 0.2 * len(band)


def _opened(page: PageInk, part: PixelBox) -> bool:
    """Erase what binds a part together; whether anything was erased."""
    left, top, right, bottom = part
    height, width = bottom - top, right - left
    if height < _LINE_HEIGHT_PT[0] * page.point or width < _LEAST_WIDTH_PT * page.point:
        return False
    ink = page.ink[top:bottom, left:right]
    if ink.mean() > _INK_SHARE[1] and height > 6 * page.point:
        return _panel_opened(page, part)
    rows = ink.mean(axis=1) > 0.85 if width > 3 * height or width > 72 * page.point else None
    columns = ink.mean(axis=0) > 0.85 if height > 18 * page.point else None
    erased = False
    if rows is not None and rows.any():
        ink[rows] = False
        erased = True
    if columns is not None and columns.any():
        ink[:, columns] = False
        erased = True
    return erased


def _panel_opened(page: PageInk, part: PixelBox) -> bool:
    """Give a filled panel its own paper, so that the text on it becomes the ink."""
    left, top, right, bottom = part
    grey = np.ascontiguousarray(page.grey[top:bottom, left:right])
    inner = ink_mask(grey, common_grey(grey))
    if inner.mean() > 0.5:
        return False
    edge = max(1, round(page.point))
    inner[:edge] = inner[-edge:] = False
    inner[:, :edge] = inner[:, -edge:] = False
    page.ink[top:bottom, left:right] = inner
    return True


def _parted(page: PageInk, part: PixelBox) -> list[PixelBox]:
    """A part cut at the valleys between its dense rows: lines whose letters touch each other."""
    left, top, right, bottom = part
    ink = page.ink[top:bottom, left:right]
    blur = max(1, round(1.5 * page.point))
    profile = np.convolve(ink.mean(axis=1), np.full(blur, 1 / blur), mode="same")
    dense = _runs(profile > 0.55 * profile.max(), 2.0 * page.point)
    cuts = [0]
    for (_, first), (end, _) in zip(dense[:-1].tolist(), dense[1:].tolist(), strict=True):
        lowest = first + int(np.argmin(profile[first:end]))
        if profile[lowest] < 0.45 * profile.max():
            cuts.append(lowest)
    boxes = []
    for first, end in zip(cuts, [*cuts[1:], bottom - top], strict=True):
        tight = tight_box(ink[first:end])
        if tight is not None:
            x0, y0, x1, y1 = tight
            boxes.append((left + x0, top + first + y0, left + x1, top + first + y1))
    return boxes


def _is_line(page: PageInk, box: PixelBox) -> bool:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    least, greatest = (limit * page.point for limit in _LINE_HEIGHT_PT)
    if not least <= height <= greatest or width < max(0.8 * height, _LEAST_WIDTH_PT * page.point):
        return False
    return _INK_SHARE[0] <= float(page.ink[top:bottom, left:right].mean()) <= _INK_SHARE[1]


def _filled(ink: InkMask, axis: int) -> Bool[np.ndarray, " length"]:
    return np.logical_or.reduce(ink, axis=axis)


def _runs(filled: Bool[np.ndarray, " length"], least_gap: float) -> Int64[np.ndarray, "runs 2"]:
    """Stretches of true values; those nearer than `least_gap` are joined."""
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)).astype(np.int64)
    starts, ends = edges[::2], edges[1::2]
    if len(starts) < 2:
        return np.stack([starts, ends], axis=1)
    apart = starts[1:] - ends[:-1] >= least_gap
    return np.stack([starts[np.append(True, apart)], ends[np.append(apart, True)]], axis=1)
