"""Ink and paper in pixels: what differs from the paper, and the tight box around it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

GreyPage = UInt8[np.ndarray, "height width"]
ColourPage = UInt8[np.ndarray, "height width 3"]
InkMask = Bool[np.ndarray, "height width"]
BoxF = tuple[float, float, float, float]
PixelBox = tuple[int, int, int, int]

LEAST_CONTRAST = 32
_INK_SHARE_OF_CONTRAST = 0.2


def to_grey(page: ColourPage | GreyPage) -> GreyPage:
    """Luminance of a page; a page that is grey already is returned as it is."""
    if page.ndim == 2:
        return page
    return np.asarray(Image.fromarray(np.ascontiguousarray(page)).convert("L"))


def common_grey(grey: GreyPage) -> int:
    """The most frequent grey value: the paper, in all but the blackest crops."""
    return int(np.bincount(grey.reshape(-1), minlength=256).argmax())


def ink_mask(grey: GreyPage, paper: int) -> InkMask:
    """Where an image differs from its paper by a good part of its contrast, darker or lighter."""
    contrast = max(paper - int(grey.min()), int(grey.max()) - paper)
    least = max(LEAST_CONTRAST, contrast * _INK_SHARE_OF_CONTRAST)
    return (np.abs(np.arange(256) - paper) > least)[grey]


def tight_box(ink: InkMask) -> PixelBox | None:
    """`(left, top, right, bottom)` around all ink, right and bottom excluded; None without ink."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
