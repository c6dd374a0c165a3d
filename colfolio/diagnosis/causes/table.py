"""The table from evidence to causes, and what is said where none applies."""

from __future__ import annotations

from collections.abc import Callable

from colfolio.diagnosis.causes import (
    data_causes,
    learning_causes,
    model_causes,
    score_causes,
)
from colfolio.diagnosis.causes.finding import (
    HEALTHY,
    SURENESS,
    UNKNOWN,
    Diagnosis,
    Finding,
    RuledOut,
)
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.evidence import Evidence

Rule = Callable[[Reading], Finding | RuledOut | None]

# Of findings that are equally sure, the one whose rule stands higher comes first: what lies nearer
# to the root, in the order in which a row goes through the model.
RULES: tuple[Rule, ...] = (
    learning_causes.not_finite,
    model_causes.fresh_tensors,
    model_causes.adapter,
    data_causes.truncated,  # what is cut off fits no positions either
    model_causes.positions,
    model_causes.template,
    model_causes.padding,
    data_causes.blank,
    score_causes.images_unseen,
    score_causes.queries_alike,
    data_causes.fixed_order,
    data_causes.shifted_labels,
    model_causes.dead_part,
    score_causes.rounded_scores,
    learning_causes.overflow,
    learning_causes.rate_too_high,
    data_causes.wrong_labels,
    score_causes.steep_start,
    score_causes.flat_start,
    learning_causes.rate_too_low,
    model_causes.frozen_parts,
    score_causes.collapsed,
    data_causes.leaked,
    score_causes.high_floor,
    data_causes.false_negatives,
    learning_causes.few_candidates,
    data_causes.over_fitting,
    learning_causes.not_started,
)

# Measured directly, but what comes of something else where that is likely; or, the last, no reason
# for a loss that stands still.
_NO_ROOTS = frozenset({"collapsed", "leaked_split"})


def diagnose(evidence: Evidence) -> Diagnosis:
    """Name what keeps a run from learning, the likeliest cause first.

    Args:
        evidence: of a run that has ended, that goes on, or that has not begun.
    """
    reading = Reading(evidence)
    findings, ruled_out, unasked = [], [], []
    for rule in RULES:
        said = rule(reading)
        if isinstance(said, Finding):
            findings.append(said)
        elif isinstance(said, RuledOut):
            ruled_out.append(said)
        else:
            unasked.append(rule.__name__)
    findings.sort(key=_place)
    if not findings:
        findings.append(_without_findings(reading, len(ruled_out)))
    return Diagnosis(tuple(findings), tuple(ruled_out), tuple(unasked))


def _place(finding: Finding) -> int:
    return SURENESS.index("likely" if finding.cause in _NO_ROOTS else finding.sureness)


def _without_findings(reading: Reading, num_ruled_out: int) -> Finding:
    level = reading.recent
    if level is None:
        return Finding(
            UNKNOWN,
            "there are no steps to judge by",
            (f"{num_ruled_out} causes were ruled out before the first step.",),
            "possible",
            "Train for some steps, or run colfolio check",
        )
    way = f"The loss is {level.loss:.3f}: {level.way:.0%} of the way from chance {level.chance:.3f}"
    way += f" to its floor {level.floor:.3f}." if level.floor else " to 0."
    if not reading.is_poor or reading.is_falling:
        going = "and still falls" if reading.is_falling else "and stands"
        return Finding(
            HEALTHY,
            f"the run learns {going}",
            (way,),
            "likely",
            "Nothing is to be mended",
        )
    return Finding(
        UNKNOWN,
        "nothing that is known explains this loss",
        (way, f"{num_ruled_out} causes were ruled out."),
        "possible",
        "colfolio check measures more than a log holds",
    )
