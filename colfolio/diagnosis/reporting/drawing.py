"""Axes, lines and marks of a report's drawings: inline SVG without ids or fonts.

Colours stand for variables of the page's style, so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ACCENT, FAINT, MUTED = "#000001", "#000002", "#000003"
PART_COLOURS = tuple(f"#0000{number:02}" for number in range(10, 17))
RAW_POINTS, SMOOTH_POINTS = 500, 60
_BETWEEN_ENDS, _BETWEEN_MARKS = 0.085, 0.04  # least gaps between names, of the axes
_VARIABLES = {ACCENT: "var(--accent)", FAINT: "var(--faint)", MUTED: "var(--muted)"} | {
    colour: f"var(--part-{number})" for number, colour in enumerate(PART_COLOURS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "colfolio",
    "font.size": 8,
    "text.color": MUTED,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing as SVG, its title, and what has to be said below it, if anything."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A step that gets a line in every curve: its short name, and what happened there."""

    step: int
    name: str
    told: str = ""


@dataclass(frozen=True, slots=True)
class Course:
    """The steps that all curves of a run go across, and those of them that are marked."""

    first: int
    last: int
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """What is written right of the axes at the height of a value."""

    text: str
    value: float
    colour: str
    weight: str


@dataclass(slots=True)
class Drawing:
    """Axes to draw on, and the SVG once they are left."""

    axes: Axes
    ends: list[End] = field(default_factory=list)
    svg: str = ""

    def name_end(self, text: str, value: float, colour: str, weight: str = "normal") -> None:
        """Write right of the axes at the height of a value, a little beside it where names meet."""
        self.ends.append(End(text, value, colour, weight))

    def draw_curve(
        self,
        steps: np.ndarray,
        values: np.ndarray,
        name: str = "",
        colour: str = ACCENT,
        **style: Any,
    ) -> None:
        """A firm line with its name and its last value."""
        self.axes.plot(steps, values, color=colour, linewidth=1.8, **style)
        self.name_end(f"{name} {short(values[-1])}".strip(), values[-1], colour, "bold")

    def draw_level(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        """A dashed line with its name and its last value."""
        dashes = {"linestyle": (0, (4, 3)), "zorder": 3}  # seen on a curve that lies on it
        self.axes.plot(steps, values, color=MUTED, linewidth=1.0, **dashes)
        self.name_end(f"{name} {short(values[-1])}", values[-1], MUTED)

    def draw_constant(self, name: str, course: Course, value: float) -> None:
        """A dashed line at one height, with its name and value."""
        self.draw_level(name, np.array([course.first, course.last]), np.array([value, value]))


@contextmanager
def drawing(course: Course | None = None) -> Iterator[Drawing]:
    """Empty axes, across the steps of a run or, without a course, across whatever is drawn."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.6)
        axes.margins(x=0.02)
        if course is not None:
            beside = 0.02 * max(1, course.last - course.first)
            axes.set_xlim(course.first - beside, course.last + beside)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("step")
        drawn = Drawing(axes)
        yield drawn
        _write_names(drawn, course.marks if course else ())
        drawn.svg = _svg(figure)


def stretch_size(count: int, num_bins: int = SMOOTH_POINTS) -> int:
    """Steps that one point of a curve is the mean of."""
    return max(1, -(-count // num_bins))


def binned(
    steps: Sequence[int], values: Sequence[float], num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of steps and values over at most `num_bins` equal stretches; gaps are left out.

    What is left over is a shorter stretch at the beginning, so that the last mean is a whole one's.
    """
    pairs = np.array([steps, values], dtype=np.float64)
    pairs = pairs[:, np.isfinite(pairs[1])]
    count = pairs.shape[1]
    size = stretch_size(count, num_bins)
    cuts = range(count % size or size, count, size)
    stretches = np.split(pairs, list(cuts), axis=1)
    means = np.array([stretch.mean(axis=1) for stretch in stretches if stretch.size])
    return means[:, 0], means[:, 1]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places from 0 to 1, each moved to where it lies a gap or more from every other.

    Where there is no room for all of them, they go on below 0.
    """
    order = sorted(range(len(places)), key=lambda number: places[number])
    placed = [0.0] * len(places)
    least = 0.0
    for number in order:
        placed[number] = max(places[number], least)
        least = placed[number] + gap
    most = 1.0
    for number in reversed(order):
        placed[number] = min(placed[number], most)
        most = placed[number] - gap
    return placed


def short(value: float) -> str:
    """A number in three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _write_names(drawn: Drawing, marks: Sequence[Mark]) -> None:
    """Lines for the marks, and all names where they do not lie over one another."""
    axes, transform = drawn.axes, drawn.axes.transAxes
    heights = [_on_axes(axes, axes.get_xlim()[0], end.value)[1] for end in drawn.ends]
    for end, height in zip(drawn.ends, spread(heights, _BETWEEN_ENDS), strict=True):
        text = axes.text(1.015, height, end.text, transform=transform, va="center")
        text.set(color=end.colour, weight=end.weight)
    for mark in marks:
        axes.axvline(mark.step, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    places = [_on_axes(axes, float(mark.step), axes.get_ylim()[0])[0] for mark in marks]
    for mark, place in zip(marks, spread(places, _BETWEEN_MARKS), strict=True):
        text = axes.text(place, 1.0, mark.name, transform=transform, ha="center", va="bottom")
        text.set(color=MUTED, weight="bold")


def _on_axes(axes: Axes, across: float, value: float) -> tuple[float, float]:
    """A point's place on the axes: 0 is their left or lower end, 1 the other."""
    x, y = (axes.transData + axes.transAxes.inverted()).transform((across, value))
    return float(x), float(y)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several drawings stand in one page
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg)
