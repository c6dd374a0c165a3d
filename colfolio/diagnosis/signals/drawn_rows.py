"""How a run's batches put its rows together: who meets whom again, and who stays a neighbour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from colfolio.data.picks import Picker, Picks
from colfolio.data.sampler import SamplerPosition

_MOST_DRAWN = 16384  # queries of an epoch


def first_epochs(picker: Picker) -> tuple[list[Picks], list[Picks]]:
    """The batches of the first epoch and of the second, the first ones of each if they are many."""
    return _batches_of(picker, 0), _batches_of(picker, 1)


def meeting_again(
    epoch: Iterable[Sequence[int]], following: Iterable[Sequence[int]]
) -> float | None:
    """Share of the pairs of rows of a batch that share a batch of the next epoch too.

    Args:
        epoch, following: the queries of each batch.

    Returns:
        None if no batch has two rows.
    """
    later = {query: number for number, batch in enumerate(following) for query in batch}
    pairs = again = 0
    for batch in epoch:
        pairs += _pairs(len(batch))
        places = Counter(later[query] for query in batch if query in later)
        again += sum(map(_pairs, places.values()))
    return again / pairs if pairs else None


def with_neighbours(batches: Iterable[Sequence[int]]) -> float | None:
    """Share of the rows of a batch whose next row of the data set is in the batch too."""
    rows = near = 0
    for batch in batches:
        drawn = set(batch)
        rows += len(batch)
        near += sum(query + 1 in drawn for query in batch)
    return near / rows if rows else None


def _batches_of(picker: Picker, epoch: int) -> list[Picks]:
    drawn = 0
    batches: list[Picks] = []
    for picks in _of_epoch(picker.picks(SamplerPosition(epoch)), epoch):
        batches.append(picks)
        drawn += len(picks.queries)
        if drawn >= _MOST_DRAWN:
            break
    return batches


def _of_epoch(batches: Iterator[Picks], epoch: int) -> Iterator[Picks]:
    return takewhile(lambda picks: picks.after.epoch == epoch, batches)


def _pairs(count: int) -> int:
    return count * (count - 1) // 2
