"""What training did to each part of a model, as curves: gradients, updates, rates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from colfolio.diagnosis.drawing import (
    ACCENT,
    PART_COLOURS,
    SMOOTH_POINTS,
    Mark,
    binned,
    drawing,
)
from colfolio.diagnosis.training_log import LoggedStep
from colfolio.models.selectors import PARTS

_CURVES = {
    "gradient_norm": "Gradient norm, by part",
    "update_ratio": "Update over weights, by part",
    "lr": "Learning rate, by part",
}
_DECADES = 4  # of the axis below the highest value: a rate ends at 0, which has no logarithm
_LEAST_GAP = 0.085  # of the axis between two names
_Line = tuple[np.ndarray, np.ndarray]


def part_charts(rows: Sequence[LoggedStep], marks: Sequence[Mark]) -> list[tuple[str, str]]:
    """Title and SVG of each curve; none for a log that says nothing of parts."""
    return [chart for name, title in _CURVES.items() for chart in _chart(rows, name, title, marks)]


def _chart(
    rows: Sequence[LoggedStep], name: str, title: str, marks: Sequence[Mark]
) -> list[tuple[str, str]]:
    lines: dict[str, _Line] = {
        part: line for part in PARTS if (line := _line(rows, part, name)) is not None
    }
    if not lines:
        return []
    floors = {part: _least_rates(rows, part) for part in lines} if name == "lr" else {}
    colours: dict[str, str] = dict(zip(PARTS, cycle(PART_COLOURS), strict=False))
    if _are_equal(lines) and not any(floors.values()):
        lines, colours = {"all": next(iter(lines.values()))}, {"all": ACCENT}
    with drawing(marks) as drawn:
        axes = drawn.axes
        axes.set_yscale("log")
        axes.set_xlim(rows[0].step, rows[-1].step)
        for part, line in lines.items():
            axes.plot(*line, color=colours[part], linewidth=1.5, solid_capstyle="round")
            if floor := floors.get(part):
                axes.plot(*floor, color=colours[part], linewidth=0.8)
                axes.fill_between(*line, floor[1], color=colours[part], alpha=0.15, linewidth=0)
        drawn_lines = [*lines.values(), *filter(None, floors.values())]
        highest = max(values.max() for _, values in drawn_lines)
        lowest = min(values.min() for _, values in drawn_lines)
        axes.set_ylim(max(lowest * 0.8, highest / 10**_DECADES), highest * 1.4)
        _name_lines(axes, lines, colours)
    return [(title, drawn.svg)]


def _line(rows: Sequence[LoggedStep], part: str, name: str) -> _Line | None:
    """Means over stretches of the steps in which the part trained; None if these are too few."""
    found = [
        (row.step, getattr(row.parts[part], name))
        for row in rows
        if part in row.parts and not row.is_skipped
    ]
    positive = [(step, value) for step, value in found if 0 < value < float("inf")]
    if len(positive) < 2:
        return None
    steps, values = zip(*positive, strict=True)
    return binned(steps, values, SMOOTH_POINTS)


def _least_rates(rows: Sequence[LoggedStep], part: str) -> _Line | None:
    """The lowest rate in a part, at the places of its highest; None where they never differ."""
    taken = [row for row in rows if part in row.parts and not row.is_skipped]
    found = [(row.step, row.parts[part].lr, row.parts[part].lr_least) for row in taken]
    if all(least in (None, highest) for _, highest, least in found):
        return None
    shown = [each for each in found if 0 < each[1] < float("inf")]
    least_rates = [highest if least is None else least for _, highest, least in shown]
    return binned([step for step, *_ in shown], least_rates, SMOOTH_POINTS)


def _are_equal(lines: dict[str, _Line]) -> bool:
    first, *others = lines.values()
    return len(lines) > 1 and all(np.array_equal(first, line) for line in others)


def _name_lines(axes: Axes, lines: dict[str, _Line], colours: dict[str, str]) -> None:
    """The name of each line right of its end, moved where two would lie over one another."""
    to_axes = axes.transData.transform
    heights = {
        part: axes.transAxes.inverted().transform(to_axes((steps[-1], values[-1])))[1]
        for part, (steps, values) in lines.items()
    }
    ends = sorted(heights, key=lambda part: heights[part])
    for part, height in zip(ends, _spread([heights[part] for part in ends]), strict=True):
        axes.text(1.015, height, part, transform=axes.transAxes, va="center", color=colours[part])


def _spread(heights: Sequence[float]) -> list[float]:
    """Rising heights, at least a gap apart, none above the axes."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _LEAST_GAP if placed else 0.0))
    tops = [1.0 - below * _LEAST_GAP for below in reversed(range(len(placed)))]
    return [min(height, top) for height, top in zip(placed, tops, strict=True)]
