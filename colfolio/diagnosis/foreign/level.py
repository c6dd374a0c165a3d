"""Where the losses of a log stand, how much they wobble there, and whether they fell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LEAST_ROWS = 5  # of a stretch that is judged by
_WOBBLES = 0.03  # of its mean, that a loss which stands still strays at most (standard deviation)
_FALLS = 3.0  # times the noise of two means, that one lies below the other
_ON_LEVEL = 0.003  # of a level, that a loss which stands there is away from it
_MOST_OFF = 0.01  # the same of a loss that wobbles
_ERRORS = 3.0


@dataclass(frozen=True, slots=True)
class Standing:
    """A loss that stands still over the last half of a log.

    Args:
        level: its mean.
        wobble: standard deviation over the mean.
        rows: that it is of.
    """

    level: float
    wobble: float
    rows: int

    def is_at(self, expected: float) -> bool:
        """Whether it stands at a level, as well as its wobble lets that be seen."""
        error = _ERRORS * self.wobble / math.sqrt(self.rows)
        return abs(self.level - expected) <= min(max(_ON_LEVEL, error), _MOST_OFF) * expected


def standing(losses: Sequence[float]) -> Standing | None:
    """Where the last half of the losses stands; None if it moves, or is too short to say."""
    last = losses[len(losses) // 2 :]
    if len(last) < LEAST_ROWS or has_fallen(last) or not (level := _mean(last)) > 0:
        return None
    wobble = math.sqrt(_mean([(loss - level) ** 2 for loss in last])) / level
    return Standing(level, wobble, len(last)) if wobble <= _WOBBLES else None


def has_fallen(losses: Sequence[float]) -> bool:
    """Whether the last fifth of the losses lies below the first by more than their noise.

    Noise is what differs from one row to the next, so that a long fall is not taken for it.
    """
    if len(losses) < 2:
        return False
    count = max(1, len(losses) // 5)
    steps = [after - before for before, after in pairwise(losses)]
    noise = math.sqrt(_mean([step**2 for step in steps]) / 2)
    fall = _mean(losses[:count]) - _mean(losses[-count:])
    return fall > _FALLS * noise * math.sqrt(2 / count) and fall > 0


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)
