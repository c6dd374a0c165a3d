"""Crooked scans made level: the slope at which a page's rows are sharpest, and its undoing.

A slope is the rise in pixels a column, positive where lines fall to the right. For the few degrees
of a crooked scan a shear is as good as a rotation, and moves whole columns only.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from colfolio.data.pages.ink import GreyPage, InkMask, PixelBox

_STEEPEST = 0.055  # three degrees
_STEP = 0.004
_FINE_STEP = 0.001
_NUM_BLOCKS = 24
_LEAST_GAIN = 1.05


def slope_of(ink: InkMask) -> float:
    """The slope of a page's lines, 0.0 where level lines are as sharp as any."""
    height, width = ink.shape
    if width < 4 * _NUM_BLOCKS or height < 8:
        return 0.0
    edges = np.arange(_NUM_BLOCKS) * width // _NUM_BLOCKS
    blocks = np.add.reduceat(ink, edges, axis=1, dtype=np.float32).T  # [blocks, height]
    middles = edges + width / (2 * _NUM_BLOCKS)
    level = _sharpness(blocks, middles, 0.0)
    if level >= max(_sharpness(blocks, middles, sign * _STEP) for sign in (-1, 1)):
        return 0.0
    best = _sharpest(blocks, middles, np.arange(-_STEEPEST, _STEEPEST + _STEP, _STEP))
    best = _sharpest(blocks, middles, best + np.arange(-_STEP, _STEP + _FINE_STEP, _FINE_STEP))
    return best if _sharpness(blocks, middles, best) > _LEAST_GAIN * level else 0.0


def sheared(grey: GreyPage, slope: float) -> GreyPage:
    """The page with lines of a slope made level; what enters at an edge repeats that edge."""
    height, width = grey.shape
    falls = _falls(width, slope)
    level = np.empty_like(grey)
    starts = np.flatnonzero(np.diff(falls, prepend=falls[0] - 1))
    for first, end in zip(starts, [*starts[1:], width], strict=True):
        rows = np.clip(np.arange(height) + falls[first], 0, height - 1)
        level[:, first:end] = grey[rows, first:end]
    return level


def box_before_shear(box: PixelBox, shape: tuple[int, int], slope: float) -> PixelBox:
    """Where a box of the sheared page lies on the page as it was."""
    height, width = shape
    left, top, right, bottom = box
    falls = _falls(width, slope)[[left, right - 1]].tolist()
    top, bottom = max(0, top + min(falls)), min(height, bottom + max(falls))
    return left, min(top, height - 1), right, max(bottom, top + 1)


def _falls(width: int, slope: float) -> Int64[np.ndarray, " width"]:
    """How many pixels each column's lines lie below those of the middle column."""
    return np.round((np.arange(width) - width / 2) * slope).astype(np.int64)


def _sharpest(
    blocks: Float32[np.ndarray, "blocks height"], middles: np.ndarray, slopes: np.ndarray
) -> float:
    return float(max(slopes, key=lambda slope: _sharpness(blocks, middles, float(slope))))


def _sharpness(
    blocks: Float32[np.ndarray, "blocks height"], middles: np.ndarray, slope: float
) -> float:
    """How abruptly the ink of a row differs from that of the next, along lines of a slope."""
    profile = np.zeros(blocks.shape[1], np.float32)
    for block, fall in zip(blocks, np.round((middles - middles.mean()) * slope), strict=True):
        profile += np.roll(block, -int(fall))
    return float(np.square(np.diff(profile)).sum())
