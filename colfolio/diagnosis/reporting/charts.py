"""The curves of a training run: loss, validation, margin and pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase

import numpy as np

from colfolio.diagnosis.plateau import named_plateaus
from colfolio.diagnosis.reporting.drawing import (
    ACCENT,
    RAW_POINTS,
    SMOOTH_POINTS,
    Chart,
    Course,
    Mark,
    binned,
    drawing,
)
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep, TrainingLog

_LEVELS = ("chance", "floor")
_FLOOR_SHOWN = 0.001


def training_charts(
    log: TrainingLog, chance_ndcg: float | None = None, doubt: str = ""
) -> list[Chart]:
    """Each curve of the whole model that the log holds numbers for.

    Args:
        log: a run's steps and evaluations.
        chance_ndcg: what a random order scores in nDCG@5, drawn beside the evaluations.
        doubt: why numbers of the validation split mean little; said below each of their curves.
    """
    course, evaluations = run_course(log), log.evaluations
    validations = [
        *_validation_loss(evaluations, course),
        *_points(evaluations, "ndcg@5", "nDCG@5 on validation", course, chance_ndcg, most=1.0),
        *_points(evaluations, "token_accuracy", "Token accuracy on validation", course, most=1.0),
    ]
    return [
        *_curve(log.steps, "loss", "Loss", course, _LEVELS),
        *(replace(chart, note=doubt) for chart in validations),
        *_curve(log.steps, "margin", "Margin", course, is_from_zero=False),
        *_curve(log.steps, "accuracy", "Accuracy", course),
        *_curve(log.steps, "rows_per_second", "Rows a second", course),
    ]


def run_course(log: TrainingLog) -> Course:
    """The steps of a run; openings are marked by numbers, causes that it named by letters."""
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
    seen = [row.step for row in (*log.steps, *log.evaluations)] or [1]
    return Course(max(0, min(seen) - 1), max(seen), (*openings, *plateaus))


def _curve(
    rows: Sequence[LoggedStep],
    name: str,
    title: str,
    course: Course,
    levels: Sequence[str] = (),
    *,
    is_from_zero: bool = True,
) -> list[Chart]:
    """Every step faintly, their mean over stretches of steps firmly, and dashed levels."""
    steps, values = [row.step for row in rows], _column(rows, name)
    if np.isfinite(values).sum() < 2:
        return []
    with drawing(course) as drawn:
        axes = drawn.axes
        axes.plot(*binned(steps, values, RAW_POINTS), color=ACCENT, linewidth=0.7, alpha=0.45)
        drawn.draw_curve(*binned(steps, values, SMOOTH_POINTS), solid_capstyle="round")
        for level in levels:
            heights = _column(rows, level)
            if np.nanmax([*heights, 0.0]) >= _FLOOR_SHOWN:
                drawn.draw_level(level, *binned(steps, heights, SMOOTH_POINTS))
        if is_from_zero:
            axes.set_ylim(bottom=0)
    return [Chart(title, drawn.svg)]


def _validation_loss(rows: Sequence[LoggedEvaluation], course: Course) -> list[Chart]:
    measured = [row.values for row in rows if {"loss", "chance"} <= row.values.keys()]
    if not measured:
        return []
    negatives = measured[-1].get("negatives")
    among = f", {negatives:.0f} negatives" if negatives else ""
    chance = measured[-1]["chance"]
    return _points(rows, "loss", f"Validation loss{among}", course, chance, 1.15 * chance)


def _points(
    rows: Sequence[LoggedEvaluation],
    name: str,
    title: str,
    course: Course,
    chance: float | None = None,
    least: float = 0.1,
    most: float = float("inf"),
) -> list[Chart]:
    """A point for each evaluation.

    Args:
        least, most: of the height of the axes.
    """
    points = [(row.step, row.values[name]) for row in rows if name in row.values]
    if not points:
        return []
    steps, values = np.array(points, dtype=np.float64).T
    with drawing(course) as drawn:
        drawn.draw_curve(steps, values, marker="o", markersize=3.5, clip_on=False)
        if chance is not None:
            drawn.draw_constant("chance", course, chance)
        drawn.axes.set_ylim(0, min(most, max(least, 1.25 * values.max())))
    return [Chart(title, drawn.svg)]


def _column(rows: Sequence[LoggedStep], name: str) -> list[float]:
    values = [getattr(row, name) for row in rows]
    return [float("nan") if value is None else value for value in values]
