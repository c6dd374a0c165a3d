"""Reads the losses that another trainer wrote: a `trainer_state.json`, or a CSV of step and loss.

`trainer_state.json` is what the Trainer of `transformers` leaves in its checkpoints: an entry of
`log_history` holds the mean loss of the steps since the entry before, and NaN is written as NaN.
CSVs are those that people make, and those that Weights & Biases and TensorBoard export.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colfolio.errors import ColfolioError

STATE_FILE = "trainer_state.json"
_DELIMITERS = ",;\t"
_STEP = ("step", "global_step", "_step", "iteration")
_LOSS = ("loss", "train_loss", "training_loss", "value")
_RATE = ("learning_rate", "lr")
_NORM = ("grad_norm", "gradient_norm")
_OTHER_SPLITS = frozenset({"eval", "val", "valid", "validation", "dev", "test"})


@dataclass(frozen=True, slots=True)
class ForeignRow:
    """What a log says of a step, or of the steps since the row before; NaN where it says NaN."""

    step: int
    loss: float
    lr: float | None = None
    gradient_norm: float | None = None


@dataclass(frozen=True, slots=True)
class ForeignRows:
    """What a log of another trainer holds.

    Args:
        rows: rising by step; of a step that occurs twice the later row stands.
        evaluations: step, and loss on another split.
        steps: of the whole run, if the log says so.
        device_rows: rows of a batch on one device, if the log says so.
    """

    rows: tuple[ForeignRow, ...]
    evaluations: tuple[tuple[int, float], ...] = ()
    steps: int | None = None
    device_rows: int | None = None


def read_foreign_rows(path: Path) -> ForeignRows:
    """What a `trainer_state.json` or a CSV says of each step.

    Raises:
        ColfolioError: names file and line, and what was expected there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ColfolioError(f"{path}: the log cannot be read ({reason})") from None
    found = _state(path, text) if text.lstrip().startswith("{") else _table(path, text)
    if not found.rows:
        raise ColfolioError(f"{path}: holds no loss of any step; expected at least one")
    return found


def _state(path: Path, text: str) -> ForeignRows:
    try:
        state = json.loads(text)
    except ValueError as error:
        raise ColfolioError(
            f"{path}: expected the JSON of a {STATE_FILE}, which this is not: {error}"
        ) from None
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ColfolioError(
            f"{path}: expected a {STATE_FILE} with a list log_history of objects; found the keys "
            f"{', '.join(state) or 'none'}"
        )
    rows, evaluations = [], []
    for number, entry in enumerate(history, start=1):
        place = f"{path}: entry {number} of log_history"
        if "loss" in entry:
            rows.append(_row(place, entry, ("step", "loss", "learning_rate", "grad_norm")))
        elif "eval_loss" in entry:
            evaluated = _row(place, entry, ("step", "eval_loss", "", ""))
            evaluations.append((evaluated.step, evaluated.loss))
    return ForeignRows(
        _rising(rows),
        tuple(sorted(evaluations)),
        _count(state.get("max_steps")),
        _count(state.get("train_batch_size")),
    )


def _table(path: Path, text: str) -> ForeignRows:
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(lines, delimiter=delimiter)
    names = next(reader, [])
    step = _column(path, names, _STEP)
    loss = _column(path, names, _LOSS)
    if step is None or loss is None:
        raise ColfolioError(
            f"{path}, line 1: expected columns named step and loss (or train/loss), divided by "
            f"commas, semicolons or tabs; found {', '.join(map(repr, names)) or 'an empty file'}"
        )
    others = [_column(path, names, among) for among in (_RATE, _NORM)]
    rows = []
    for cells in reader:
        # exports leave a cell empty where a step has no such number
        if len(cells) > max(step, loss) and cells[step].strip() and cells[loss].strip():
            chosen = [
                None if place is None or place >= len(cells) else _plain(cells[place], delimiter)
                for place in (step, loss, *others)
            ]
            keys = ("step", "loss", "lr", "norm")
            place = f"{path}, line {reader.line_num}"
            rows.append(_row(place, dict(zip(keys, chosen, strict=True)), keys))
    return ForeignRows(_rising(rows))


def _column(path: Path, names: Sequence[str], among: Sequence[str]) -> int | None:
    """The place of the first name of `among` that a column has, or None.

    A column may be named `train/loss`, or `name of the run - train/loss`.
    """
    for wanted in among:
        places = [place for place, name in enumerate(names) if _of_training(name) == wanted]
        if len(places) > 1:
            named = ", ".join(repr(names[place]) for place in places)
            raise ColfolioError(
                f"{path}, line 1: {named} may all be the {wanted}; leave one of them"
            )
        if places:
            return places[0]
    return None


def _of_training(name: str) -> str:
    """A column's name without run and group, empty if it is of another split."""
    end = name.strip().lower().rpartition(" - ")[2].replace(" ", "_")
    is_other = _OTHER_SPLITS & set(re.split(r"[/_.-]", end))
    return "" if is_other else end.rpartition("/")[2]


def _plain(cell: str, delimiter: str) -> str:
    """A number as Python reads it: where semicolons divide, a comma may be the decimal point."""
    text = cell.strip()
    return text.replace(",", ".") if delimiter == ";" else text


def _row(place: str, entry: dict[str, Any], keys: Sequence[str]) -> ForeignRow:
    step, loss, lr, norm = (_number(place, key, entry.get(key)) for key in keys)
    if step is None or not step.is_integer() or step < 0:
        raise ColfolioError(f"{place}: expected a whole number as step, found {entry.get(keys[0])}")
    if loss is None:
        raise ColfolioError(f"{place}: expected a number as {keys[1]}, found {entry.get(keys[1])}")
    return ForeignRow(int(step), loss, lr, norm)


def _number(place: str, name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ColfolioError(f"{place}: expected a number as {name}, found {value!r}") from None


def _rising(rows: Iterable[ForeignRow]) -> tuple[ForeignRow, ...]:
    found = {row.step: row for row in rows}
    return tuple(found[step] for step in sorted(found))


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int | float) and math.isfinite(value) and value >= 1
    return int(value) if is_count else None
