"""Which queries come next: an order drawn from (seed, epoch) alone, so a position says it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from colfolio.errors import DatasetError


@dataclass(frozen=True, slots=True)
class SamplerPosition:
    """Where a run stands in its data: the next batch is batch `index` of `epoch`."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Draw:
    """One batch of queries and the generator of every random choice about it."""

    queries: list[int]
    generator: np.random.Generator
    after: SamplerPosition


def draws(
    weights: Sequence[float], rows: int, seed: int, position: SamplerPosition
) -> Iterator[Draw]:
    """Batches of query numbers without end, from a position on.

    Args:
        weights: expected appearances of each query in one epoch; 1 is once. A fraction appears in
            some epochs only.
        rows: queries in a batch, all distinct where no weight is over 1; an epoch's incomplete last
            batch is left out.
        seed: of the order.
        position: where to go on.

    Raises:
        DatasetError: an epoch has fewer queries than a batch has rows.
    """
    check_enough(weights, rows)
    wanted = np.asarray(weights, dtype=np.float64)
    epoch, index = position.epoch, position.index
    while True:
        order = _epoch_order(wanted, seed, epoch)
        for batch in range(index, len(order) // rows):
            picked = order[batch * rows : (batch + 1) * rows].tolist()
            generator = np.random.default_rng((seed, 1, epoch, batch))
            yield Draw(picked, generator, SamplerPosition(epoch, batch + 1))
        epoch, index = epoch + 1, 0


def check_enough(weights: Sequence[float], rows: int) -> None:
    """Refuse a batch of more rows than an epoch has queries.

    Raises:
        DatasetError: names both numbers.
    """
    queries = int(np.sum(weights))
    if queries < rows:
        raise DatasetError(
            f"a batch has {rows} queries, but the training split has only {queries} an epoch; set "
            f"batch.rows to {queries} or less"
        )


def _epoch_order(weights: np.ndarray, seed: int, epoch: int) -> Int64[np.ndarray, " draws"]:
    generator = np.random.default_rng((seed, 0, epoch))
    whole = np.floor(weights + generator.random(len(weights))).astype(np.int64)
    return generator.permutation(np.repeat(np.arange(len(weights)), whole))
