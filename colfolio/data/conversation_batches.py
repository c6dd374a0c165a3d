"""Conversations of a dataset to batches: the same whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from colfolio.batch import TextBatch
from colfolio.data.chat import ChatCollator
from colfolio.data.conversations import ConversationDataset
from colfolio.data.sampler import Draw, SamplerPosition, draws
from colfolio.distributed import World
from colfolio.errors import DatasetError


@dataclass(frozen=True, slots=True)
class DrawnConversations:
    """A rank's share of a batch, and where the sampler stands behind it."""

    batch: TextBatch
    after: SamplerPosition


class ConversationSource:
    """Batches of one split without end, the same for the same seed and position.

    Args:
        dataset: the split.
        chat: of the model.
        frame_rate: at which the model reads videos.
        rows: conversations in a batch, of all ranks together.
        seed: of the order.
        world: the ranks that share each batch.

    Raises:
        DatasetError: a batch has more rows than the split, or fewer than there are ranks.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        chat: ChatCollator,
        frame_rate: float,
        rows: int,
        seed: int,
        world: World | None = None,
    ) -> None:
        self._dataset, self._chat, self._frame_rate = dataset, chat, frame_rate
        self._rows, self._seed, self._world = rows, seed, world or World()
        if not self._world.size <= rows <= len(dataset):
            raise DatasetError(
                f"{dataset.name}, split {dataset.split!r}: batch.rows is {rows}; it must be at "
                f"least the number of ranks, {self._world.size}, and at most that of "
                f"conversations, {len(dataset)}"
            )

    def batches(self, position: SamplerPosition) -> Iterator[DrawnConversations]:
        """This rank's share of each batch from a position on.

        Raises:
            DatasetError: an image or video cannot be read.
        """
        everyone = [1.0] * len(self._dataset)
        for draw in draws(everyone, self._rows, self._seed, position):
            yield DrawnConversations(self._share(draw), draw.after)

    def _share(self, draw: Draw) -> TextBatch:
        rows = share_of(draw.queries, self._world)
        return collated(self._dataset, rows, self._chat, self._frame_rate)


def in_order(
    dataset: ConversationDataset,
    chat: ChatCollator,
    frame_rate: float,
    rows: int,
    world: World,
) -> Iterator[TextBatch]:
    """A whole split once, this rank's share of so many conversations after another.

    Raises:
        DatasetError: an image or video cannot be read.
    """
    for begin in range(0, len(dataset), rows):
        of_all = range(begin, min(begin + rows, len(dataset)))
        yield collated(dataset, share_of(of_all, world), chat, frame_rate)


def collated(
    dataset: ConversationDataset, rows: Sequence[int], chat: ChatCollator, frame_rate: float
) -> TextBatch:
    """Conversations by their numbers, those of like length beside one another.

    Raises:
        DatasetError: an image or video cannot be read.
    """
    collator = chat.collator
    visuals = {row: dataset.visual(row, frame_rate, collator.budget.max_pixels) for row in rows}
    texts = {row: len(dataset.questions[row] + dataset.answers[row]) for row in rows}
    ordered = sorted(
        rows, key=lambda row: (collator.num_visual_tokens(visuals[row]), texts[row], row)
    )
    return chat.conversations(
        [visuals[row] for row in ordered],
        [dataset.questions[row] for row in ordered],
        [dataset.answers[row] for row in ordered],
        ordered,
    )


def share_of(rows: Sequence[int], world: World) -> list[int]:
    """This rank's part of the rows of a batch."""
    return np.array_split(np.array(rows), world.size)[world.rank].tolist()
