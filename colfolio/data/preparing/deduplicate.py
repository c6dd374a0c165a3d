"""Which images are the same, to the pixel or nearly: digests and perceptual difference hashes.

A difference hash says for a grid of cells whether each is clearly darker than its right neighbour.
Two hashes are compared by the bits in which they differ, as a share of the bits that they have set:
0 is equal, 1 has nothing in common. Measured on 176 manuals: renderings of one page at 72 and 144
dpi differ by at most 0.25, pages of different documents by 0.65 or more; strips that differ by less
than 0.2 show the same text, but for a pair like label and babel. Letters in shapes: n, m images,
w words of 64 bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8, UInt64
from PIL import Image

STRIP_CELLS = (8, 64)
PAGE_CELLS = (64, 64)
# Bits that may differ between near duplicates, as a share of the bits set in both.
MAX_SHARE = {"strip": 0.2, "page": 0.3}
_LENGTH_TOLERANCE = 0.16
_STEP = 4
_INK = 200
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Hashes:
    """Perceptual hashes of many images, and how long each image is.

    Args:
        words: `[n, w]`, bits packed.
        lengths: `[n]`, width over height of what was hashed; never 0.
    """

    words: UInt64[np.ndarray, "n w"]
    lengths: Float32[np.ndarray, " n"]


def pixel_digest(pixels: UInt8[np.ndarray, "height width *channels"]) -> bytes:
    """32 bytes that are equal for images equal in size and in every pixel."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def difference_hash(
    grey: UInt8[np.ndarray, "height width"], cells: tuple[int, int], is_cropped: bool
) -> tuple[bytes, float]:
    """The hash of an image, packed, and the width over the height of what was hashed.

    Args:
        grey: the image, dark on light.
        cells: rows and columns of the grid; their product is the number of bits.
        is_cropped: hash the inked part alone, so that padding and placement may differ; for whole
            pages no, as another page number would shift all the rest.
    """
    height, width = grey.shape
    left, top, right, bottom = _ink_box(grey) if is_cropped else (0, 0, width, height)
    rows, columns = cells
    image = Image.fromarray(grey[top:bottom, left:right])
    small = np.asarray(image.resize((columns + 1, rows), Image.Resampling.BOX), dtype=np.int16)
    is_darker = small[:, 1:] - small[:, :-1] > _STEP
    return np.packbits(is_darker).tobytes(), (right - left) / (bottom - top)


def near_duplicates(
    candidates: Hashes,
    references: Hashes,
    max_share: float,
    tolerance: float = _LENGTH_TOLERANCE,
) -> Bool[np.ndarray, " n"]:
    """Which candidates have a reference with nearly the same hash and about the same length.

    Args:
        candidates: to be judged.
        references: to be compared with; hashes of as many bits.
        max_share: bits that may differ, as a share of the bits set in both together.
        tolerance: lengths may differ by this fraction.
    """
    found = np.zeros(len(candidates.words), dtype=bool)
    if not len(references.words):
        return found
    by_length = np.argsort(references.lengths, kind="stable")
    lengths, words = references.lengths[by_length], references.words[by_length]
    order = np.argsort(candidates.lengths, kind="stable")
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        of_block = candidates.lengths[block]
        first = np.searchsorted(lengths, of_block[0] * (1 - tolerance), side="left")
        last = np.searchsorted(lengths, of_block[-1] * (1 + tolerance), side="right")
        for near in range(int(first), int(last), _BLOCK):
            chosen = slice(near, min(near + _BLOCK, int(last)))
            is_near = _shares(candidates.words[block], words[chosen]) <= max_share
            gap = np.abs(of_block[:, None] - lengths[None, chosen])
            is_near &= gap <= tolerance * lengths[None, chosen]
            found[block] |= is_near.any(axis=1)
    return found


def near_pairs(
    left: Hashes, right: Hashes, max_share: float, tolerance: float = _LENGTH_TOLERANCE
) -> Bool[np.ndarray, "n m"]:
    """Which pairs are near duplicates, by the same measure as `near_duplicates`."""
    gap = np.abs(left.lengths[:, None] - right.lengths[None])
    return (_shares(left.words, right.words) <= max_share) & (gap <= tolerance * right.lengths)


def _shares(
    left: UInt64[np.ndarray, "n w"], right: UInt64[np.ndarray, "m w"]
) -> Float32[np.ndarray, "n m"]:
    differing = np.zeros((len(left), len(right)), dtype=np.uint16)
    for word in range(left.shape[1]):
        differing += np.bitwise_count(left[:, word, None] ^ right[None, :, word])
    of_left, of_right = (np.bitwise_count(words).sum(axis=1) for words in (left, right))
    both = (of_left[:, None] + of_right[None, :]).astype(np.float32)
    return differing / np.maximum(both, 1)


def _ink_box(grey: UInt8[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is darker than paper; the whole image if nothing is."""
    columns = np.flatnonzero(grey.min(axis=0) < _INK)
    rows = np.flatnonzero(grey.min(axis=1) < _INK)
    if not len(columns):
        return 0, 0, grey.shape[1], grey.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
