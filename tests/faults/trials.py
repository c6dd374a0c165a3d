"""A run that is diagnosed: what is asked of it, what is broken in it, and what came of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.ground import Ground

from colfolio.diagnosis.causes import Diagnosis, diagnose
from colfolio.diagnosis.evidence import Evidence
from colfolio.diagnosis.run_evidence import read_evidence

HEALTHY = "healthy"
_ENDED = "ended.json"


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind of run.

    Args:
        name: of its own.
        cause: that a diagnosis should name first.
        told: what a user has done.
        train: settings that are not those that learn.
        data, base: as `Ground` knows them.
        broken: a context in which the run is broken from inside.
        every: steps between two evaluations.
        ranks: that share the run.
        is_early: shows before the first step, so that a few steps say as much as many.
        is_slow: takes more than some seconds.
    """

    name: str
    cause: str
    told: str
    train: Mapping[str, Any] = field(default_factory=dict)
    data: str = "plain"
    base: str = "drawn"
    broken: Callable[[], AbstractContextManager[Any]] = nullcontext
    every: int = 50
    ranks: int = 1
    is_early: bool = False
    is_slow: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run with a seed, what it was read as, and what that rests on.

    Args:
        error: what ended the run, if it did not come to its end.
        seconds: of the run alone.
    """

    trial: Trial
    seed: int
    evidence: Evidence
    diagnosis: Diagnosis
    error: str
    seconds: float


def run_trial(trial: Trial, ground: Ground, seed: int, folder: Path) -> Outcome:
    """Train as a trial says, unless its folder is whole, and diagnose what is there."""
    data, base = ground.data(trial.data, seed), ground.base(trial.base, seed)
    recipe = ground.recipe(data, base, seed, trial.train, trial.every)

    def train(out: Path) -> None:
        with trial.broken():
            ground.train(out, recipe, trial.ranks)

    return outcome_of(trial, seed, folder / f"{ground.size.name}-{trial.name}-{seed}", train)


def outcome_of(trial: Trial, seed: int, out: Path, train: Callable[[Path], None]) -> Outcome:
    """Train into a folder, or take what an earlier call left there; and diagnose it."""
    ended = out / _ENDED
    if not ended.is_file():
        shutil.rmtree(out, ignore_errors=True)
        begin, error = time.perf_counter(), ""
        try:
            train(out)
        except FloatingPointError as caught:
            error = str(caught)
        for name in ("checkpoints", "model"):  # of many runs they fill a disk
            shutil.rmtree(out / name, ignore_errors=True)
        ended.write_text(json.dumps({"error": error, "seconds": time.perf_counter() - begin}))
    evidence = read_evidence(out)
    told = json.loads(ended.read_text())
    return Outcome(trial, seed, evidence, diagnose(evidence), told["error"], told["seconds"])
