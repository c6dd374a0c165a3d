"""A run folder to the evidence that a diagnosis goes by, wherever the run stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter

from colfolio.config import validated
from colfolio.diagnosis.evidence import (
    Checked,
    DataFacts,
    Evidence,
    Fault,
    ModelFacts,
    ProbeSignals,
    Settled,
)
from colfolio.diagnosis.training_log import LoggedStep, TrainingLog, read_log
from colfolio.errors import ColfolioError, RecipeError
from colfolio.training import TrainSettings
from colfolio.training.losses import LossSettings

LOG_FILE, RECIPE_FILE = "log.jsonl", "recipe.yaml"
_KINDS: dict[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind)
    for kind in (Settled, DataFacts, ModelFacts, ProbeSignals, Fault, Checked)
}
_ALWAYS_MEASURED = {each.name for each in fields(ProbeSignals) if each.default is MISSING}
_Kind = TypeVar("_Kind")


def read_evidence(run_folder: Path) -> Evidence:
    """All that a run folder says, of a run that ended, goes on, or died at any point.

    Raises:
        ColfolioError: the folder holds neither a log nor a recipe.
    """
    return read_run(run_folder)[0]


def read_run(run_folder: Path) -> tuple[Evidence, tuple[str, ...]]:
    """What `read_evidence` returns, and what of the folder could not be read, in sentences."""
    log, recipe = run_folder / LOG_FILE, run_folder / RECIPE_FILE
    if not log.exists() and not recipe.exists():
        raise ColfolioError(
            f"{run_folder}: holds no training run: there is neither {LOG_FILE} nor {RECIPE_FILE}; "
            "give the folder that a recipe names as `out`"
        )
    found, notes = TrainingLog((), ()), []
    try:
        found = read_log(log) if log.exists() else found
    except ColfolioError as error:
        notes.append(f"{error}.")
    if found.num_unreadable:
        lines = "line" if found.num_unreadable == 1 else "lines"
        told = f"{found.num_unreadable} {lines} could not be read and said nothing"
        notes.append(f"{log}: {told}; a run that was killed leaves one.")
    evidence = evidence_of_log(found)
    asked = _settled_of_recipe(recipe, notes)
    if asked is not None and _newest(found.facts, "settled", Settled) is None:
        ranks = found.ledger.ranks if found.ledger else 1
        evidence = replace(evidence, settled=replace(asked, ranks=ranks))
    return evidence, tuple(notes)


def evidence_of_log(log: TrainingLog) -> Evidence:
    """The evidence in a log; what it does not say is None, and a line that is damaged is left out.

    Of facts that were noted several times the newest hold. But where the weights come from is of
    the beginning: a run that goes on has trained them itself, and reads a checkpoint of its own.
    """
    probes = [_read(_with_nan(row), ProbeSignals) for row in log.probes]
    checks = [_read(row, Checked) for row in log.checks]
    model = _newest(log.facts, "model", ModelFacts)
    first = _newest(log.facts[:1], "model", ModelFacts)
    if model is not None and first is not None:
        fresh = first.fresh if first.fresh or model.fresh is None else model.fresh
        model = replace(model, is_trained=first.is_trained, drawn=first.drawn, fresh=fresh)
    return Evidence(
        settled=_newest(log.facts, "settled", Settled) or _settled_of_ledger(log),
        steps=log.steps,
        evaluations=log.evaluations,
        probes=tuple(probe for probe in probes if probe is not None),
        data=_newest(log.facts, "data", DataFacts),
        model=model,
        fault=None if log.fault is None else _read(log.fault, Fault),
        skipped=fmean([step.is_skipped for step in log.steps]) if log.steps else 0.0,
        candidates=_mean(log.steps, lambda step: step.candidates),
        masked=_mean(log.steps, lambda step: step.masked),
        checks=tuple(check for check in checks if check is not None),
    )


def settled_of(settings: TrainSettings, ranks: int = 1) -> Settled:
    """What settings ask for, as far as it bears on whether a model learns."""
    is_text = settings.objective == "generation"
    return Settled(
        loss="generation" if is_text else settings.loss.kind,
        temperature=settings.loss.temperature,
        lr=settings.optimiser.lr,
        steps=settings.steps,
        warmup_steps=settings.optimiser.warmup_steps,
        rows=settings.batch.rows,
        accumulation=settings.accumulation,
        ranks=ranks,
        precision=None if settings.precision == "auto" else settings.precision,
        ignored=None if is_text else settings.batch.ignore,
    )


def _settled_of_recipe(path: Path, notes: list[str]) -> Settled | None:
    """What the recipe of a run folder asks for; None if it cannot be read, and a note why."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = validated(values["train"], TrainSettings, str(path))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecipeError) as error:
        # it is missing, or another version wrote it: the log then says what it can
        notes.append(f"{path}: the recipe cannot be read ({_reason(path, error)}).")
        return None
    return settled_of(settings)


def _reason(path: Path, error: Exception) -> str:
    """Why a recipe could not be read."""
    if isinstance(error, RecipeError):
        return str(error).removeprefix(f"{path}: ")
    if isinstance(error, OSError):
        return str(error.strerror)
    is_text = isinstance(error, KeyError | TypeError)
    return "it has no settings under train" if is_text else "it is no YAML"


def _settled_of_ledger(log: TrainingLog) -> Settled:
    """What a log without facts lets be known: its ledger names the loss and counts rows."""
    steps = log.steps[-1].step if log.steps else None
    rates = [step.lr for step in log.steps if step.lr is not None]
    known: dict[str, Any] = {"steps": steps, "lr": max(rates, default=None)}
    ledger = log.ledger
    if ledger is None:
        is_text = bool(log.steps) and all(step.margin is None for step in log.steps)
        return Settled("generation" if is_text else LossSettings().kind, **known)
    kind, *said = ledger.loss.split(", ")
    temperature = next((word.split()[-1] for word in said if word.startswith("temperature")), "1")
    told = {
        "loss": kind,
        "temperature": temperature,
        "rows": ledger.rows,
        "accumulation": ledger.accumulation,
        "ranks": ledger.ranks,
        "precision": ledger.computed_with.get("precision"),
    }
    return _read(known | told, Settled) or Settled(LossSettings().kind, **known)


def _newest(facts: Sequence[Mapping[str, Any]], name: str, kind: type[_Kind]) -> _Kind | None:
    """What the newest of some lines says under a name."""
    for row in reversed(facts):
        found = _read(row.get(name), kind)
        if found is not None:
            return found
    return None


def _read(values: Any, kind: type[_Kind]) -> _Kind | None:
    """Values as one of the evidence's classes; None if they are none."""
    try:
        return _KINDS[kind].validate_python(values)
    except ValueError:
        return None


def _with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the probe; where a number was not finite, JSON has null."""
    return {
        name: math.nan if value is None and name in _ALWAYS_MEASURED else value
        for name, value in row.items()
    }


def _mean(
    steps: Sequence[LoggedStep], number: Callable[[LoggedStep], float | None]
) -> float | None:
    found = [value for step in steps if (value := number(step)) is not None]
    return fmean(found) if found else None
