"""A small dataset of strips whose ink is as wide as their title is long, and an encoder for it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from colfolio.batch import MultiVectors
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split

TITLES = ["Scope", "Usage notes", "Building the package", "Known limitations of the parser"]


def strip(width: int, height: int = 28) -> np.ndarray:
    """A white strip with a bar of ink."""
    image = np.full((height, 392, 3), 255, dtype=np.uint8)
    image[4:24, 4 : 4 + width] = 30
    return image


def encode_png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()


class WidthEncoder:
    """Knows texts by their length, images by their ink: vectors on a circle, close when alike."""

    dim = 2
    device = torch.device("cpu")

    def __init__(self, is_blind: bool = False) -> None:
        self.is_blind = is_blind
        self.num_documents: list[int] = []

    def encode_queries(self, queries):
        return self._vectors([10.0 * len(query) for query in queries])

    def encode_documents(self, documents):
        self.num_documents.append(len(documents))
        return self._vectors([float((image[14, :, 0] < 128).sum()) for image in documents])

    def _vectors(self, sizes):
        angles = torch.tensor([0.0 if self.is_blind else size / 400 for size in sizes])
        vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
        return MultiVectors.from_list([vector[None] for vector in vectors])


@pytest.fixture
def strips_folder(tmp_path):
    """Two splits: `train` and `test`; in `test` two of the titles are unseen."""
    folder = tmp_path / "strips"
    for split, seen in [("train", None), ("test", [True, False, True, False])]:
        rows = [
            CorpusRow(f"{split}-c{i}", encode_png(strip(10 * len(title))), "manual.pdf", i)
            for i, title in enumerate(TITLES)
        ]
        queries = [
            Query(f"{split}-q{i}", title, "heading", seen[i] if seen else None)
            for i, title in enumerate(TITLES)
        ]
        qrels = {f"{split}-q{i}": {f"{split}-c{i}": 1} for i in range(len(TITLES))}
        write_split(folder, split, rows, queries, qrels)
    return folder


@pytest.fixture
def strips(strips_folder):
    return load_dataset(strips_folder, "test")
