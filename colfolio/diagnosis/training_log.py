"""Reads the log of a training run: one JSON object a line, as written while it went on.

A run may have been killed in the middle of a line, and a resumed run repeats the steps since its
last checkpoint: a line that cannot be read is left out and counted, and of a step that occurs twice
the later line stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from colfolio.diagnosis.ledgers.ledger import Ledger
from colfolio.diagnosis.ledgers.text import TextLedger
from colfolio.errors import ColfolioError

_LEDGER, _TEXT_LEDGER = TypeAdapter(Ledger), TypeAdapter(TextLedger)
_NUMBERS = (
    "chance",
    "margin",
    "lr",
    "rows_per_second",
    "candidates",
    "masked",
    "floor",
    "accuracy",
)


@dataclass(frozen=True, slots=True)
class LoggedPart:
    """What one step did to a part of the model; NaN where that was no number.

    Args:
        lr, lr_least: the highest and the lowest learning rate of its parameters; the lowest is None
            in the log of an older version.
        dead: share of its gradient that is exactly 0; None in the log of an older version.
    """

    lr: float
    gradient_norm: float
    update_ratio: float
    lr_least: float | None = None
    dead: float | None = None


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One training step: its loss beside the loss of scores without information, and its pace.

    Args:
        candidates: mean documents that a query was compared with.
        masked: mean documents that were masked for a query.
        is_skipped: gradients overflowed, and the weights stayed as they were.
        floor: the least that the loss could be.
        accuracy: share of the queries, or of the tokens of answers, that were right.
        parts: of each part that trained; empty in the log of an older version.
        opened: what began to train with this step.
    """

    step: int
    loss: float
    chance: float | None
    margin: float | None
    lr: float | None
    rows_per_second: float | None
    candidates: float | None = None
    masked: float | None = None
    is_skipped: bool = False
    floor: float | None = None
    accuracy: float | None = None
    parts: Mapping[str, LoggedPart] = field(default_factory=dict)
    opened: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoggedEvaluation:
    """One evaluation during training: every number that the line holds, by name."""

    step: int
    split: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """What a run wrote, in the order of its steps.

    Args:
        steps: training steps, rising.
        evaluations: evaluations during training, rising.
        num_unreadable: lines left out, such as the last line of a run that was killed.
        ledger: what the run said of its batches when it last began; None if it said nothing.
        facts: what was asked for, what data and model were: as the run noted it when it began, and
            again where that changed. Like what follows, in the words of the log.
        probes: measurements of the run's probe, rising.
        diagnoses: what the run was told of itself while it went on, rising.
        fault: the numbers that ended it; None if it was not that.
        text_ledger: what a run of the objective `generation` has instead of a ledger.
        checks: each that was made before the first step; none in the log of an older version.
    """

    steps: tuple[LoggedStep, ...]
    evaluations: tuple[LoggedEvaluation, ...]
    num_unreadable: int = 0
    ledger: Ledger | None = None
    facts: tuple[Mapping[str, Any], ...] = ()
    probes: tuple[Mapping[str, Any], ...] = ()
    diagnoses: tuple[Mapping[str, Any], ...] = ()
    fault: Mapping[str, Any] | None = None
    text_ledger: TextLedger | None = None
    checks: tuple[Mapping[str, Any], ...] = ()


def read_log(path: Path) -> TrainingLog:
    """All that a `log.jsonl` says of a run; lines of unknown kinds are passed over.

    Raises:
        ColfolioError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ColfolioError(f"{path}: the training log cannot be read ({error.strerror})") from None
    steps: dict[int, LoggedStep] = {}
    evaluations: dict[tuple[int, str], LoggedEvaluation] = {}
    others: dict[str, dict[int, Mapping[str, Any]]] = {"probe": {}, "diagnosis": {}}
    facts: list[Mapping[str, Any]] = []
    checks: tuple[Mapping[str, Any], ...] = ()
    ledger, text_ledger, fault, num_unreadable = None, None, None, 0
    for line in filter(None, map(bytes.strip, lines)):
        try:
            row = json.loads(line)
            _take(row, steps, evaluations)
            kind = row["kind"]
            ledger = _LEDGER.validate_python(row) if kind == "ledger" else ledger
            if kind == "text_ledger":
                text_ledger = _TEXT_LEDGER.validate_python(row)
            if kind in ("fault", "step"):  # a run that goes on does the step again
                fault = row if kind == "fault" else None
            facts += [row] if kind == "facts" else []
            checks = tuple(row["checks"]) if kind == "checks" else checks
            if kind in others:
                others[kind][int(row["step"])] = row
        # no JSON, a key is missing, not a number, or one that nobody means
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            num_unreadable += 1
    return TrainingLog(
        tuple(steps[step] for step in sorted(steps)),
        tuple(evaluations[key] for key in sorted(evaluations)),
        num_unreadable,
        ledger,
        tuple(facts),
        _rising(others["probe"]),
        _rising(others["diagnosis"]),
        fault,
        text_ledger,
        checks,
    )


def _take(
    row: dict[str, Any],
    steps: dict[int, LoggedStep],
    evaluations: dict[tuple[int, str], LoggedEvaluation],
) -> None:
    kind = row["kind"]
    if kind == "step":
        step = int(row["step"])
        others = {name: _number(row.get(name)) for name in _NUMBERS}
        steps[step] = LoggedStep(
            step,
            math.nan if row["loss"] is None else float(row["loss"]),
            **others,
            is_skipped=bool(row.get("skipped")),
            parts={
                str(part): _part(values) for part, values in dict(row.get("parts") or {}).items()
            },
            opened=tuple(map(str, row.get("opened") or ())),
        )
    elif kind == "evaluation":
        values = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        found = LoggedEvaluation(int(row["step"]), str(row.get("split", "")), values)
        evaluations[found.step, found.split] = found


def _rising(rows: Mapping[int, Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(rows[step] for step in sorted(rows))


def _part(values: dict[str, Any]) -> LoggedPart:
    lr, gradient, update = (
        math.nan if values[name] is None else float(values[name])
        for name in ("lr", "gradient_norm", "update_ratio")
    )
    least, dead = (_number(values.get(name)) for name in ("lr_least", "dead"))
    return LoggedPart(lr, gradient, update, least, dead)


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
