"""What keeps the run of another trainer from learning, in words that need no recipe of ours.

The table of causes is asked as for any run. What a log of losses alone cannot show is not said: it
is healthy only where its loss fell, and whether scores that are equal once differed stays open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from colfolio.diagnosis.causes import HEALTHY, UNKNOWN, Diagnosis, Finding, diagnose
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.foreign.level import LEAST_ROWS, has_fallen
from colfolio.diagnosis.foreign.log import ForeignLog

_AT_CHANCE = frozenset({"collapsed", "pairwise_loss", "not_started"})
_BESIDE_CHANCE = frozenset({"few_candidates", "forgetting", "over_fitting", UNKNOWN})
_EQUAL = 0.01  # of chance, that the loss of scores which hardly differ wobbles by in a step
_MOVED = 0.02  # of a level, that a loss was away from it
_SLOW_START = 300  # steps that random weights may need
_MEND = {
    "not_finite": "Look at the batch of that step and at the rate; where half precision is used, "
    "bf16 or float32 has the range that fp16 lacks",
    "overflow": "Train in bf16, which has the range of float32",
    "rate_too_low": "Look at the schedule, and at what the optimiser was given",
    "few_candidates": "Raise the rows of a batch on each device, or gather the documents of all "
    "devices; accumulated batches add none",
    "forgetting": "Begin again from the base at a lower rate, or with adapters or frozen parts, "
    "which hold what a base knows",
    "over_fitting": "Take the checkpoint with the lowest validation loss, or train on more data",
    "temperature_floor": "Judge the run by what it ranks, not by the loss; a lower temperature "
    "lets it fall further",
    "temperature_too_high": "Lower the temperature",
    UNKNOWN: "colfolio check --model MODEL measures the model itself",
}
_PAIRWISE = (
    "The pairwise loss is least hurt by scores that are all equal, with 3 rows as with 256, so "
    "more rows are no mend: begin again from the base with InfoNCE, over as many documents as time "
    "allows"
)
_EQUAL_SCORES = (
    "Look at the scores of a batch. Where they are all equal, begin again from the base with a "
    "lower rate or a longer warm-up; where they differ by little beside the temperature, lower it; "
    "where no step changes them, see what trains"
)
_NO_LOGITS = (
    "More rows do not mend that: see what trains, and the bias, which at about -ln(documents - "
    "1) lets equal scores begin at chance"
)
_BY_HEART = (
    "See whether the model learns one batch by heart. If it does, look at labels and batches; if "
    "not, at the rate and at what trains"
)


def diagnose_log(log: ForeignLog) -> Diagnosis:
    """Name what keeps a run from learning, the likeliest cause first.

    Args:
        log: of another trainer.
    """
    asked = diagnose(log.evidence)
    findings = [
        _reworded(log, finding) for finding in asked.findings if finding.cause not in _AT_CHANCE
    ]
    if _is_at_chance(log, {finding.cause for finding in asked.findings}):
        findings = _with_standing(findings, _at_chance(log))
    found = {finding.cause for finding in findings}
    if not _has_fallen(log):
        found.add("not_started")  # which how low the loss is does not rule out
    return Diagnosis(
        tuple(findings),
        tuple(each for each in asked.ruled_out if each.cause not in found),
        tuple(name for name in asked.unasked if name not in found),
    )


def _is_at_chance(log: ForeignLog, causes: set[str]) -> bool:
    """Whether that is to be said: nothing else explains a loss at chance."""
    if "rate_too_low" in causes:
        return False
    return bool(causes & _AT_CHANCE) or (
        causes <= _BESIDE_CHANCE and (Reading(log.evidence).is_at_chance or _is_near_chance(log))
    )


def _is_near_chance(log: ForeignLog) -> bool:
    """Whether a loss that has not fallen stands about its chance level."""
    chance = log.evidence.steps[-1].chance if log.rows else None
    if not chance or _has_fallen(log):
        return False
    return abs(_recent([row.loss for row in log.rows]) - chance) <= _MOVED * chance


def _with_standing(findings: Sequence[Finding], standing: Finding) -> list[Finding]:
    """Findings with what is said of a loss at chance, before those that it explains."""
    kept = [each for each in findings if each.cause != UNKNOWN]
    if standing.cause == "pairwise_loss" or standing.action in (_PAIRWISE, _NO_LOGITS):
        kept = [each for each in kept if each.cause != "few_candidates"]
    if standing.cause == "not_started":
        return [*kept, standing]
    certain = [each for each in kept if each.sureness == "certain"]
    return [*certain, standing, *(each for each in kept if each.sureness != "certain")]


def _reworded(log: ForeignLog, finding: Finding) -> Finding:
    """A finding without settings of recipes, and without what the log cannot show."""
    if finding.cause == "not_finite":
        return _not_finite(log, finding)
    if finding.cause in (HEALTHY, UNKNOWN) and log.rows and not _has_fallen(log):
        return _not_fallen(log)
    return replace(finding, change={}, action=_MEND.get(finding.cause, finding.action))


def _not_finite(log: ForeignLog, finding: Finding) -> Finding:
    fault = log.evidence.fault
    assert fault is not None
    told = f"From step {fault.step + 1} on the {fault.what} is no number, to the end of the log."
    return replace(finding, evidence=(told,), change={}, action=_MEND["not_finite"])


def _not_fallen(log: ForeignLog) -> Finding:
    """What is known of where a loss stands that is not at chance and has not fallen."""
    losses = [row.loss for row in log.rows]
    if len(losses) < 2 * LEAST_ROWS:
        return Finding(
            UNKNOWN,
            "the log is too short to say whether the run learns",
            (f"It has {len(losses)} rows, and their noise hides whether the loss falls.",),
            "possible",
            "Look again after some more",
        )
    settled, level = log.evidence.settled, _recent(losses)
    chance = log.evidence.steps[-1].chance or 0.0
    evidence = [f"It has stood at about {level:.3f}; chance is {chance:.3f} by --loss and --batch."]
    size = round(math.exp(min(level, 20.0)))
    is_near = size > 1 and abs(level - math.log(size)) < _MOVED * level
    if settled.loss == "info_nce" and is_near and size < (settled.rows or 0):
        evidence.append(f"{math.log(size):.3f} is ln {size}, which is chance among {size}.")
    return Finding(
        UNKNOWN,
        "the loss has not fallen since the log begins",
        tuple(evidence),
        "possible",
        "Either the run learnt before the log begins, or a query is not compared with as many "
        "documents as --batch says. Whether the model ranks better than chance tells which",
    )


def _at_chance(log: ForeignLog) -> Finding:
    """A loss at chance: how much it wobbles says how far scores are apart."""
    losses, settled = [row.loss for row in log.rows], log.evidence.settled
    last, chance = log.evidence.steps[-1].step, log.evidence.steps[-1].chance or 0.0
    recent = losses[len(losses) // 2 :]
    wobble = math.sqrt(math.fsum((loss - _recent(losses)) ** 2 for loss in recent) / len(recent))
    between = max(1.0, (last - log.rows[0].step) / max(1, len(losses) - 1))  # steps, of which a row
    of_step = wobble * math.sqrt(between)  # may be the mean
    evidence = [
        f"At step {last} the loss is {_recent(losses):.4f}, and chance is {chance:.4f}; from row "
        f"to row it wobbles by {wobble:.1g}."
    ]
    norms = [row.gradient_norm for row in log.rows if row.gradient_norm is not None]
    if norms:
        evidence.append(f"The norm of the gradient came to {norms[-1]:.2g}.")
    is_of_no_logits = settled.loss == "sigmoid" and _is_of_no_logits(log)
    if is_of_no_logits:
        evidence.append("It is ln 2 a pair, as of logits that are all 0.")
    is_above = is_of_no_logits and _recent(losses) > (1 + _MOVED) * chance
    if of_step < _EQUAL * chance and len(losses) >= 2 * LEAST_ROWS:
        level, before = _recent(losses), losses[: -len(recent)]
        has_moved = any(abs(loss - level) > _MOVED * level for loss in before)
        equal = _equal_scores(settled.loss, evidence, has_moved=has_moved)
        return replace(equal, action=_NO_LOGITS) if is_above else equal
    if is_above:
        title = "the loss stands above chance, as of logits about 0"
        return Finding("not_started", title, tuple(evidence), "likely", _NO_LOGITS)
    return _not_started(settled.loss, evidence, is_early=last < _SLOW_START)


def _equal_scores(loss: str, evidence: list[str], *, has_moved: bool) -> Finding:
    title = "the model has collapsed: it gives all documents the same score"
    if not has_moved:
        title = "the loss has stood still all along, as if all documents had the same score"
        evidence.append(
            "Whether scores ever differed the log does not say: the model may have collapsed "
            "before its first row, scores may lie too close together, as those that are divided "
            "by the query's length at a temperature of 1, or nothing trains."
        )
    action = _PAIRWISE if loss == "pairwise" else _EQUAL_SCORES
    return Finding("collapsed", title, tuple(evidence), "likely", action)


def _not_started(loss: str, evidence: list[str], *, is_early: bool) -> Finding:
    waiting = "Go on for some hundred steps, which models from random weights may need"
    if loss == "pairwise":
        action = f"{waiting}. If it lasts: {_PAIRWISE}" if is_early else _PAIRWISE
        title = "the pairwise loss holds the model at ln 2"
        return Finding("pairwise_loss", title, tuple(evidence), "likely", action)
    action = waiting if is_early else _BY_HEART
    return Finding("not_started", "learning has not begun", tuple(evidence), "likely", action)


def _is_of_no_logits(log: ForeignLog) -> bool:
    """Whether a sigmoid loss, as a mean or a sum over pairs, stands at ln 2 a pair."""
    level, pairs = _recent([row.loss for row in log.rows]), log.evidence.settled.rows or 1
    return any(abs(level - each) < _MOVED * each for each in (math.log(2), pairs * math.log(2)))


def _has_fallen(log: ForeignLog) -> bool:
    return has_fallen([row.loss for row in log.rows])


def _recent(losses: list[float]) -> float:
    """Mean of the last half."""
    recent = losses[len(losses) // 2 :]
    return math.fsum(recent) / len(recent)
