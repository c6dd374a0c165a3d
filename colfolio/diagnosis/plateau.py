"""Names a plateau while a run goes on: once for each cause, and never what is only a slow start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colfolio.diagnosis.causes import HEALTHY, UNKNOWN, Finding, diagnose
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import SLOW_START
from colfolio.diagnosis.evidence import Evidence, Settled
from colfolio.diagnosis.training_log import TrainingLog

NOT_STARTED = "not_started"
_LOOKS = 25  # in a whole run
_LEAST_BETWEEN = 20  # steps
_AFTER_WARMUP = 50  # steps, before a loss that stands means anything


@dataclass(frozen=True, slots=True)
class NamedPlateau:
    """What a run said of itself while it went on.

    Args:
        step: after which.
        cause: its name; told: a paragraph that begins with its title.
    """

    step: int
    cause: str
    told: str

    @property
    def title(self) -> str:
        """The first clause of what was told."""
        return self.told.partition(". ")[0]


class PlateauWatch:
    """Sees the evidence so far again and again, and says what is new in it.

    What is certain before the first step is said at once. Later a cause is named when the loss no
    longer falls beyond its noise, warm-up is over, and the same cause stood first a look before.

    Args:
        named: what the run has said before, if it goes on.
    """

    def __init__(self, named: Sequence[NamedPlateau] = ()) -> None:
        self._named = {each.cause for each in named}
        self._from_the_start = {each.cause for each in named if each.step == 0}
        self._suspected = ""

    def see(self, evidence: Evidence) -> Finding | None:
        """A cause that has not been named yet; None if there is none, or it is too early."""
        if not evidence.steps:
            return self._see_start(evidence)
        finding = self._first(evidence) if _has_plateau(evidence) else None
        suspected, self._suspected = self._suspected, finding.cause if finding else ""
        if finding is None or finding.cause in self._named or finding.cause != suspected:
            return None
        self._named.add(finding.cause)
        return finding

    def _see_start(self, evidence: Evidence) -> Finding | None:
        certain = [each for each in diagnose(evidence).findings if each.sureness == "certain"]
        self._from_the_start |= {each.cause for each in certain}
        new = [each for each in certain if each.cause not in self._named]
        if not new:
            return None
        self._named.add(new[0].cause)
        return new[0]

    def _first(self, evidence: Evidence) -> Finding | None:
        """What stands first beside what was known from the start."""
        for finding in diagnose(evidence).findings:
            if finding.cause in (HEALTHY, UNKNOWN):
                return None
            if finding.cause not in self._from_the_start:
                is_early = _steps_after_warmup(evidence) < SLOW_START
                return None if finding.cause == NOT_STARTED and is_early else finding
        return None


def is_due(step: int, settled_steps: int) -> bool:
    """Whether a run of so many steps is looked at after a step."""
    return step % max(_LEAST_BETWEEN, settled_steps // _LOOKS) == 0


def named_plateaus(log: TrainingLog) -> tuple[NamedPlateau, ...]:
    """What the `diagnosis` lines of a log say, in their order."""
    return tuple(
        NamedPlateau(int(row["step"]), str(row["cause"]), str(row["told"]))
        for row in log.diagnoses
        if {"cause", "told"} <= row.keys()
    )


def _has_plateau(evidence: Evidence) -> bool:
    return _steps_after_warmup(evidence) >= _AFTER_WARMUP and not Reading(evidence).is_falling


def _steps_after_warmup(evidence: Evidence) -> int:
    return evidence.steps[-1].step - _warmup(evidence.settled)


def _warmup(settled: Settled) -> int:
    """Steps of warm-up; half of the run at most, for a longer one may be what is wrong."""
    warmup = settled.warmup_steps or 0
    return warmup if settled.steps is None else min(warmup, settled.steps // 2)
