"""Axes, lines and marks of a report's drawings: inline SVG without ids or fonts.

Colours stand for variables of the page's style, so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ACCENT, FAINT, MUTED = "#000001", "#000002", "#000003"
PART_COLOURS = tuple(f"#0000{number:02}" for number in range(10, 17))
Side = Literal["left", "right"]
RAW_POINTS, SMOOTH_POINTS = 500, 60
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


@dataclass(slots=True)
class Drawing:
    """Axes to draw on, and the SVG once they are left."""

    axes: Axes
    svg: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A step that gets a line in every curve: its short name, and what happened there."""

    step: int
    name: str
    told: str = ""


@contextmanager
def drawing(marks: Sequence[Mark] = (), across: str = "step") -> Iterator[Drawing]:
    """Empty axes.

    Args:
        marks: steps that get a line with a name.
        across: what the horizontal axis is.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.6)
        axes.margins(x=0.02)
        axes.set_xlabel(across)
        drawn = Drawing(axes)
        yield drawn
        for mark in marks:
            _mark(axes, mark.step, mark.name)
        drawn.svg = _svg(figure)


def binned(
    steps: Sequence[int], values: Sequence[float], num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of steps and values over at most `num_bins` equal stretches; gaps are left out.

    What is left over is a shorter stretch at the beginning, so that the last mean is a whole one's.
    """
    pairs = np.array([steps, values], dtype=np.float64)
    pairs = pairs[:, np.isfinite(pairs[1])]
    count = pairs.shape[1]
    size = max(1, -(-count // num_bins))
    cuts = range(count % size or size, count, size)
    stretches = np.split(pairs, list(cuts), axis=1)
    means = np.array([stretch.mean(axis=1) for stretch in stretches if stretch.size])
    return means[:, 0], means[:, 1]


def draw_level(
    axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, side: Side = "right"
) -> None:
    """A dashed line with its name and its last value at one of its ends."""
    axes.plot(steps, values, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    end = -1 if side == "right" else 0
    _note(axes, f"{name} {short(values[-1])}", steps[end], values[end], 3, MUTED, side=side)


def draw_end(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The last value of a line, above its end."""
    _note(axes, short(values[-1]), steps[-1], values[-1], 6, colour, "bold")


def short(value: float) -> str:
    """A number in three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _note(
    axes: Axes,
    text: str,
    step: float,
    value: float,
    above: int,
    colour: str,
    weight: str = "normal",
    side: Side = "right",
) -> None:
    axes.annotate(
        text,
        (step, value),
        xytext=(0, above),
        textcoords="offset points",
        ha=side,
        va="bottom",
        color=colour,
        weight=weight,
    )


def _mark(axes: Axes, step: int, name: str) -> None:
    axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.text(
        step,
        1.0,
        name,
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        color=MUTED,
        weight="bold",
    )


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
