"""Training curves as inline SVG: without ids or fonts, coloured by the page's CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from colfolio.diagnosis.training_log import LoggedStep, TrainingLog

# colours that stand for CSS variables, so that one drawing serves light and dark pages
_COLOURS = {"#000001": "var(--accent)", "#000002": "var(--faint)", "#000003": "var(--muted)"}
_ACCENT, _FAINT, _MUTED = _COLOURS
_CURVES = {"loss": "Loss", "margin": "Margin", "rows_per_second": "Rows a second"}
_RAW_POINTS, _SMOOTH_POINTS = 500, 60
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "colfolio",
    "font.size": 8,
    "text.color": _MUTED,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _MUTED,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


def training_charts(log: TrainingLog, chance_ndcg: float | None = None) -> list[tuple[str, str]]:
    """Title and SVG of each curve that the log holds numbers for.

    Args:
        log: a run's steps and evaluations.
        chance_ndcg: what a random order scores in nDCG@5, drawn beside the evaluations.
    """
    charts = []
    steps = [row.step for row in log.steps]
    for name, title in _CURVES.items():
        values = _column(log.steps, name)
        if np.isfinite(values).sum() > 1:
            level = _column(log.steps, "chance") if name == "loss" else []
            charts.append((title, _curve(steps, values, level, from_zero=name != "margin")))
    measured = [row for row in log.evaluations if "ndcg@5" in row.values]
    if measured:
        svg = _points(
            [row.step for row in measured], [row.values["ndcg@5"] for row in measured], chance_ndcg
        )
        charts.insert(min(2, len(charts)), ("nDCG@5 on validation", svg))
    return charts


def _column(steps: Sequence[LoggedStep], name: str) -> list[float]:
    values = [getattr(row, name) for row in steps]
    return [float("nan") if value is None else value for value in values]


def _curve(
    steps: Sequence[int],
    values: Sequence[float],
    level: Sequence[float] = (),
    from_zero: bool = True,
) -> str:
    """Every step faintly, their mean over stretches of steps firmly, and a dashed level."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        axes.plot(*_binned(steps, values, _RAW_POINTS), color=_ACCENT, linewidth=0.7, alpha=0.45)
        smooth = _binned(steps, values, _SMOOTH_POINTS)
        axes.plot(*smooth, color=_ACCENT, linewidth=1.8, solid_capstyle="round")
        _end_label(axes, smooth, _ACCENT)
        if np.isfinite(level).any():
            _dashed(axes, *_binned(steps, level, _SMOOTH_POINTS))
        if from_zero:
            axes.set_ylim(bottom=0)
        return _svg(figure)


def _points(steps: Sequence[int], values: Sequence[float], level: float | None) -> str:
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        axes.plot(steps, values, color=_ACCENT, linewidth=1.8, marker="o", markersize=3.5)
        _end_label(axes, (np.array(steps), np.array(values)), _ACCENT)
        if level is not None:
            _dashed(axes, np.array([steps[0], steps[-1]]), np.array([level, level]))
        axes.set_ylim(0, min(1.0, max(0.1, 1.25 * max(values))))
        return _svg(figure)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.3), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.grid(axis="y", color=_FAINT, linewidth=0.5, alpha=0.6)
    axes.margins(x=0.02)
    axes.set_xlabel("step")
    return figure, axes


def _binned(
    steps: Sequence[int], values: Sequence[float], num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of steps and values over at most `num_bins` equal stretches; gaps are left out."""
    pairs = np.array([steps, values], dtype=np.float64)
    pairs = pairs[:, np.isfinite(pairs[1])]
    stretches = np.array_split(pairs, min(num_bins, max(1, pairs.shape[1])), axis=1)
    means = np.array([stretch.mean(axis=1) for stretch in stretches if stretch.size])
    return means[:, 0], means[:, 1]


def _dashed(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    axes.plot(steps, values, color=_MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        f"chance {_short(values[-1])}",
        (steps[-1], values[-1]),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
    )


def _end_label(axes: Axes, line: tuple[np.ndarray, np.ndarray], colour: str) -> None:
    steps, values = line
    axes.annotate(
        _short(values[-1]),
        (steps[-1], values[-1]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=colour,
        weight="bold",
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several drawings stand in one page
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg)
