"""What a diagnosis says: a named cause with its evidence and its mend, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Sureness = Literal["certain", "likely", "possible"]
SURENESS: tuple[Sureness, ...] = ("certain", "likely", "possible")
HEALTHY, UNKNOWN = "healthy", "unknown"
_BESIDE = {
    "certain": "",
    "likely": " This is likely, not certain.",
    "possible": " This may have a part in it.",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause, and why it is thought to be one.

    Args:
        cause: its name, a word that stays the same.
        title: what is the matter, as a clause.
        evidence: sentences with numbers.
        sureness: `certain` was measured directly; `likely` is what the numbers mean nearly always.
        action: what to do next, as a sentence.
        change: the same as settings of a recipe, key -> value; empty where no setting mends it.
    """

    cause: str
    title: str
    evidence: tuple[str, ...]
    sureness: Sureness
    action: str
    change: Mapping[str, str] = field(default_factory=dict)

    def paragraph(self) -> str:
        """Cause, evidence and mend in one paragraph."""
        settings = ", ".join(f"{key}={value}" for key, value in self.change.items())
        beside = f" ({settings})" if settings else ""
        evidence = " ".join(self.evidence)
        doubt = "" if self.cause in (HEALTHY, UNKNOWN) else _BESIDE[self.sureness]
        told = f"{self.title}. {evidence}{doubt} {self.action}{beside}."
        return told[0].upper() + told[1:]


@dataclass(frozen=True, slots=True)
class RuledOut:
    """A cause that was looked for and is not there, with the number that says so."""

    cause: str
    why: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found, the likeliest cause first, and all that was looked for in vain.

    Args:
        findings: never empty: the only one may be that the run is healthy, or that nothing known
            explains it.
        unasked: causes that could not be looked for, because the numbers for them are not known.
    """

    findings: tuple[Finding, ...]
    ruled_out: tuple[RuledOut, ...] = ()
    unasked: tuple[str, ...] = ()

    @property
    def first(self) -> Finding:
        """The likeliest cause."""
        return self.findings[0]
