"""Queries of a dataset to contrastive batches: which documents come along, and who ignores whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import Field

from colfolio.batch import ContrastiveBatch
from colfolio.config import Settings
from colfolio.data.collate import Collator
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import Draw, SamplerPosition, check_enough, draws
from colfolio.errors import DatasetError


class BatchSettings(Settings):
    """What one batch holds.

    Args:
        rows: queries in a batch, each with one of its positive documents.
        ignore: documents of the same `page` or `document` as a query's positive are not counted
            as its negatives; `none` counts them.
        kind_weights: expected appearances in an epoch of a query of each kind; 1 where not named.
        lowercase_share: of all queries, in lower case, so that a search may be typed that way.
    """

    rows: int = Field(default=32, ge=2)
    ignore: Literal["page", "document", "none"] = "page"
    kind_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    lowercase_share: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """A batch, and where the sampler stands behind it."""

    batch: ContrastiveBatch
    after: SamplerPosition


class BatchSource:
    """Batches of one dataset split without end, the same for the same seed and position.

    Args:
        dataset: the training split.
        collator: of the model that is trained.
        settings: rows and masks.
        seed: of order and of the choice among several positives.

    Raises:
        DatasetError: the settings weigh a kind that no query has, or want more rows than an epoch
            has queries.
    """

    def __init__(
        self, dataset: RetrievalDataset, collator: Collator, settings: BatchSettings, seed: int
    ) -> None:
        self._dataset = dataset
        self._collator = collator
        self._settings = settings
        self._seed = seed
        row_of = {name: row for row, name in enumerate(dataset.corpus.ids)}
        self._positives = [
            np.array([row_of[name] for name, grade in dataset.qrels[query.id].items() if grade > 0])
            for query in dataset.queries
        ]
        self._texts = [query.text for query in dataset.queries]
        self._answers = _by_text(self._texts, self._positives)
        self._weights = _weights(dataset, settings.kind_weights)
        check_enough(self._weights, settings.rows)
        self._group_of_document = _groups(dataset, settings.ignore)

    def batches(self, position: SamplerPosition) -> Iterator[DrawnBatch]:
        """Batches from a position on."""
        for draw in draws(self._weights, self._settings.rows, self._seed, position):
            yield DrawnBatch(self._collate(draw), draw.after)

    def _collate(self, draw: Draw) -> ContrastiveBatch:
        picked = [int(draw.generator.choice(self._positives[query])) for query in draw.queries]
        images = {row: self._dataset.corpus.image(row) for row in dict.fromkeys(picked)}
        documents = sorted(images, key=lambda row: (images[row].shape[:2], row))
        texts = [self._asked(query, draw.generator) for query in draw.queries]
        lengths = self._collator.query_lengths(texts)
        order = sorted(range(len(texts)), key=lambda row: (lengths[row], row))
        positives, ignored = self._masks([draw.queries[row] for row in order], documents)
        return ContrastiveBatch(
            self._collator.queries([texts[row] for row in order]),
            self._collator.documents([images[row] for row in documents]),
            positives,
            ignored,
        )

    def _asked(self, query: int, generator: np.random.Generator) -> str:
        text = self._texts[query]
        return text.lower() if generator.random() < self._settings.lowercase_share else text

    def _masks(
        self, queries: list[int], documents: list[int]
    ) -> tuple[Bool[torch.Tensor, "Q D"], Bool[torch.Tensor, "Q D"]]:
        """A document is a positive of every query that wants it, not only of its own."""
        rows = np.array(documents)
        answers = [self._answers[self._texts[query].casefold()] for query in queries]
        positives = np.stack([np.isin(rows, wanted) for wanted in answers])
        if self._group_of_document is None:
            return torch.from_numpy(positives), torch.zeros(positives.shape, dtype=torch.bool)
        groups = self._group_of_document
        same = np.stack([np.isin(groups[rows], groups[wanted]) for wanted in answers])
        return torch.from_numpy(positives), torch.from_numpy(same & ~positives)


def _by_text(texts: list[str], positives: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What answers a text, whatever its case: the positives of every query that asks it."""
    together: dict[str, list[np.ndarray]] = {}
    for text, rows in zip(texts, positives, strict=True):
        together.setdefault(text.casefold(), []).append(rows)
    return {text: np.unique(np.concatenate(rows)) for text, rows in together.items()}


def _weights(dataset: RetrievalDataset, kind_weights: dict[str, float]) -> list[float]:
    kinds = {query.kind for query in dataset.queries}
    unknown = sorted(set(kind_weights) - kinds)
    if unknown:
        raise DatasetError(
            f"{dataset.name}, split {dataset.split!r}: kind_weights names {unknown}, but its "
            f"queries are of the kinds {sorted(kinds)}"
        )
    return [kind_weights.get(query.kind, 1.0) for query in dataset.queries]


def _groups(dataset: RetrievalDataset, ignore: str) -> np.ndarray | None:
    """A number for each document; documents of equal number are no negatives to each other."""
    if ignore == "none":
        return None
    corpus = dataset.corpus
    keys = (
        list(zip(corpus.documents, corpus.pages, strict=True))
        if ignore == "page"
        else [(document, 0) for document in corpus.documents]
    )
    numbers: dict[tuple[str, int], int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
