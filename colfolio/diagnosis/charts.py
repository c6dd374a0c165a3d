"""The curves of a training run: loss, validation, margin, pace, and what each part did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

import numpy as np

from colfolio.diagnosis.drawing import (
    ACCENT,
    RAW_POINTS,
    SMOOTH_POINTS,
    Mark,
    Side,
    binned,
    draw_end,
    draw_level,
    drawing,
)
from colfolio.diagnosis.part_charts import part_charts
from colfolio.diagnosis.plateau import named_plateaus
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep, TrainingLog

# a loss falls from chance to its floor: at these ends they are farthest from it
_LEVELS: dict[str, Side] = {"chance": "right", "floor": "left"}
_FLOOR_SHOWN = 0.001
_TAKEN = 0.15  # of the height of the axes, that the last value stands above its curve


def training_charts(log: TrainingLog, chance_ndcg: float | None = None) -> list[tuple[str, str]]:
    """Title and SVG of each curve that the log holds numbers for.

    Args:
        log: a run's steps and evaluations.
        chance_ndcg: what a random order scores in nDCG@5, drawn beside the evaluations.
    """
    marks = run_marks(log)
    return [
        *_curve(log.steps, "loss", "Loss", marks, _LEVELS),
        *_validation_loss(log.evaluations, marks),
        *_points(log.evaluations, "ndcg@5", "nDCG@5 on validation", marks, chance_ndcg, most=1.0),
        *_points(
            log.evaluations, "token_accuracy", "Token accuracy on validation", marks, most=1.0
        ),
        *_curve(log.steps, "margin", "Margin", marks, is_from_zero=False),
        *_curve(log.steps, "accuracy", "Accuracy", marks),
        *part_charts(log.steps, marks),
        *_curve(log.steps, "rows_per_second", "Rows a second", marks),
    ]


def run_marks(log: TrainingLog) -> list[Mark]:
    """What is marked in every curve: openings by numbers, causes that the run named by letters."""
    opened = [row for row in log.steps if row.opened]
    openings = [
        Mark(
            row.step - 1, str(number), f"{', '.join(row.opened)} opened after step {row.step - 1:,}"
        )
        for number, row in enumerate(opened, start=1)
    ]
    plateaus = [
        Mark(each.step, letter, f"{each.title} (said after step {each.step:,})")
        for letter, each in zip(ascii_uppercase, named_plateaus(log), strict=False)
    ]
    return [*openings, *plateaus]


def _curve(
    rows: Sequence[LoggedStep],
    name: str,
    title: str,
    marks: Sequence[Mark],
    levels: Mapping[str, Side] | None = None,
    *,
    is_from_zero: bool = True,
) -> list[tuple[str, str]]:
    """Every step faintly, their mean over stretches of steps firmly, and dashed levels."""
    steps, values = [row.step for row in rows], _column(rows, name)
    if np.isfinite(values).sum() < 2:
        return []
    with drawing(marks) as drawn:
        axes = drawn.axes
        axes.plot(*binned(steps, values, RAW_POINTS), color=ACCENT, linewidth=0.7, alpha=0.45)
        smooth = binned(steps, values, SMOOTH_POINTS)
        axes.plot(*smooth, color=ACCENT, linewidth=1.8, solid_capstyle="round")
        draw_end(axes, *smooth, ACCENT)
        for level, side in (levels or {}).items():
            heights = _column(rows, level)
            if np.nanmax([*heights, 0.0]) >= _FLOOR_SHOWN:
                line = binned(steps, heights, SMOOTH_POINTS)
                draw_level(axes, *line, level, _free_side(side, smooth[1], line[1]))
        if is_from_zero:
            axes.set_ylim(bottom=0)
    return [(title, drawn.svg)]


def _free_side(side: Side, values: np.ndarray, heights: np.ndarray) -> Side:
    """The side for the name of a level; the other one where a curve ends on the level."""
    is_taken = abs(values[-1] - heights[-1]) < _TAKEN * max(values.max(), heights.max())
    return "left" if side == "right" and is_taken else side


def _validation_loss(
    rows: Sequence[LoggedEvaluation], marks: Sequence[Mark]
) -> list[tuple[str, str]]:
    measured = [row.values for row in rows if {"loss", "chance"} <= row.values.keys()]
    if not measured:
        return []
    negatives = measured[-1].get("negatives")
    among = f", {negatives:.0f} negatives" if negatives else ""
    chance = measured[-1]["chance"]
    return _points(rows, "loss", f"Validation loss{among}", marks, chance, 1.15 * chance)


def _points(
    rows: Sequence[LoggedEvaluation],
    name: str,
    title: str,
    marks: Sequence[Mark],
    chance: float | None = None,
    least: float = 0.1,
    most: float = float("inf"),
) -> list[tuple[str, str]]:
    """A point for each evaluation.

    Args:
        least, most: of the height of the axes.
    """
    points = [(row.step, row.values[name]) for row in rows if name in row.values]
    if not points:
        return []
    steps, values = np.array(points, dtype=np.float64).T
    with drawing(marks) as drawn:
        axes = drawn.axes
        axes.plot(steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3.5)
        draw_end(axes, steps, values, ACCENT)
        if chance is not None:
            draw_level(axes, steps[[0, -1]], np.array([chance, chance]), "chance")
        axes.set_ylim(0, min(most, max(least, 1.25 * values.max())))
    return [(title, drawn.svg)]


def _column(rows: Sequence[LoggedStep], name: str) -> list[float]:
    values = [getattr(row, name) for row in rows]
    return [float("nan") if value is None else value for value in values]
