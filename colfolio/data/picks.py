"""Which queries make a batch and what they bring along: drawn for all ranks together.

Nothing is decoded here, so that a run can be counted before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from colfolio.config import Settings
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.lookalikes import Likeness
from colfolio.data.relations import Ignore, Relations
from colfolio.data.sampler import Draw, SamplerPosition, check_enough, draws
from colfolio.data.teacher import TeacherScores
from colfolio.errors import DatasetError


class BatchSettings(Settings):
    """What one batch holds, of all ranks together.

    Args:
        rows: queries in a batch, each with one of its positive documents, and some of its judged
            negatives where it has any.
        hard_negatives: how many of its judged negatives each query brings along, at most; for
            distillation first of other documents that the teacher scored.
        candidates: distinct documents that the median query of a run's first batches is compared
            with at least, its answer among them; a run that gives it fewer is refused. Half of the
            queries may get fewer, and copies that are found as images are read still go off. None
            asks for no number.
        ignore: documents of the same `page` or `document` as a query's positive are not counted
            as its negatives, unless they are judged to be; `none` counts them.
        ignore_copies: nor are images that are its positive again: `exact` to the pixel, or `near`,
            as another scan or another page number is, which takes what differs in colour alone for
            a copy too.
        kind_weights: expected appearances in an epoch of a query of each kind; 1 where not named.
        lowercase_share: of all queries, in lower case, so that a search may be typed that way.
        lowercase_from_epoch: epochs before it keep case, which is learnt sooner.
    """

    rows: int = Field(default=32, ge=1)
    hard_negatives: int = Field(default=1, ge=0)
    candidates: int | None = Field(default=None, ge=2)
    ignore: Ignore = "page"
    ignore_copies: Likeness | Literal["none"] = "exact"
    kind_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    lowercase_share: float = Field(default=0.0, ge=0, le=1)
    lowercase_from_epoch: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Picks:
    """A batch before its images are read; entry i of each list is of query i.

    Args:
        queries: numbers of the dataset's queries.
        texts: as they are asked, in lower case where that was drawn.
        positives: the row of the corpus that each brings as its answer.
        hard_negatives: rows judged not to answer it that it brings as well.
        after: where the sampler stands behind the batch.
    """

    queries: list[int]
    texts: list[str]
    positives: list[int]
    hard_negatives: list[list[int]]
    after: SamplerPosition

    @property
    def documents(self) -> list[int]:
        """The rows of the batch, each once, those of the positives first."""
        refused = [row for rows in self.hard_negatives for row in rows]
        return list(dict.fromkeys([*self.positives, *refused]))


class Picker:
    """Draws batches of a dataset split without end, the same for the same seed and position.

    Args:
        seed: of order and of the choice among several positives.
        teacher: whose scored documents may come along as well, for distillation.

    Attributes:
        relations: what each query is to each row of the corpus.

    Raises:
        DatasetError: the settings weigh a kind that no query has, or want more rows than an epoch
            has queries.
    """

    def __init__(
        self,
        dataset: RetrievalDataset,
        settings: BatchSettings,
        seed: int,
        teacher: TeacherScores | None = None,
    ) -> None:
        self._teacher = teacher
        self._settings = settings
        self._seed = seed
        self._texts = [query.text for query in dataset.queries]
        self._weights = _weights(dataset, settings.kind_weights)
        check_enough(self._weights, settings.rows)
        self.relations = Relations(dataset, settings.ignore, teacher)

    def picks(self, position: SamplerPosition) -> Iterator[Picks]:
        """Batch after batch from a position on."""
        for draw in draws(self._weights, self._settings.rows, self._seed, position):
            yield self._pick(draw)

    def _pick(self, draw: Draw) -> Picks:
        """Every random choice about a batch, in one order."""
        positives = [
            int(draw.generator.choice(self.relations.positives[query])) for query in draw.queries
        ]
        texts = [self._asked(query, draw) for query in draw.queries]
        refused = [self._hard_negatives(query, draw) for query in draw.queries]
        return Picks(draw.queries, texts, positives, refused, draw.after)

    def _asked(self, query: int, draw: Draw) -> str:
        is_time = draw.after.epoch >= self._settings.lowercase_from_epoch
        is_lower = draw.generator.random() < self._settings.lowercase_share
        return self._texts[query].lower() if is_time and is_lower else self._texts[query]

    def _hard_negatives(self, query: int, draw: Draw) -> list[int]:
        wanted, refused = self._settings.hard_negatives, self.relations.refused[query]
        if self._teacher is None:
            return _some(refused, wanted, draw.generator)
        scored = np.setdiff1d(self._teacher.rows[query], self.relations.answers[query])
        first = _some(scored, wanted, draw.generator)
        others = np.setdiff1d(refused, scored)
        return first + _some(others, wanted - len(first), draw.generator)


def _some(rows: np.ndarray, wanted: int, generator: np.random.Generator) -> list[int]:
    count = min(wanted, len(rows))
    return generator.choice(rows, count, replace=False).tolist() if count else []


def _weights(dataset: RetrievalDataset, kind_weights: dict[str, float]) -> list[float]:
    kinds = {query.kind for query in dataset.queries}
    unknown = sorted(set(kind_weights) - kinds)
    if unknown:
        raise DatasetError(
            f"{dataset.name}, split {dataset.split!r}: kind_weights names {unknown}, but its "
            f"queries are of the kinds {sorted(kinds)}"
        )
    return [kind_weights.get(query.kind, 1.0) for query in dataset.queries]
