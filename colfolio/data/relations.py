"""Which documents answer which queries of a dataset, and which must not count as negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64

from colfolio.data.dataset import RetrievalDataset
from colfolio.data.teacher import TeacherScores

Ignore = Literal["page", "document", "none"]
_LEAST_SCORED = 2  # that distillation can compare
_Rows = Int64[np.ndarray, " _rows"]


class Relations:
    """What each query of a dataset is to each row of its corpus.

    Queries of equal text, whatever its case, share what answers them.

    Args:
        ignore: rows that show the same page or document as one that answers are no negatives.
        teacher: for distillation: what it scored for a query is never ignored for it.

    Attributes:
        positives: of each query, the rows judged to answer it.
        answers: of each query, the rows judged to answer its text.
        refused: of each query, the rows judged not to, less those that answer its text.
    """

    def __init__(
        self, dataset: RetrievalDataset, ignore: Ignore, teacher: TeacherScores | None = None
    ) -> None:
        row_of = {name: row for row, name in enumerate(dataset.corpus.ids)}
        ids = [query.id for query in dataset.queries]
        texts = [query.text.casefold() for query in dataset.queries]
        self.positives = [_rows(row_of, dataset.positives(id_)) for id_ in ids]
        answers = _by_text(texts, self.positives)
        judged = _by_text(texts, [_rows(row_of, dataset.negatives(id_)) for id_ in ids])
        refused = {text: _without(rows, answers[text]) for text, rows in judged.items()}
        self.answers = [answers[text] for text in texts]
        self.refused = [refused[text] for text in texts]
        self._group_of_row = _groups(dataset, ignore)
        self._teacher = teacher

    def masks(
        self,
        queries: Sequence[int],
        rows: Int64[np.ndarray, " D"],
        look_same: Bool[np.ndarray, "D D"] | None = None,
    ) -> tuple[Bool[torch.Tensor, "Q D"], Bool[torch.Tensor, "Q D"]]:
        """Positives and ignored of a batch.

        A row is a positive of every query that wants it, not only of its own. A query sits out,
        with no positive and all ignored, if no row answers it, or none is left to tell an answer
        from, or if there is a teacher and fewer than two of the rows left have its score. The rows
        that such a query brings are negatives of the others all the same.

        Args:
            queries: numbers of the batch's queries.
            rows: of the corpus, the batch's documents.
            look_same: which of them are near duplicates.
        """
        if not queries:
            none = torch.zeros(0, len(rows), dtype=torch.bool)
            return none, none
        answers = [self.answers[query] for query in queries]
        positives = np.stack([np.isin(rows, wanted) for wanted in answers])
        ignored = np.zeros_like(positives)
        if self._group_of_row is not None:
            groups = self._group_of_row
            ignored |= np.stack([np.isin(groups[rows], groups[wanted]) for wanted in answers])
        if look_same is not None:
            ignored |= (positives.astype(np.float32) @ look_same.astype(np.float32)) > 0
        scored = self._scored(queries, rows)
        refused = np.stack([np.isin(rows, self.refused[query]) for query in queries])
        ignored &= ~(positives | refused | scored)
        sits_out = ~positives.any(axis=1) | (positives | ignored).all(axis=1)
        if self._teacher is not None:
            sits_out |= scored.sum(axis=1) < _LEAST_SCORED
        positives[sits_out], ignored[sits_out] = False, True
        return torch.from_numpy(positives), torch.from_numpy(ignored)

    def _scored(
        self, queries: Sequence[int], rows: Int64[np.ndarray, " D"]
    ) -> Bool[np.ndarray, "Q D"]:
        if self._teacher is None:
            return np.zeros((len(queries), len(rows)), dtype=bool)
        return np.stack([np.isin(rows, self._teacher.rows[query]) for query in queries])


def _rows(row_of: dict[str, int], ids: list[str]) -> _Rows:
    return np.array([row_of[id_] for id_ in ids], dtype=np.int64)


def _without(rows: _Rows, others: _Rows) -> _Rows:
    return rows[~np.isin(rows, others)] if len(rows) else rows


def _by_text(texts: list[str], judged: list[_Rows]) -> dict[str, _Rows]:
    """What is judged for a text: the rows of every query that asks it."""
    together: dict[str, list[np.ndarray]] = {}
    for text, rows in zip(texts, judged, strict=True):
        together.setdefault(text, []).append(rows)
    return {text: np.unique(np.concatenate(rows)) for text, rows in together.items()}


def _groups(dataset: RetrievalDataset, ignore: Ignore) -> np.ndarray | None:
    """A number for each row; rows of equal number are no negatives to each other."""
    if ignore == "none":
        return None
    if ignore == "page":
        return dataset.corpus.page_keys
    return np.unique(dataset.corpus.documents, return_inverse=True)[1]
