"""Rows of another trainer's log: each step once, rising, and without gaps that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

_LEAST_LOST = 3  # rows without a loss at the end, that are no gap


@dataclass(frozen=True, slots=True)
class ForeignRow:
    """What a log says of a step, or of the steps since the row before; NaN where it says NaN.

    Args:
        is_empty: the log has a word such as None in the loss's place, which is read as NaN.
    """

    step: int
    loss: float
    lr: float | None = None
    gradient_norm: float | None = None
    is_empty: bool = False


def without_gaps(rows: Sequence[ForeignRow]) -> list[ForeignRow]:
    """The rows without the empty ones, but for those that a log ends with.

    A trainer may write nothing where a step has no loss; where it writes nothing any more, the
    loss was no number.
    """
    sound = [place for place, row in enumerate(rows) if not row.is_empty]
    end = sound[-1] + 1 if sound else 0
    lost = rows[end:]
    return [rows[place] for place in sound] + list(lost if len(lost) >= _LEAST_LOST else ())


def in_order(rows: Sequence[ForeignRow]) -> tuple[tuple[ForeignRow, ...], tuple[str, ...]]:
    """The rows rising by step, and what was made of steps that occur more than once.

    Of a step that occurs again the later row stands, as in a run that was continued. Where steps
    begin again with each epoch the rows are numbered through instead.
    """
    stretches = _stretches(rows)
    if _are_epochs([(stretch[0].step, stretch[-1].step) for stretch in stretches]):
        length = stretches[0][-1].step - stretches[0][0].step + _distance(stretches[0])
        risen = [
            replace(row, step=row.step + number * length)
            for number, stretch in enumerate(stretches)
            for row in stretch
        ]
        told = f"Steps begin again {len(stretches) - 1} times, as with each epoch, and are numbered"
        return tuple(risen), (f"{told} through, to {risen[-1].step}.",)
    found = {row.step: row for row in rows}
    dropped = len(rows) - len(found)
    notes = (f"{dropped} rows of steps that occur again later are left out.",) if dropped else ()
    return tuple(found[step] for step in sorted(found)), notes


def _are_epochs(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether first and last steps are those of epochs, of which the last may be cut short.

    Two stretches of unlike length are a run that was begun anew.
    """
    if not spans or spans.count(spans[0]) < 2:
        return False
    begin, end = spans[-1]
    is_like = begin == spans[0][0] and end <= spans[0][1]
    return is_like and all(span == spans[0] for span in spans[:-1])


def _stretches(rows: Sequence[ForeignRow]) -> list[list[ForeignRow]]:
    """The rows cut where their steps fall back."""
    stretches: list[list[ForeignRow]] = []
    for row in rows:
        if not stretches or row.step < stretches[-1][-1].step:
            stretches.append([])
        stretches[-1].append(row)
    return stretches


def _distance(stretch: Sequence[ForeignRow]) -> int:
    """Steps from one row to the next."""
    if len(stretch) == 1:
        return 1
    return max(1, round((stretch[-1].step - stretch[0].step) / (len(stretch) - 1)))
