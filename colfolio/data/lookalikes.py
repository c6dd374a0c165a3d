"""Which images of a batch look the same, so that one is no negative of what the other answers."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image

from colfolio.data.dataset import Corpus
from colfolio.data.preparing.deduplicate import (
    MAX_SHARE,
    PAGE_CELLS,
    STRIP_CELLS,
    Hashes,
    difference_hash,
    near_pairs,
    pixel_digest,
)

Likeness = Literal["exact", "near"]
_WORDS = PAGE_CELLS[0] * PAGE_CELLS[1] // 64


class Lookalikes:
    """Hashes of a corpus, taken as its images come by and kept.

    Args:
        likeness: `exact` compares pixels. `near` compares where neighbouring cells get darker: of
            whole pages as they stand, of parts of a page by their ink. It sees no colours.
    """

    def __init__(self, corpus: Corpus, likeness: Likeness) -> None:
        self._is_page = np.array([box is None for box in corpus.boxes])
        self._likeness = likeness
        self._known: dict[int, tuple[np.ndarray, float]] = {}

    def hashes(self, rows: list[int], images: dict[int, UInt8[np.ndarray, "_H _W 3"]]) -> Hashes:
        """The hashes of rows of the corpus, whose images are at hand."""
        for row in rows:
            if row not in self._known:
                self._known[row] = self._hash(row, images[row])
        known = [self._known[row] for row in rows]
        words = [words for words, _ in known] or [np.empty((0, _WORDS), dtype=np.uint64)]
        return Hashes(
            np.concatenate(words), np.array([length for _, length in known], dtype=np.float32)
        )

    def pairs(self, rows: Int64[np.ndarray, " n"], hashes: Hashes) -> Bool[np.ndarray, "n n"]:
        """Which of the rows look the same; each looks like itself, and blank ones like no other.

        A page never looks nearly like a part of one.
        """
        if self._likeness == "exact":
            return (hashes.words[:, None] == hashes.words[None]).all(axis=2)
        is_page = self._is_page[rows]
        same = np.eye(len(rows), dtype=bool)
        for kind, is_kind in (("page", is_page), ("strip", ~is_page)):
            chosen = np.flatnonzero(is_kind & hashes.words.any(axis=1))
            of_kind = Hashes(hashes.words[chosen], hashes.lengths[chosen])
            same[np.ix_(chosen, chosen)] |= near_pairs(of_kind, of_kind, MAX_SHARE[kind])
        return same | same.T

    def _hash(self, row: int, image: np.ndarray) -> tuple[np.ndarray, float]:
        """Words of one width for all rows `[1, w]`, and width over height."""
        if self._likeness == "exact":
            packed, length = pixel_digest(image), 1.0
        else:
            is_page = bool(self._is_page[row])
            cells = PAGE_CELLS if is_page else STRIP_CELLS
            grey = np.asarray(Image.fromarray(image).convert("L"))
            packed, length = difference_hash(grey, cells, is_cropped=not is_page)
        words = np.zeros((1, _WORDS), dtype=np.uint64)
        words[0, : len(packed) // 8] = np.frombuffer(packed, dtype=np.uint64)
        return words, length
