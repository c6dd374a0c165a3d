"""What a teacher scored of a dataset, as the matrix that distillation follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from colfolio.data.dataset import RetrievalDataset
from colfolio.errors import DatasetError

_MOST_NAMED = 5


class TeacherScores:
    """A teacher's scores by query and row of the corpus.

    Attributes:
        rows: of each query, the rows that the teacher scored, rising.

    Raises:
        DatasetError: the dataset has no teacher scores, or fewer than two for a query.
    """

    def __init__(self, dataset: RetrievalDataset) -> None:
        teacher, where = dataset.teacher, f"{dataset.name}, split {dataset.split!r}"
        if teacher is None:
            raise DatasetError(
                f"{where}: the loss distillation follows a teacher's scores, and there are none; "
                f"add a table 'teacher' (query-id, corpus-id, score) with a split "
                f"{dataset.split!r}, or choose another loss.kind"
            )
        row_of = {name: row for row, name in enumerate(dataset.corpus.ids)}
        scored = [teacher.get(query.id, {}) for query in dataset.queries]
        few = [
            query.id for query, each in zip(dataset.queries, scored, strict=True) if len(each) < 2
        ]
        if few:
            raise DatasetError(
                f"{where}: distillation compares at least 2 documents of a query, but the teacher "
                f"scored fewer for {len(few)} of {len(scored)} queries, such as "
                f"{', '.join(map(repr, few[:_MOST_NAMED]))}; score more, or leave them out"
            )
        unsorted = [np.array([row_of[id_] for id_ in each], dtype=np.int64) for each in scored]
        orders = [np.argsort(rows) for rows in unsorted]
        self.rows = [rows[order] for rows, order in zip(unsorted, orders, strict=True)]
        self._scores = [
            np.array(list(each.values()), dtype=np.float32)[order]
            for each, order in zip(scored, orders, strict=True)
        ]

    def between(
        self, queries: Sequence[int], rows: Int64[np.ndarray, " D"]
    ) -> Float32[np.ndarray, "Q D"]:
        """Scores of a batch, NaN where the teacher says nothing.

        Args:
            queries: numbers of the batch's Q queries.
            rows: of the corpus, the batch's D documents.
        """
        scores = np.full((len(queries), len(rows)), np.nan, dtype=np.float32)
        for line, query in zip(scores, queries, strict=True):
            known = self.rows[query]
            places = np.minimum(np.searchsorted(known, rows), len(known) - 1)
            is_known = known[places] == rows
            line[is_known] = self._scores[query][places[is_known]]
        return scores
