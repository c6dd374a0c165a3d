"""Causes that lie in how the run learns: its candidates, its length, its arithmetic."""

from __future__ import annotations

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.mends import lower_rate, more_rows
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import (
    FEW_CANDIDATES,
    LEARNT,
    RANKED,
    SKIPPED,
    SLOW_START,
    TORN_UPDATE,
)

_TENTH = 0.1


def not_finite(reading: Reading) -> Finding | RuledOut | None:
    """Numbers that were no numbers."""
    fault = reading.evidence.fault
    if fault is None:
        if not reading.steps:
            return None
        return RuledOut("not_finite", "loss and gradient were finite in every step")
    where = f" It first shows in the output of {fault.module}." if fault.module else ""
    precision = reading.settled.precision
    update = max(reading.largest_updates.values(), default=0.0)
    if update > TORN_UPDATE:
        return Finding(
            "not_finite",
            f"the {fault.what} is no longer a number",
            (
                f"Step {fault.step + 1} could not be done.{where} The largest steps before changed "
                f"weights by {update:.0%} (0.1 % is usual).",
            ),
            "certain",
            "Such steps tear weights apart in any precision: begin again from the base at a rate "
            "at which they are as large as usual",
            lower_rate(reading, _TENTH),
        )
    return Finding(
        "not_finite",
        f"the {fault.what} is no longer a number",
        (f"Step {fault.step + 1} could not be done.{where}",),
        "certain",
        "Look at that module's inputs and weights. In half precision try bf16 or fp32; else lower "
        "the rate",
        {"train.precision": "fp32"} if precision not in (None, "fp32") else {},
    )


def overflow(reading: Reading) -> Finding | RuledOut | None:
    """Steps that half precision skipped."""
    share = reading.evidence.skipped
    if not reading.evidence.steps:
        return None
    if share <= SKIPPED:
        return RuledOut("overflow", f"{share:.0%} of the steps were skipped")
    return Finding(
        "overflow",
        "gradients overflow in half precision, and their steps are skipped",
        (f"{share:.0%} of the steps changed no weight.",),
        "certain",
        "Train in bf16, which has the range of float32",
        {"train.precision": "bf16"},
    )


def few_candidates(reading: Reading) -> Finding | RuledOut | None:
    """A task too easy, or too noisy, to teach what a search asks for."""
    candidates, settled = reading.evidence.candidates, reading.settled
    if candidates is None or settled.loss == "distillation":  # a teacher grades the few it scored
        return None
    if candidates >= FEW_CANDIDATES:
        return RuledOut("few_candidates", f"{candidates:.0f} for each query are enough")
    last, accuracy = reading.last_probe, reading.accuracy
    ranks_well = last is not None and last.accuracy >= RANKED
    if ranks_well:
        return RuledOut("few_candidates", "few, but the model ranks many documents well")
    evidence = [f"A query is compared with {candidates:.3g} documents."]
    if candidates <= 1:
        evidence = ["A query has its own document alone, so the loss is 0 whatever the model does."]
    if last is not None and accuracy is not None:
        evidence.append(
            f"Among them it ranks its answer first in {accuracy:.0%} of the cases, among "
            f"{last.documents} in {last.accuracy:.0%}."
        )
    return Finding(
        "few_candidates",
        f"too few candidates{_by_which_setting(reading)}",
        tuple(evidence),
        "possible" if settled.loss == "pairwise" else "likely",  # one negative counts among any
        "Raise the rows of a batch, not the accumulation: with train.memory.chunk_tokens a large "
        "one costs no more memory, and the gradient is exact",
        more_rows(reading),
    )


def _by_which_setting(reading: Reading) -> str:
    settled, masked = reading.settled, reading.evidence.masked or 0
    if masked > 3 * (reading.evidence.candidates or 0):
        return f": the mask {settled.ignored or ''} takes {masked:.3g} documents of a batch"
    if settled.accumulation > 1:
        return (
            f": {settled.accumulation} accumulated batches of {settled.rows} rows are "
            f"{settled.accumulation} times {settled.rows} candidates, not "
            f"{settled.accumulation * (settled.rows or 0)}"
        )
    if settled.ranks > 1:
        return f": {settled.ranks} ranks share {settled.rows} rows"
    return "" if settled.rows is None else f": a batch has {settled.rows} rows"


def not_started(reading: Reading) -> Finding | RuledOut | None:
    """A loss that has not fallen, of scores that are still alive."""
    level = reading.recent
    if level is None or level.chance <= 0:
        return None
    steps = reading.steps[-1].step
    is_early = steps < SLOW_START and level.way < LEARNT
    is_standing = reading.is_at_chance or (is_early and not reading.has_learnt)
    if not is_standing or reading.ranks(RANKED) or reading.was_good:
        return RuledOut("not_started", f"the loss has gone {level.way:.0%} of the way")
    if reading.has_collapsed:
        return RuledOut("not_started", "scores have lost their spread, which waiting does not mend")
    evidence = [
        f"After {steps} {'step' if steps == 1 else 'steps'} the loss is {level.loss:.3f}, chance "
        f"is {level.chance:.3f}."
    ]
    if reading.spread_left is not None:
        evidence.append(
            f"Scores spread {reading.spread_left:.2g} times as much as before the first step."
        )
    model = reading.evidence.model
    is_trained = model is not None and bool(model.is_trained)
    return Finding(
        "not_started",
        "learning has not begun yet"
        if reading.is_at_chance
        else "the loss has not fallen since the first steps",
        tuple(evidence),
        "likely",
        _mend_of_waiting(reading, is_trained=is_trained, is_early=steps < SLOW_START),
    )


def _mend_of_waiting(reading: Reading, *, is_trained: bool, is_early: bool) -> str:
    assert reading.recent is not None
    lasting = "if it lasts, colfolio check shows whether one batch can be learnt"
    if reading.recent.way < -LEARNT:
        bias = "lower train.loss.bias" if reading.settled.loss == "sigmoid" else "raise temperature"
        return f"Scores are too large for this loss: {bias} until it begins near chance"
    if not is_early:
        return "Go on only if the loss has begun to move; " + lasting
    if is_trained:
        return "Go on: so few steps say little; " + lasting
    return "Go on: models from random weights stand at chance for some hundred steps; " + lasting
