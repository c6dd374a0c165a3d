"""A model, or an index of whole pages, against a dataset.

Scores come first (`score_model`, `score_index`), then what is said about them (`results`), so that
the same scores also yield the hits and misses of a report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from colfolio.batch import MultiVectors
from colfolio.data.dataset import Corpus, RetrievalDataset
from colfolio.errors import DatasetError
from colfolio.evaluation.baseline import ExtentLine, dataset_baseline
from colfolio.evaluation.metrics import chance, ranks
from colfolio.evaluation.results import Scored
from colfolio.maxsim import maxsim

_PIXELS_AT_ONCE = 1 << 25  # 100 MB of decoded images
_IMAGES_AT_ONCE = 512


@runtime_checkable
class Encoder(Protocol):
    """What turns texts and images into vectors; `Retriever` is one."""

    def encode_queries(self, queries: list[str]) -> MultiVectors:
        """One row a text, on the CPU."""
        ...

    def encode_documents(self, documents: list[np.ndarray]) -> MultiVectors:
        """One row an image, on the CPU."""
        ...


@runtime_checkable
class PageScorer(Protocol):
    """What scores every page that it holds; `Searcher` is one."""

    @property
    def pages(self) -> Sequence[tuple[str, int]]:
        """Document and page (from 0), in the order of the scores' columns."""
        ...

    def search_many(self, queries: Sequence[str]) -> Float32[Tensor, "queries pages"]:
        """The score of every page for every query."""
        ...


def score_model(
    encoder: Encoder,
    dataset: RetrievalDataset,
    fitted: ExtentLine | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Scores of every query against every image; only some images are held at a time.

    Args:
        encoder: the model.
        dataset: one split.
        fitted: the baseline's line, from another split (`fit_extent_line`).
        on_progress: called with the images done and their number.
    """
    return _scored(model_scores(encoder, dataset, on_progress), dataset, fitted)


def model_scores(
    encoder: Encoder,
    dataset: RetrievalDataset,
    on_progress: Callable[[int, int], None] | None = None,
) -> Float32[Tensor, "queries documents"]:
    """Scores of every query against every image, and nothing beside them.

    Args:
        on_progress: as of `score_model`.
    """
    queries = encoder.encode_queries([query.text for query in dataset.queries])
    columns, done = [], 0
    for images in _image_chunks(dataset.corpus):
        columns.append(maxsim(queries, encoder.encode_documents(images)))
        done += len(images)
        if on_progress is not None:
            on_progress(done, len(dataset.corpus))
    return torch.cat(columns, dim=1)


def score_index(
    searcher: PageScorer, dataset: RetrievalDataset, fitted: ExtentLine | None = None
) -> Scored:
    """Scores of every query against the pages of the dataset's corpus, as an index gives them.

    Pages that are in the index and not in the corpus are no candidates.

    Args:
        searcher: an index; it says whether a page scores as its best view or as their union.
        dataset: a split whose corpus rows are whole pages, named by document and page.
        fitted: the baseline's line.

    Raises:
        DatasetError: corpus rows are not whole pages, or not in the index; they are named.
    """
    corpus = dataset.corpus
    wanted = list(zip(corpus.documents, corpus.pages, strict=True))
    if len(set(wanted)) < len(wanted):
        raise DatasetError(
            f"{dataset.name}, split {dataset.split!r}: an index finds whole pages, but several "
            f"images of this corpus show the same page; evaluate the model on it instead"
        )
    column_of = {page: column for column, page in enumerate(searcher.pages)}
    missing = [page for page in wanted if page not in column_of]
    if missing:
        named = ", ".join(f"{document} page {page + 1}" for document, page in missing[:5])
        raise DatasetError(
            f"{dataset.name}, split {dataset.split!r}: {len(missing)} of {len(wanted)} pages are "
            f"not in the index: {named}{' …' if len(missing) > 5 else ''}; index the documents "
            f"that the dataset was made of"
        )
    scores = searcher.search_many([query.text for query in dataset.queries])
    return _scored(scores[:, [column_of[page] for page in wanted]], dataset, fitted)


def relevance_of(dataset: RetrievalDataset) -> Int[Tensor, "queries documents"]:
    """The gain of every image for every query; 0 where it was not judged."""
    column_of = {id_: column for column, id_ in enumerate(dataset.corpus.ids)}
    relevance = torch.zeros(len(dataset.queries), len(column_of), dtype=torch.int16)
    for row, query in enumerate(dataset.queries):
        for corpus_id, gain in dataset.qrels[query.id].items():
            relevance[row, column_of[corpus_id]] = gain
    return relevance


def random_order_score(dataset: RetrievalDataset, name: str) -> float:
    """What a random order of a split's candidates scores in a metric on average, exactly."""
    relevance = relevance_of(dataset)
    return float(chance(ranks(torch.zeros(relevance.shape), relevance), name).mean())


def _image_chunks(corpus: Corpus) -> Iterator[list[np.ndarray]]:
    images, num_pixels = [], 0
    for row in range(len(corpus)):
        images.append(corpus.image(row))
        num_pixels += images[-1].shape[0] * images[-1].shape[1]
        if num_pixels >= _PIXELS_AT_ONCE or len(images) == _IMAGES_AT_ONCE:
            yield images
            images, num_pixels = [], 0
    if images:
        yield images


def _scored(scores: Tensor, dataset: RetrievalDataset, fitted: ExtentLine | None) -> Scored:
    baseline, extent = dataset_baseline(dataset, fitted)
    return Scored(
        scores=scores,
        relevance=relevance_of(dataset),
        baseline=baseline,
        unseen=_unseen(dataset),
        dataset=f"{dataset.name}, {dataset.split}",
        extent=extent,
    )


def _unseen(dataset: RetrievalDataset) -> Bool[Tensor, " queries"] | None:
    seen = [query.seen for query in dataset.queries]
    if all(flag is None for flag in seen):
        return None
    return torch.tensor([flag is False for flag in seen])
