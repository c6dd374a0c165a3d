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
# what the mask takes, in the order in which it is said
SAME_PAGE = "on the page of an answer"
SAME_DOCUMENT = "in the document of an answer"
MASKED = (SAME_PAGE, SAME_DOCUMENT)
# what the loss leaves out beside it
OTHER_ANSWERS = "other answers"
UNSCORED = "without a teacher's score"


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """One batch.

    Args:
        documents: distinct ones.
        twice: documents that a query brings, and another one before it.
        hard_negatives: that each query brings.
        sits_out: which queries have nothing that they could be told from; the numbers below are of
            the others.
        candidates: that each query is compared with, one answer among them.
        left_out: why a document is no candidate -> how many of them each query has; with the
            candidates they make all documents.
        chance: the least that the loss can be while all scores are equal.
        floor: the least that it can be.
    """

    documents: int
    twice: int
    hard_negatives: Int64[np.ndarray, " Q"]
    sits_out: Bool[np.ndarray, " Q"]
    candidates: Int64[np.ndarray, " _Q"]
    left_out: dict[str, Int64[np.ndarray, " _Q"]]
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
        has_teacher = settings.loss.kind == "distillation"
        self._teacher = TeacherScores(dataset) if has_teacher else None
        self._by_page = None
        if settings.batch.ignore == "document":
            self._by_page = Relations(dataset, "page", self._teacher)
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
        sits_out = ignored.all(dim=1).numpy()
        left_out = self._left_out(picks, rows, positives, ignored, teacher)
        left_out = {why: numbers[~sits_out] for why, numbers in left_out.items()}
        return BatchCounts(
            documents=len(rows),
            twice=len(picks.positives) + int(hard_negatives.sum()) - len(rows),
            hard_negatives=hard_negatives,
            sits_out=sits_out,
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
        if ignored.all():
            raise DatasetError(f"{where}: {self._nothing_compared(picks)}")
        try:
            check_masks(positives, ignored, teacher)
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from None

    def _nothing_compared(self, picks: Picks) -> str:
        """Why no query of a batch has anything to be told from, and what to do."""
        first = self._dataset.queries[picks.queries[0]].id
        if self._teacher is not None:
            return (
                "no query has an answer and something to tell it from, at least 2 with a teacher's "
                f"score among them; the first is {first!r}. Raise batch.hard_negatives, so that "
                "each brings more of what the teacher scored, or score more documents"
            )
        if len(picks.documents) == 1:
            return (
                f"there is one document, that of {first!r}, and nothing to tell it from. Set "
                "batch.rows to 2 or more"
                + (", or judge a negative for each query" if len(picks.queries) == 1 else "")
            )
        ignore = self._settings.batch.ignore
        alike = "" if ignore == "none" else f" or is of the same {ignore} as one that does"
        return (
            f"no query has anything to be told from: for each, as for {first!r}, every one of the "
            f"{len(picks.documents)} documents answers it{alike}. Raise batch.rows, or use "
            f"documents of more than one {'page' if ignore == 'none' else ignore}"
        )
