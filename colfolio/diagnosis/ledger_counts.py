"""What the batches of a run bring and leave out, counted from real draws without reading an image.

Letters: a batch has Q queries and D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from colfolio.data.dataset import RetrievalDataset
from colfolio.data.picks import Picker, Picks
from colfolio.data.relations import Relations
from colfolio.data.sampler import SamplerPosition
from colfolio.data.teacher import TeacherScores
from colfolio.errors import DatasetError
from colfolio.training import TrainSettings
from colfolio.training.losses import chance_level, check_masks, floor_level, maxsim_range

QueryLengths = Callable[[Sequence[str]], list[int]]
SAME_PAGE = "on the page of an answer"
SAME_DOCUMENT = "in the document of an answer"
OTHER_ANSWERS = "other answers"
UNSCORED = "without a teacher's score"


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """One batch.

    Args:
        documents: distinct ones.
        twice: documents that a query brings, and another one before it.
        hard_negatives: that each query brings.
        candidates: that each query is compared with, one answer among them.
        left_out: why a document is no candidate -> how many of them each query has; with the
            candidates they make all documents.
        chance: the least that the loss can be while all scores are equal.
        floor: the least that it can be.
    """

    documents: int
    twice: int
    hard_negatives: Int64[np.ndarray, " Q"]
    candidates: Int64[np.ndarray, " Q"]
    left_out: dict[str, Int64[np.ndarray, " Q"]]
    chance: float
    floor: float


class BatchCounter:
    """Counts the batches that a run will draw.

    Args:
        query_lengths: vectors that the model makes of each text.

    Raises:
        DatasetError: distillation is asked for, and the dataset has no teacher scores.
    """

    def __init__(
        self, dataset: RetrievalDataset, settings: TrainSettings, query_lengths: QueryLengths
    ) -> None:
        self._dataset = dataset
        self._settings = settings
        self._query_lengths = query_lengths
        self._by_page = None
        if settings.batch.ignore == "document":
            self._by_page = Relations(dataset, "page")
        has_teacher = settings.loss.kind == "distillation"
        self._teacher = TeacherScores(dataset) if has_teacher else None
        self._picker = Picker(dataset, settings.batch, settings.seed, self._teacher)

    def counts(self, position: SamplerPosition, batches: int) -> Iterator[BatchCounts]:
        """So many batches from a position on.

        Raises:
            DatasetError: training would refuse a batch; it is named.
        """
        for picks in islice(self._picker.picks(position), batches):
            yield self._counts(picks)

    def _counts(self, picks: Picks) -> BatchCounts:
        rows = np.array(picks.documents, dtype=np.int64)
        positives, ignored = self._picker.relations.masks(picks.queries, rows)
        teacher = None
        if self._teacher is not None:
            teacher = torch.from_numpy(self._teacher.between(picks.queries, rows))
        self._check(picks, positives, ignored, teacher)
        settings = self._settings.loss
        reach = maxsim_range(torch.tensor(self._query_lengths(picks.texts)))
        hard_negatives = np.array([len(each) for each in picks.hard_negatives])
        left_out = self._left_out(picks, rows, positives, ignored, teacher)
        return BatchCounts(
            documents=len(rows),
            twice=len(picks.positives) + int(hard_negatives.sum()) - len(rows),
            hard_negatives=hard_negatives,
            candidates=len(rows) - np.sum(list(left_out.values()), axis=0),
            left_out=left_out,
            chance=float(chance_level(positives, ignored, settings, teacher)),
            floor=float(floor_level(positives, ignored, settings, reach, teacher)),
        )

    def _left_out(
        self,
        picks: Picks,
        rows: Int64[np.ndarray, " D"],
        positives: Bool[Tensor, "Q D"],
        ignored: Bool[Tensor, "Q D"],
        teacher: Tensor | None,
    ) -> dict[str, Int64[np.ndarray, " Q"]]:
        on_page = ignored
        if self._by_page is not None:
            on_page = ignored & self._by_page.masks(picks.queries, rows)[1]
        left_out = {SAME_PAGE: on_page, SAME_DOCUMENT: ignored & ~on_page}
        counts = {why: each.sum(dim=1).numpy() for why, each in left_out.items()}
        if teacher is None:
            return counts | {OTHER_ANSWERS: positives.sum(dim=1).numpy() - 1}
        return counts | {UNSCORED: (teacher.isnan() & ~ignored).sum(dim=1).numpy()}

    def _check(
        self,
        picks: Picks,
        positives: Bool[Tensor, "Q D"],
        ignored: Bool[Tensor, "Q D"],
        teacher: Tensor | None,
    ) -> None:
        """What training would refuse, with names."""
        where = (
            f"{self._dataset.name}, split {self._dataset.split!r}, epoch {picks.after.epoch}, "
            f"batch {picks.after.index}"
        )
        alone = (positives | ignored).all(dim=1).nonzero().flatten().tolist()
        if alone:
            first = self._dataset.queries[picks.queries[alone[0]]].id
            answer = self._dataset.corpus.ids[picks.positives[alone[0]]]
            ignore, answers = self._settings.batch.ignore, int(positives[alone[0]].sum())
            raise DatasetError(
                f"{where}: {len(alone)} of {len(positives)} queries have nothing to be told from, "
                f"first {first!r}: of the batch's {positives.shape[1]} documents {answers} answer "
                f"it, and {positives.shape[1] - answers} are of the same {ignore} as such a one, "
                f"as {answer!r}; set batch.rows to more, or use documents of more than one page"
            )
        try:
            check_masks(positives, ignored, teacher)
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from None
