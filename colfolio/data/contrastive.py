"""Queries of a dataset to contrastive batches: which documents come along, and who ignores whom.

A batch is the same whatever the number of ranks: all ranks draw it, and each makes its own share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from pydantic import Field

from colfolio.batch import ContrastiveBatch
from colfolio.config import Settings
from colfolio.data.collate import Collator
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.lookalikes import Likeness, Lookalikes
from colfolio.data.preparing.deduplicate import Hashes, pixel_digest
from colfolio.data.relations import Ignore, Relations
from colfolio.data.sampler import Draw, SamplerPosition, check_enough, draws
from colfolio.distributed import World
from colfolio.errors import DatasetError, DocumentError

_MAX_UNREADABLE = 0.01
_MOST_NAMED = 5


class BatchSettings(Settings):
    """What one batch holds, of all ranks together.

    Args:
        rows: queries in a batch, each with one of its positive documents, and some of its judged
            negatives where it has any.
        hard_negatives: how many of its judged negatives each query brings along, at most.
        candidates: distinct documents that every query is to be compared with; more than `rows` and
            `hard_negatives` can bring is refused. None asks for no number.
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
class DrawnBatch:
    """A rank's share of a batch, and where the sampler stands behind it.

    `hashes` are of the share's documents, if copies are ignored.
    """

    batch: ContrastiveBatch
    after: SamplerPosition
    hashes: Hashes | None


class BatchSource:
    """Batches of one dataset split without end, the same for the same seed and position.

    Args:
        dataset: the training split.
        collator: of the model that is trained.
        settings: rows and masks.
        seed: of order and of the choice among several positives.
        world: the ranks that share each batch.
        with_digests: of the documents' pixels, under which frozen features are kept.

    Attributes:
        unreadable: corpus id -> reason, of images that could not be decoded so far; a query whose
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
        *,
        with_digests: bool = False,
    ) -> None:
        self._dataset = dataset
        self._collator = collator
        self._settings = settings
        self._seed = seed
        self._world = world or World()
        self._with_digests = with_digests
        self._texts = [query.text for query in dataset.queries]
        self._relations = Relations(dataset, settings.ignore)
        likeness = settings.ignore_copies
        self._lookalikes = None if likeness == "none" else Lookalikes(dataset.corpus, likeness)
        self._weights = _weights(dataset, settings.kind_weights)
        check_enough(self._weights, settings.rows)
        self._tried: set[int] = set()
        self.unreadable: dict[str, str] = {}

    def batches(self, position: SamplerPosition) -> Iterator[DrawnBatch]:
        """This rank's share of each batch from a position on; its masks are of the share alone.

        Raises:
            DatasetError: two images or more, and over 1 % of those tried, cannot be decoded, or
                none of a batch can.
        """
        for draw in draws(self._weights, self._settings.rows, self._seed, position):
            yield self._collate(draw)

    def of_all_ranks(self, drawn: DrawnBatch) -> ContrastiveBatch:
        """A share with the masks of the whole batch; every rank has to ask at the same time."""
        share, world = drawn.batch, self._world
        if world.size == 1:
            return share
        hashes = drawn.hashes
        if hashes is not None:
            words = world.gather_rows(torch.from_numpy(hashes.words.view(np.int64)), "own")
            lengths = world.gather_rows(torch.from_numpy(hashes.lengths), "own")
            hashes = Hashes(words.numpy().view(np.uint64), lengths.numpy())
        positives, ignored = self._masks(
            world.gather_rows(share.query_ids, "own").tolist(),
            world.gather_rows(share.document_ids, "own").tolist(),
            hashes,
        )
        return replace(share, positives=positives, ignored=ignored)

    def _collate(self, draw: Draw) -> DrawnBatch:
        share = self._share(draw)
        images = self._images(share.documents)
        # a query whose positive this rank was to read, and could not, is left out
        lost = set(share.documents) - set(images)
        kept = [place for place, row in enumerate(share.picked) if row not in lost]
        if not kept and self._world.size == 1:
            raise self._unreadable_error()
        lengths = self._collator.query_lengths(share.texts)
        kept.sort(key=lambda place: (lengths[place], place))
        queries = [share.queries[place] for place in kept]
        documents = sorted(images, key=lambda row: (images[row].shape[:2], row))
        hashes = self._lookalikes.hashes(documents, images) if self._lookalikes else None
        batch = ContrastiveBatch(
            self._collator.queries([share.texts[place] for place in kept]),
            self._collator.documents([images[row] for row in documents]),
            *self._masks(queries, documents, hashes),
            torch.tensor(queries, dtype=torch.int64),
            torch.tensor(documents, dtype=torch.int64),
            tuple(pixel_digest(images[row]) for row in documents) if self._with_digests else None,
        )
        return DrawnBatch(batch, draw.after, hashes)

    def _share(self, draw: Draw) -> _Share:
        """This rank's part of a draw; every random choice is made for all ranks, in one order."""
        picked = [
            int(draw.generator.choice(self._relations.positives[query])) for query in draw.queries
        ]
        texts = [self._asked(query, draw) for query in draw.queries]
        refused = [self._hard_negatives(query, draw) for query in draw.queries]
        rank_of = [
            rank
            for rank, part in enumerate(np.array_split(draw.queries, self._world.size))
            for _ in part
        ]
        # a document that several queries bring along is made by the rank of the first
        owners: dict[int, int] = {}
        for rank, row in zip(rank_of, picked, strict=True):
            owners.setdefault(row, rank)
        for rank, rows in zip(rank_of, refused, strict=True):
            for row in rows:
                owners.setdefault(row, rank)
        mine = [place for place, rank in enumerate(rank_of) if rank == self._world.rank]
        return _Share(
            [draw.queries[place] for place in mine],
            [texts[place] for place in mine],
            [picked[place] for place in mine],
            [row for row, rank in owners.items() if rank == self._world.rank],
        )

    def _hard_negatives(self, query: int, draw: Draw) -> list[int]:
        refused = self._relations.refused[query]
        count = min(self._settings.hard_negatives, len(refused))
        return draw.generator.choice(refused, count, replace=False).tolist() if count else []

    def _images(self, rows: list[int]) -> dict[int, UInt8[np.ndarray, "_H _W 3"]]:
        """The decoded images of rows; what cannot be decoded is left out and remembered."""
        corpus, images = self._dataset.corpus, {}
        for row in rows:
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
        self, queries: Sequence[int], documents: Sequence[int], hashes: Hashes | None
    ) -> tuple[Bool[torch.Tensor, "Q D"], Bool[torch.Tensor, "Q D"]]:
        rows = np.array(documents, dtype=np.int64)
        same = self._lookalikes.pairs(rows, hashes) if self._lookalikes and hashes else None
        return self._relations.masks(queries, rows, same)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank makes of a batch: queries with their texts and picked positives, documents."""

    queries: list[int]
    texts: list[str]
    picked: list[int]
    documents: list[int]


def _weights(dataset: RetrievalDataset, kind_weights: dict[str, float]) -> list[float]:
    kinds = {query.kind for query in dataset.queries}
    unknown = sorted(set(kind_weights) - kinds)
    if unknown:
        raise DatasetError(
            f"{dataset.name}, split {dataset.split!r}: kind_weights names {unknown}, but its "
            f"queries are of the kinds {sorted(kinds)}"
        )
    return [kind_weights.get(query.kind, 1.0) for query in dataset.queries]
