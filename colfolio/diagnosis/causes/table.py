"""The table from evidence to causes, and what is said where none applies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from colfolio.diagnosis.causes import (
    data_causes,
    learning_causes,
    model_causes,
    rate_causes,
    score_causes,
)
from colfolio.diagnosis.causes.failed_checks import failed_checks
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

# Each rule under the cause that it is listed as where it could not be asked. Of findings that are
# equally sure, the one whose rule stands higher comes first: what lies nearer to the root, in the
# order in which a row goes through the model.
RULES: Mapping[str, Rule] = {
    "not_finite": learning_causes.not_finite,
    "fresh_tensors": model_causes.fresh_tensors,
    "adapter_not_loaded": model_causes.adapter,
    "truncated_images": data_causes.truncated,  # what is cut off fits no positions either
    "positions": model_causes.positions,
    "wrong_template": model_causes.template,
    "padding_side": model_causes.padding,
    "blank_documents": data_causes.blank,
    "images_unseen": score_causes.images_unseen,
    "queries_alike": score_causes.queries_alike,
    "fixed_order": data_causes.fixed_order,
    "shifted_labels": data_causes.shifted_labels,
    "dead_part": model_causes.dead_part,
    "rounded_scores": score_causes.rounded_scores,
    "overflow": learning_causes.overflow,
    "rate_too_high": rate_causes.rate_too_high,
    "wrong_labels": data_causes.wrong_labels,
    "temperature_too_low": score_causes.steep_start,
    "flat_start": score_causes.flat_start,
    "rate_too_low": rate_causes.rate_too_low,
    "frozen_parts": model_causes.frozen_parts,
    "few_candidates": learning_causes.few_candidates,
    "collapsed": score_causes.collapsed,
    "pairwise_loss": score_causes.pairwise_loss,
    "leaked_split": data_causes.leaked,
    "forgetting": rate_causes.forgetting,
    "temperature_floor": score_causes.high_floor,
    "false_negatives": data_causes.false_negatives,
    "over_fitting": data_causes.over_fitting,
    "not_started": learning_causes.not_started,
}

# Measured directly, but what comes of something else where that is likely.
_SYMPTOMS = frozenset({"collapsed", "forgetting"})
# No reason for a loss that stands still: beside any other cause it would be wrong to wait.
_LEAVES_WAITING = frozenset({"false_negatives", "leaked_split", "not_started"})


def diagnose(evidence: Evidence) -> Diagnosis:
    """Name what keeps a run from learning, the likeliest cause first.

    Args:
        evidence: of a run that has ended, that goes on, or that has not begun.
    """
    reading = Reading(evidence)
    findings: list[Finding] = []
    ruled_out: list[RuledOut] = []
    unasked: list[str] = []
    for cause, rule in RULES.items():
        said = rule(reading)
        if isinstance(said, Finding):
            findings.append(said)
        elif isinstance(said, RuledOut):
            ruled_out.append(said)
        else:
            unasked.append(cause)
    known = [{each.cause for each in side} for side in (findings, ruled_out)]
    findings += failed_checks(reading, *known)
    found = {finding.cause for finding in findings}
    ruled_out = [each for each in ruled_out if each.cause not in found]
    if any(finding.cause not in _LEAVES_WAITING for finding in findings):
        findings = [finding for finding in findings if finding.cause != "not_started"]
    findings.sort(key=_place)
    if not findings:
        findings.append(_without_findings(reading, len(ruled_out)))
    return Diagnosis(_with_one_mend(findings), tuple(ruled_out), tuple(unasked))


def _with_one_mend(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The same, without changes to a setting that an earlier finding changes.

    What comes of an earlier finding is mended with it, and needs no change of its own.
    """
    named: set[str] = set()
    kept: list[Finding] = []
    for finding in findings:
        has_root = any(each.cause not in _LEAVES_WAITING for each in kept)
        is_explained = finding.cause in _SYMPTOMS and has_root
        change = {
            key: value
            for key, value in finding.change.items()
            if key not in named and not is_explained
        }
        named |= change.keys()
        kept.append(replace(finding, change=change))
    return tuple(kept)


def _place(finding: Finding) -> int:
    is_no_root = finding.cause in _SYMPTOMS or finding.cause == "leaked_split"
    return SURENESS.index("likely" if is_no_root else finding.sureness)


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
    if reading.has_learnt or reading.was_good:
        return Finding(HEALTHY, _how_it_goes(reading), (way,), "likely", "Nothing is to be mended")
    evidence = [way, f"{num_ruled_out} causes were ruled out."]
    if reading.beginning is not None and not reading.is_at_chance:
        evidence.insert(1, f"In the first steps it was {reading.beginning.loss:.3f}.")
    return Finding(
        UNKNOWN,
        "nothing that is known explains this loss",
        tuple(evidence),
        "possible",
        "colfolio check measures more than a log holds",
    )


def _how_it_goes(reading: Reading) -> str:
    if reading.has_learnt:
        return f"the run learns {'and still falls' if reading.is_falling else 'and stands'}"
    return "the model was good before the first step, and still is"
