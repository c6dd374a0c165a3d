"""What the rules of the diagnosis say of a run before its first step, a line for some of them."""

from __future__ import annotations

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.table import Rule
from colfolio.diagnosis.evidence import Evidence
from colfolio.diagnosis.preflight.check import Check


def ruled(name: str, evidence: Evidence, *rules: Rule, told: str = "") -> Check:
    """The first of some rules that finds something fails; else what they ruled out is told.

    Args:
        told: a number that is said before that.
    """
    reading, said = Reading(evidence), [told] if told else []
    for rule in rules:
        answer = rule(reading)
        if isinstance(answer, Finding):
            paragraph = f"{told}. {answer.paragraph()}" if told else answer.paragraph()
            return Check(name, False, paragraph.removesuffix("."), answer.cause)
        if isinstance(answer, RuledOut):
            said.append(answer.why)
    return Check(name, True, "; ".join(said) or "there is nothing to judge by")
