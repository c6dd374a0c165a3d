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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colfolio.diagnosis.foreign.rows import ForeignRow, in_order, without_gaps
from colfolio.errors import ColfolioError

STATE_FILE = "trainer_state.json"
_DELIMITERS = ",;\t"
_STEP = ("step", "global_step", "_step", "iteration")
_LOSS = ("loss", "train_loss", "training_loss", "loss_step", "train_loss_step", "value")
_RATE = ("learning_rate", "lr")
_NORM = ("grad_norm", "gradient_norm")
_OTHER_SPLITS = frozenset({"eval", "val", "valid", "validation", "dev", "test"})
_EMPTY = frozenset({"", "none", "null", "n/a", "na", "-"})  # in the place of a loss
_ROUNDED = 1e-3  # that a loss may lie below 0
_MOST_QUOTED = 60  # characters


@dataclass(frozen=True, slots=True)
class ForeignRows:
    """What a log of another trainer holds.

    Args:
        rows: rising by step.
        evaluations: step, and loss on another split.
        steps: of the whole run, if the log says so.
        device_rows: rows of a batch on one device, if the log says so.
        notes: what was made of steps that occur more than once, in sentences.
    """

    rows: tuple[ForeignRow, ...]
    evaluations: tuple[tuple[int, float], ...] = ()
    steps: int | None = None
    device_rows: int | None = None
    notes: tuple[str, ...] = ()


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
    except (ValueError, RecursionError) as error:
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
    risen, notes = in_order(without_gaps(rows))
    return ForeignRows(
        risen,
        tuple(sorted(evaluations)),
        _count(state.get("max_steps")),
        _count(state.get("train_batch_size")),
        notes,
    )


def _table(path: Path, text: str) -> ForeignRows:
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = max(_DELIMITERS, key=header.count)
    (_, names), *cut = _cut(path, lines, delimiter) or [(1, [])]
    step = _column(path, names, _STEP)
    loss = _column(path, names, _LOSS)
    if step is None or loss is None:
        found = _short(", ".join(map(repr, names))) or "an empty file"
        raise ColfolioError(
            f"{path}, line 1: expected columns named step and loss (or train/loss), divided by "
            f"commas, semicolons or tabs; found {found}"
        )
    others = [_column(path, names, among) for among in (_RATE, _NORM)]
    rows = []
    for number, cells in cut:
        # exports leave a cell empty where a step has no such number
        if len(cells) > max(step, loss) and cells[step].strip() and cells[loss].strip():
            chosen = [
                None if place is None or place >= len(cells) else _plain(cells[place], delimiter)
                for place in (step, loss, *others)
            ]
            keys = ("step", "loss", "lr", "norm")
            place = f"{path}, line {number}"
            rows.append(_row(place, dict(zip(keys, chosen, strict=True)), keys))
    risen, notes = in_order(without_gaps(rows))
    return ForeignRows(risen, notes=notes)


def _cut(path: Path, lines: Sequence[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """The cells of each row, behind the number of its first line."""
    reader, rows, begin = csv.reader(lines, delimiter=delimiter), [], 1
    try:
        for cells in reader:
            rows.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ColfolioError(
            f"{path}, line {begin}: expected a table of step and loss; {error}"
        ) from None
    return rows


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
    step_key, loss_key, *others = keys
    step = _number(entry.get(step_key))
    if step is None or not step.is_integer() or step < 0:
        raise ColfolioError(
            f"{place}: expected a whole number as {step_key}, found {_quoted(entry, step_key)}"
        )
    lr, norm = (_number(entry.get(key)) for key in others)  # what is no number says nothing
    if _is_empty(entry.get(loss_key)):
        return ForeignRow(int(step), math.nan, lr, norm, is_empty=True)
    loss = _number(entry.get(loss_key))
    if loss is None:
        raise ColfolioError(
            f"{place}: expected a number as {loss_key}, found {_quoted(entry, loss_key)}"
        )
    if loss < -_ROUNDED:
        raise ColfolioError(
            f"{place}: {loss_key} is {loss:g}, and neither pairwise nor infonce nor sigmoid can be "
            "below 0: it is another loss, or has a part that is none of these"
        )
    return ForeignRow(int(step), loss, lr, norm)


def _number(value: Any) -> float | None:
    """A number, or None where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY)


def _quoted(entry: dict[str, Any], key: str) -> str:
    return _short(repr(entry.get(key)))


def _short(text: str) -> str:
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}…"


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int | float) and math.isfinite(value) and value >= 1
    return int(value) if is_count else None
