"""Queries of a dataset to contrastive batches: images, tokens, and who ignores whom.

A batch is the same whatever the number of ranks: all ranks draw it, and each makes its own share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from colfolio.batch import ContrastiveBatch
from colfolio.data.collate import Collator
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.lookalikes import Lookalikes
from colfolio.data.picks import BatchSettings, Picker, Picks
from colfolio.data.preparing.deduplicate import Hashes, pixel_digest
from colfolio.data.sampler import SamplerPosition
from colfolio.data.teacher import TeacherScores
from colfolio.distributed import World
from colfolio.errors import DatasetError, DocumentError

_MAX_UNREADABLE = 0.01
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """A rank's share of a batch, and where the sampler stands behind it.

    Args:
        hashes: of the share's documents, if copies are ignored.
        picked: the row of the corpus that each query of the share was to bring as its answer.
        lost: row -> reason, of the share's images that could not be read.
        num_tried: images that all ranks together have tried to read so far.
    """

    batch: ContrastiveBatch
    after: SamplerPosition
    hashes: Hashes | None
    picked: list[int]
    lost: dict[int, str]
    num_tried: int


class BatchSource:
    """Batches of one dataset split without end, the same for the same seed and position.

    Args:
        dataset: the training split.
        collator: of the model that is trained.
        settings: rows and masks.
        seed: of order and of the choice among several positives.
        world: the ranks that share each batch.
        teacher: whose scores come with each batch.
        with_digests: of the documents' pixels, under which frozen features are kept.

    Attributes:
        unreadable: corpus id -> reason, of images that no rank could decode so far; a query whose
            positive is one of them is left out of its batch.

    Raises:
        DatasetError: the settings weigh a kind that no query has, or want more rows than an epoch
            has queries.
    """

    def __init__(
        self,
        dataset: RetrievalDataset,
        collator: Collator,
        settings: BatchSettings,
        seed: int,
        world: World | None = None,
        teacher: TeacherScores | None = None,
        *,
        with_digests: bool = False,
    ) -> None:
        self._dataset = dataset
        self._collator = collator
        self._world = world or World()
        self._with_digests = with_digests
        self._picker = Picker(dataset, settings, seed, teacher)
        self._teacher = teacher
        likeness = settings.ignore_copies
        self._lookalikes = None if likeness == "none" else Lookalikes(dataset.corpus, likeness)
        self._tried: set[int] = set()
        self.unreadable: dict[str, str] = {}

    def batches(self, position: SamplerPosition) -> Iterator[DrawnBatch]:
        """This rank's share of each batch from a position on; its masks are of the share alone.

        Raises:
            DatasetError: in a world of one, as `of_all_ranks` does.
        """
        for picks in self._picker.picks(position):
            yield self._collate(picks)

    def of_all_ranks(self, drawn: DrawnBatch) -> ContrastiveBatch:
        """A share with the masks of the whole batch; every rank has to ask at the same time.

        Raises:
            DatasetError: on all ranks, if two images or more, and over 1 % of those that any has
                tried, cannot be decoded, or none that a query of the batch wants.
        """
        world = self._world
        if world.size == 1:
            return drawn.batch
        share, hashes = self._without_lost(drawn), drawn.hashes
        if hashes is not None:
            words = world.gather_rows(torch.from_numpy(hashes.words.view(np.int64)), "own")
            lengths = world.gather_rows(torch.from_numpy(hashes.lengths), "own")
            hashes = Hashes(words.numpy().view(np.uint64), lengths.numpy())
        queries = world.gather_rows(share.query_ids, "own").tolist()
        documents = world.gather_rows(share.document_ids, "own").tolist()
        if not queries:
            raise self._unreadable_error(drawn.num_tried)
        positives, ignored, teacher = self._relations(queries, documents, hashes)
        return replace(share, positives=positives, ignored=ignored, teacher=teacher)

    def _without_lost(self, drawn: DrawnBatch) -> ContrastiveBatch:
        """A share without the queries whose positive another rank was to read, and could not."""
        share, world = drawn.batch, self._world
        if not any(world.gather_counts(len(drawn.lost))):
            return share
        lost = {row: why for each in world.gather_objects(drawn.lost) for row, why in each.items()}
        self._remember(lost, drawn.num_tried)
        kept = [place for place, row in enumerate(drawn.picked) if row not in lost]
        queries = share.queries.select(kept) if kept else share.queries.rows(0, 0)
        return replace(share, queries=queries, query_ids=share.query_ids[kept])

    def _collate(self, picks: Picks) -> DrawnBatch:
        share = self._share(picks)
        # every rank knows what the others try
        self._tried.update(picks.documents)
        images, lost = self._images(share.documents)
        kept = [place for place, row in enumerate(share.picked) if row not in lost]
        if self._world.size == 1:
            self._remember(lost, len(self._tried))
            if not kept:
                raise self._unreadable_error(len(self._tried))
        lengths = self._collator.query_lengths(share.texts)
        kept.sort(key=lambda place: (lengths[place], place))
        queries = [share.queries[place] for place in kept]
        documents = sorted(images, key=lambda row: (images[row].shape[:2], row))
        hashes = self._lookalikes.hashes(documents, images) if self._lookalikes else None
        positives, ignored, teacher = self._relations(queries, documents, hashes)
        batch = ContrastiveBatch(
            self._collator.queries([share.texts[place] for place in kept]),
            self._collator.documents([images[row] for row in documents]),
            positives,
            ignored,
            torch.tensor(queries, dtype=torch.int64),
            torch.tensor(documents, dtype=torch.int64),
            self._digests(images, documents),
            teacher,
        )
        picked = [share.picked[place] for place in kept]
        return DrawnBatch(batch, picks.after, hashes, picked, lost, len(self._tried))

    def _share(self, picks: Picks) -> _Share:
        """This rank's part of a batch that was drawn for all."""
        rank_of = [
            rank
            for rank, part in enumerate(np.array_split(picks.queries, self._world.size))
            for _ in part
        ]
        # a document that several queries bring along is made by the rank of the first
        owners: dict[int, int] = {}
        for rank, row in zip(rank_of, picks.positives, strict=True):
            owners.setdefault(row, rank)
        for rank, rows in zip(rank_of, picks.hard_negatives, strict=True):
            for row in rows:
                owners.setdefault(row, rank)
        mine = [place for place, rank in enumerate(rank_of) if rank == self._world.rank]
        return _Share(
            [picks.queries[place] for place in mine],
            [picks.texts[place] for place in mine],
            [picks.positives[place] for place in mine],
            [row for row, rank in owners.items() if rank == self._world.rank],
        )

    def _images(
        self, rows: list[int]
    ) -> tuple[dict[int, UInt8[np.ndarray, "_H _W 3"]], dict[int, str]]:
        """The decoded images of rows, and why the others cannot be decoded."""
        images, lost = {}, {}
        for row in rows:
            try:
                images[row] = self._dataset.corpus.image(row)
            except DocumentError as error:
                lost[row] = error.reason
        return images, lost

    def _remember(self, lost: dict[int, str], num_tried: int) -> None:
        for row, reason in lost.items():
            self.unreadable[self._dataset.corpus.ids[row]] = reason
        if len(self.unreadable) > max(1, _MAX_UNREADABLE * num_tried):
            raise self._unreadable_error(num_tried)

    def _unreadable_error(self, num_tried: int) -> DatasetError:
        named = list(self.unreadable.items())[:_MOST_NAMED]
        return DatasetError(
            f"{self._dataset.name}, split {self._dataset.split!r}: {len(self.unreadable)} of "
            f"{num_tried} images cannot be read; repair or remove them: "
            + "; ".join(f"{id_!r}: {reason}" for id_, reason in named)
        )

    def _relations(
        self, queries: Sequence[int], documents: Sequence[int], hashes: Hashes | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positives, ignored and teacher's scores between these queries and documents."""
        rows = np.array(documents, dtype=np.int64)
        same = self._lookalikes.pairs(rows, hashes) if self._lookalikes and hashes else None
        positives, ignored = self._picker.relations.masks(queries, rows, same)
        if self._teacher is None:
            return positives, ignored, None
        return positives, ignored, torch.from_numpy(self._teacher.between(queries, rows))

    def _digests(
        self, images: dict[int, UInt8[np.ndarray, "_H _W 3"]], documents: list[int]
    ) -> tuple[bytes, ...] | None:
        if not self._with_digests:
            return None
        return tuple(pixel_digest(images[row]) for row in documents)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank makes of a batch: queries with their texts and picked positives, documents."""

    queries: list[int]
    texts: list[str]
    picked: list[int]
    documents: list[int]
