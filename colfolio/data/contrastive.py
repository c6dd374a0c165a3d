"""Queries of a dataset to contrastive batches: which documents come along, and who ignores whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from pydantic import Field

from colfolio.batch import ContrastiveBatch
from colfolio.config import Settings
from colfolio.data.collate import Collator
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import Draw, SamplerPosition, check_enough, draws
from colfolio.errors import DatasetError, DocumentError

_MAX_UNREADABLE = 0.01
_MOST_NAMED = 5
_Rows = Int64[np.ndarray, " _rows"]


class BatchSettings(Settings):
    """What one batch holds.

    Args:
        rows: queries in a batch, each with one of its positive documents, and one of its judged
            negatives where it has any.
        ignore: documents of the same `page` or `document` as a query's positive are not counted
            as its negatives, unless they are judged to be; `none` counts them.
        kind_weights: expected appearances in an epoch of a query of each kind; 1 where not named.
        lowercase_share: of all queries, in lower case, so that a search may be typed that way.
        lowercase_from_epoch: epochs before it keep case, which is learnt sooner.
    """

    rows: int = Field(default=32, ge=2)
    ignore: Literal["page", "document", "none"] = "page"
    kind_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    lowercase_share: float = Field(default=0.0, ge=0, le=1)
    lowercase_from_epoch: int = Field(default=0, ge=0)


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

    Attributes:
        unreadable: corpus id -> reason, of images that could not be decoded so far; a query whose
            positive is one of them is left out of its batch.

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
        ids = [query.id for query in dataset.queries]
        self._positives = [_rows(row_of, dataset.positives(id_)) for id_ in ids]
        self._texts = [query.text for query in dataset.queries]
        self._answers = _by_text(self._texts, self._positives)
        judged = _by_text(self._texts, [_rows(row_of, dataset.negatives(id_)) for id_ in ids])
        self._refused = {text: _without(rows, self._answers[text]) for text, rows in judged.items()}
        self._weights = _weights(dataset, settings.kind_weights)
        check_enough(self._weights, settings.rows)
        self._group_of_document = _groups(dataset, settings.ignore)
        self._tried: set[int] = set()
        self.unreadable: dict[str, str] = {}

    def batches(self, position: SamplerPosition) -> Iterator[DrawnBatch]:
        """Batches from a position on.

        Raises:
            DatasetError: two images or more, and over 1 % of those tried, cannot be decoded, or
                none of a batch can.
        """
        for draw in draws(self._weights, self._settings.rows, self._seed, position):
            yield DrawnBatch(self._collate(draw), draw.after)

    def _collate(self, draw: Draw) -> ContrastiveBatch:
        picked = [int(draw.generator.choice(self._positives[query])) for query in draw.queries]
        texts = [self._asked(query, draw) for query in draw.queries]
        refused = [self._refused[self._texts[query].casefold()] for query in draw.queries]
        drawn = [int(draw.generator.choice(rows)) for rows in refused if len(rows)]
        images = self._images([*picked, *drawn])
        documents = sorted(images, key=lambda row: (images[row].shape[:2], row))
        lengths = self._collator.query_lengths(texts)
        readable = [row for row in range(len(texts)) if picked[row] in images]
        if not readable:
            raise self._unreadable_error()
        order = sorted(readable, key=lambda row: (lengths[row], row))
        positives, ignored = self._masks([draw.queries[row] for row in order], documents)
        return ContrastiveBatch(
            self._collator.queries([texts[row] for row in order]),
            self._collator.documents([images[row] for row in documents]),
            positives,
            ignored,
        )

    def _images(self, rows: list[int]) -> dict[int, UInt8[np.ndarray, "_H _W 3"]]:
        """The decoded images of rows; what cannot be decoded is left out and remembered."""
        corpus, images = self._dataset.corpus, {}
        for row in dict.fromkeys(rows):
            self._tried.add(row)
            try:
                images[row] = corpus.image(row)
            except DocumentError as error:
                self.unreadable[corpus.ids[row]] = error.reason
        if len(self.unreadable) > max(1, _MAX_UNREADABLE * len(self._tried)):
            raise self._unreadable_error()
        return images

    def _unreadable_error(self) -> DatasetError:
        named = list(self.unreadable.items())[:_MOST_NAMED]
        return DatasetError(
            f"{self._dataset.name}, split {self._dataset.split!r}: {len(self.unreadable)} of "
            f"{len(self._tried)} images cannot be read; repair or remove them: "
            + "; ".join(f"{id_!r}: {reason}" for id_, reason in named)
        )

    def _asked(self, query: int, draw: Draw) -> str:
        is_time = draw.after.epoch >= self._settings.lowercase_from_epoch
        is_lower = draw.generator.random() < self._settings.lowercase_share
        return self._texts[query].lower() if is_time and is_lower else self._texts[query]

    def _masks(
        self, queries: list[int], documents: list[int]
    ) -> tuple[Bool[torch.Tensor, "Q D"], Bool[torch.Tensor, "Q D"]]:
        """A document is a positive of every query that wants it, not only of its own."""
        rows = np.array(documents)
        texts = [self._texts[query].casefold() for query in queries]
        answers = [self._answers[text] for text in texts]
        positives = np.stack([np.isin(rows, wanted) for wanted in answers])
        if self._group_of_document is None:
            return torch.from_numpy(positives), torch.zeros(positives.shape, dtype=torch.bool)
        groups = self._group_of_document
        same = np.stack([np.isin(groups[rows], groups[wanted]) for wanted in answers])
        refused = np.stack([np.isin(rows, self._refused[text]) for text in texts])
        return torch.from_numpy(positives), torch.from_numpy(same & ~positives & ~refused)


def _rows(row_of: dict[str, int], ids: list[str]) -> _Rows:
    return np.array([row_of[id_] for id_ in ids], dtype=np.int64)


def _without(rows: _Rows, others: _Rows) -> _Rows:
    return rows[~np.isin(rows, others)] if len(rows) else rows


def _by_text(texts: list[str], judged: list[_Rows]) -> dict[str, _Rows]:
    """What is judged for a text, whatever its case: the rows of every query that asks it."""
    together: dict[str, list[np.ndarray]] = {}
    for text, rows in zip(texts, judged, strict=True):
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
    if ignore == "page":
        return dataset.corpus.page_keys
    return np.unique(dataset.corpus.documents, return_inverse=True)[1]
