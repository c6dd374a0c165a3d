import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from colfolio.search import SourcePage

_SPEC = importlib.util.spec_from_file_location(
    "fake_encoder", Path(__file__).with_name("fake_encoder.py")
)
fake_encoder = importlib.util.module_from_spec(_SPEC)
sys.modules["fake_encoder"] = fake_encoder
_SPEC.loader.exec_module(fake_encoder)


@pytest.fixture
def encoder():
    return fake_encoder.FakeEncoder()


@pytest.fixture
def make_encoder():
    return fake_encoder.FakeEncoder


def squares(seed: int, rows: int, columns: int) -> np.ndarray:
    """An image of squares of random colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return colours.repeat(28, axis=0).repeat(28, axis=1)


@pytest.fixture
def pages():
    """Pages of four documents, of several sizes."""
    shapes = [(3, 2), (2, 2), (3, 2), (1, 4), (5, 3), (2, 2), (4, 4), (3, 2), (1, 1)]
    return [
        SourcePage(f"folder/{row % 4}.pdf", row // 4, squares(row, *shape), done=(row + 1) / 9)
        for row, shape in enumerate(shapes)
    ]
