"""The baseline that reads nothing: a long title fills a wide strip.

It knows the length of a query's text and the extent of an image, and nothing of what either says.
On strips the extent is the width of the ink at strip height. On other images (whole pages) a width
says nothing; there it is the size of the encoded image, which grows with what is on the page, and
the baseline is close to chance. A model that does not beat it has not learned to read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from colfolio.data.dataset import Corpus, RetrievalDataset
from colfolio.data.pages.views import STRIP_HEIGHT

Extent = Literal["ink width", "image size"]

_INK_CONTRAST = 0.35  # of the image's largest contrast: below it lie scan noise and tinted grounds
_FLAT = 24  # grey levels: an image of less contrast has no ink


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """Extent expected of a text: `slope * characters + intercept`, in the unit of `extent`."""

    slope: float
    intercept: float
    extent: Extent


def ink_width(image: UInt8[np.ndarray, "height width 3"]) -> float:
    """Pixels from the first to the last column with ink, with the image at strip height."""
    grey = image.mean(axis=2)
    contrast = grey.max(axis=0) - grey.min(axis=0)  # [width]
    if contrast.max(initial=0) < _FLAT:
        return 0.0
    columns = np.flatnonzero(contrast > _INK_CONTRAST * contrast.max())
    return float(columns[-1] - columns[0] + 1) * STRIP_HEIGHT / image.shape[0]


def extent_of(corpus: Corpus, rows: Iterable[int] | None = None) -> Extent:
    """What is measured in these rows: `ink width` if all are strips, else `image size`."""
    chosen = range(len(corpus)) if rows is None else rows
    is_strip = (corpus.image_size(row)[0] <= 2 * STRIP_HEIGHT for row in chosen)
    return "ink width" if all(is_strip) else "image size"


def image_extents(
    corpus: Corpus, extent: Extent, rows: Iterable[int] | None = None
) -> Float64[np.ndarray, " rows"]:
    """The extent of each image of a corpus, or of some rows: pixels of ink, or encoded bytes."""
    chosen = range(len(corpus)) if rows is None else rows
    if extent == "ink width":
        measured = [ink_width(corpus.image(row)) for row in chosen]
    else:
        measured = [float(len(corpus.encoded(row))) for row in chosen]
    return np.array(measured, dtype=np.float64)


def fit_extent_line(dataset: RetrievalDataset, max_pairs: int = 2000) -> ExtentLine:
    """The least-squares line from text length to image extent over a split's queries and answers.

    Args:
        dataset: a split that is not the one to evaluate; its headings if it has any, else all.
        max_pairs: as many pairs are read, evenly spaced over the split.
    """
    headings = [query for query in dataset.queries if query.kind == "heading"]
    queries = headings or dataset.queries
    queries = queries[:: math.ceil(len(queries) / max_pairs)]
    row_of = {id_: row for row, id_ in enumerate(dataset.corpus.ids)}
    rows = [row_of[dataset.positives(query.id)[0]] for query in queries]
    extent = extent_of(dataset.corpus, rows)
    extents = image_extents(dataset.corpus, extent, rows)
    return fit_line([len(query.text) for query in queries], extents, extent)


def fit_line(
    lengths: Sequence[int], extents: Float64[np.ndarray, " pairs"], extent: Extent
) -> ExtentLine:
    """The least-squares line through pairs of text length and extent."""
    if len(set(lengths)) < 2:
        return ExtentLine(0.0, float(np.mean(extents)), extent)
    slope, intercept = np.polyfit(lengths, extents, deg=1)
    return ExtentLine(float(slope), float(intercept), extent)


def guess_line(
    lengths: Sequence[int], extents: Float64[np.ndarray, " documents"], extent: Extent
) -> ExtentLine:
    """A line through the origin from the median length to the median extent, without any pair."""
    return ExtentLine(float(np.median(extents)) / max(1.0, float(np.median(lengths))), 0.0, extent)


def baseline_scores(
    texts: Sequence[str], extents: Float64[np.ndarray, " documents"], line: ExtentLine
) -> Float32[Tensor, "queries documents"]:
    """Minus the distance between the extent a text should have and the extent an image has."""
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    expected = line.slope * lengths + line.intercept  # [queries]
    distances = np.abs(expected[:, None] - extents[None, :])
    return torch.from_numpy(-distances.astype(np.float32))


def dataset_baseline(
    dataset: RetrievalDataset, fitted: ExtentLine | None = None
) -> tuple[Float32[Tensor, "queries documents"], Extent]:
    """The baseline's scores of every query and image of a dataset, and what it measured.

    Args:
        dataset: the split to evaluate; its relevance judgements are not looked at.
        fitted: a line of another split (`fit_extent_line`); without one, or when it measured
            something else, the line is guessed from the medians of these texts and images.
    """
    extent = extent_of(dataset.corpus)
    extents = image_extents(dataset.corpus, extent)
    texts = [query.text for query in dataset.queries]
    if fitted is None or fitted.extent != extent:
        fitted = guess_line([len(text) for text in texts], extents, extent)
    return baseline_scores(texts, extents, fitted), extent
