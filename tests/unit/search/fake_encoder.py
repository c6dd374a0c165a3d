"""A deterministic encoder of coloured squares: a query names colours, a token is a square."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from colfolio.batch import MultiVectors

CELL = 28


@dataclass(frozen=True)
class FakeSpan:
    first: int
    rows: int
    columns: int


class FakeEncoder:
    """Vectors of a hashed colour. One vector stands before an image's own and one behind them."""

    def __init__(self, dim: int = 16, name: str = "fake") -> None:
        self.dim, self._name = dim, name
        self.batches: list[set[tuple[int, int]]] = []

    def fingerprint(self) -> str:
        return self._name

    def encode_queries(self, queries, batch_size=8):  # noqa: ARG002
        return MultiVectors.from_list(
            [torch.stack([self._vector(word) for word in query.split()]) for query in queries]
        )

    def encode_documents(self, documents, batch_size=8):
        for start in range(0, len(documents), batch_size):
            batch = documents[start : start + batch_size]
            self.batches.append({image.shape[:2] for image in batch})
        return MultiVectors.from_list([self._document(image) for image in documents])

    def visual_span(self, image_size):
        return FakeSpan(1, max(1, image_size[0] // CELL), max(1, image_size[1] // CELL))

    def _document(self, image):
        span = self.visual_span(image.shape[:2])
        words = ["before"]
        for row in range(span.rows):
            for column in range(span.columns):
                cell = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                words.append(",".join(str(v) for v in np.round(cell.mean((0, 1))).astype(int)))
        return torch.stack([self._vector(word) for word in [*words, "after"]])

    def _vector(self, word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        vector = torch.from_numpy(np.random.default_rng(seed).normal(size=self.dim)).float()
        return vector / vector.norm()
