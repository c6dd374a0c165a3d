"""Images of a corpus, read once each and up to a bound, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from colfolio.data.dataset import Corpus
from colfolio.data.preparing.deduplicate import pixel_digest
from colfolio.errors import DocumentError


@dataclass(frozen=True, slots=True)
class SeenImage:
    """What is kept of an image: its height and width, its digest, whether it is one colour."""

    size: tuple[int, int]
    digest: bytes
    is_blank: bool


class ReadImages:
    """Reads images until there are so many, or so many pixels; the bound depends on no clock.

    Args:
        most_images, most_pixels: after which nothing more is read.

    Attributes:
        seen: by row of the corpus; unreadable ones are not among them.
    """

    def __init__(self, corpus: Corpus, most_images: int, most_pixels: int) -> None:
        self._corpus = corpus
        self._left_images, self._left_pixels = most_images, most_pixels
        self.seen: dict[int, SeenImage] = {}

    def read(self, rows: Iterable[int]) -> None:
        """Read rows in their order, those that are not known."""
        for row in rows:
            if self._left_images <= 0 or self._left_pixels <= 0:
                return
            if row not in self.seen:
                self._read(row)

    def digests_of(self, rows: Iterable[int]) -> set[bytes]:
        """Of those rows that could be read."""
        return {self.seen[row].digest for row in rows if row in self.seen}

    def _read(self, row: int) -> None:
        self._left_images -= 1
        try:
            image = self._corpus.image(row)
        except DocumentError:  # training says so, and stops if they are many
            return
        height, width = image.shape[:2]
        self._left_pixels -= height * width
        is_blank = bool((image == image[:1, :1]).all())
        self.seen[row] = SeenImage((height, width), pixel_digest(image), is_blank)


def evenly(count: int, most: int) -> list[int]:
    """At most so many numbers below a count, as far apart as they can be.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
