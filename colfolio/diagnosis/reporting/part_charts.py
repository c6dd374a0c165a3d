"""What training did to each part of a model: a table, and curves of gradients, updates, rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from colfolio.diagnosis.reporting.drawing import (
    ACCENT,
    PART_COLOURS,
    SMOOTH_POINTS,
    Chart,
    Course,
    Drawing,
    binned,
    drawing,
)
from colfolio.diagnosis.training_log import LoggedPart, LoggedStep
from colfolio.models.selectors import PARTS

_TITLES = {
    "gradient_norm": "Gradient norm, by part",
    "update_ratio": "Update over weights, by part",
    "lr": "Learning rate, by part",
}
# Powers of ten of the axis below the highest value. A rate ends at 0, and updates with it; what is
# left of a gradient near 0 tells a part that is cut off from one that has collapsed.
_DECADES = {"gradient_norm": 8, "update_ratio": 4, "lr": 4}
_ROOM_BELOW = 0.8  # of the lowest value that is drawn
_BELOW, _ZERO = " ↓", " 0"  # behind the name of a line that ends at the lower edge
_SIGNS = {_BELOW: "↓ ends below the axis.", _ZERO: "0 is exactly 0, drawn at the lower edge."}
_Line = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class PartRow:
    """A part at its first and its last step, and since when its gradient is exactly 0.

    Args:
        zero_from: the step from which on it was 0 in every one; None if it was not 0 in the last.
    """

    name: str
    first: LoggedPart
    last: LoggedPart
    zero_from: int | None


def part_rows(rows: Sequence[LoggedStep]) -> list[PartRow]:
    """Each part that trained; none for a log that says nothing of parts."""
    found = []
    for part in PARTS:
        taken = _taken(rows, part)
        if not taken:
            continue
        zero_from = None
        for row in reversed(taken):
            if row.parts[part].gradient_norm != 0:
                break
            zero_from = row.step
        first, last = taken[0].parts[part], taken[-1].parts[part]
        found.append(PartRow(part, first, last, zero_from))
    return found


def zero_gradients(parts: Sequence[PartRow]) -> list[str]:
    """Sentences on the parts that no gradient reaches any more."""
    steps = sorted({part.zero_from for part in parts if part.zero_from is not None})
    return [
        f"The gradient of {', '.join(part.name for part in parts if part.zero_from == step)} "
        f"is 0 from step {step:,} on."
        for step in steps
    ]


def part_charts(rows: Sequence[LoggedStep], course: Course) -> list[Chart]:
    """Each curve; none for a log that says nothing of parts."""
    return [chart for name in _TITLES for chart in _chart(rows, name, course)]


def _chart(rows: Sequence[LoggedStep], name: str, course: Course) -> list[Chart]:
    lines: dict[str, _Line] = {
        part: line for part in PARTS if (line := _line(rows, part, name)) is not None
    }
    floors = {part: _least_rates(rows, part) for part in lines} if name == "lr" else {}
    drawn_lines = [*lines.values(), *filter(None, floors.values())]
    positive = [value for _, values in drawn_lines for value in values if value > 0]
    if not positive:
        return []
    colours: dict[str, str] = dict(zip(PARTS, cycle(PART_COLOURS), strict=False))
    if _are_equal(lines) and not any(floors.values()):
        lines, colours = {"all": next(iter(lines.values()))}, {"all": ACCENT}
    lowest = max(_ROOM_BELOW * min(positive), max(positive) / 10 ** _DECADES[name])
    with drawing(course) as drawn:
        drawn.axes.set_yscale("log")
        drawn.axes.set_ylim(lowest, max(positive) * 1.4)
        for part, line in sorted(lines.items(), key=lambda each: each[1][1][-1]):
            _draw(drawn, part, line, floors.get(part), colours[part], lowest)
    signs = {_sign(values[-1], lowest) for _, values in lines.values()}
    note = " ".join(told for sign, told in _SIGNS.items() if sign in signs)
    return [Chart(_TITLES[name], drawn.svg, note)]


def _draw(
    drawn: Drawing, name: str, line: _Line, floor: _Line | None, colour: str, lowest: float
) -> None:
    """A line, and a band down to its floor; along the lower edge where it is below the axis."""
    axes, (steps, values) = drawn.axes, line
    shown = np.maximum(values, lowest)
    axes.plot(steps, shown, color=colour, linewidth=1.5, solid_capstyle="round")
    if floor is not None:
        below = np.maximum(floor[1], lowest)
        axes.plot(steps, below, color=colour, linewidth=0.8)
        axes.fill_between(steps, shown, below, color=colour, alpha=0.15, linewidth=0)
    drawn.name_end(name + _sign(values[-1], lowest), shown[-1], colour)


def _sign(value: float, lowest: float) -> str:
    if value == 0:
        return _ZERO
    return _BELOW if value < lowest else ""


def _taken(rows: Sequence[LoggedStep], part: str) -> list[LoggedStep]:
    """The steps that a part took; one that overflowed is none."""
    return [row for row in rows if part in row.parts and not row.is_skipped]


def _line(rows: Sequence[LoggedStep], part: str, name: str) -> _Line | None:
    """Means over stretches of the steps in which the part trained; None if these are too few."""
    found = [(row.step, getattr(row.parts[part], name)) for row in _taken(rows, part)]
    shown = [(step, value) for step, value in found if 0 <= value < float("inf")]
    if len(shown) < 2:
        return None
    steps, values = zip(*shown, strict=True)
    return binned(steps, values, SMOOTH_POINTS)


def _least_rates(rows: Sequence[LoggedStep], part: str) -> _Line | None:
    """The lowest rate in a part, at the places of its highest; None where they never differ."""
    taken = _taken(rows, part)
    found = [(row.step, row.parts[part].lr, row.parts[part].lr_least) for row in taken]
    if all(least in (None, highest) for _, highest, least in found):
        return None
    shown = [each for each in found if 0 <= each[1] < float("inf")]
    least_rates = [highest if least is None else least for _, highest, least in shown]
    return binned([step for step, *_ in shown], least_rates, SMOOTH_POINTS)


def _are_equal(lines: dict[str, _Line]) -> bool:
    first, *others = lines.values()
    return len(lines) > 1 and all(np.array_equal(first, line) for line in others)
