"""Causes that lie in how the run learns: its rate, its candidates, its length, its arithmetic."""

from __future__ import annotations

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import (
    FEW_CANDIDATES,
    LEARNT,
    LEAST_DISTANCE,
    LEAST_UPDATE,
    MOST_UPDATE,
    RANKED,
    SHORT_WARMUP,
    SKIPPED,
    SMALL_UPDATE,
    TORN_UPDATE,
)


def not_finite(reading: Reading) -> Finding | RuledOut | None:
    """Numbers that were no numbers."""
    fault = reading.evidence.fault
    if fault is None:
        return RuledOut("not_finite", "loss and gradient were finite in every step")
    where = f" It first shows in the output of {fault.module}." if fault.module else ""
    precision = reading.settled.precision
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


def rate_too_high(reading: Reading) -> Finding | RuledOut | None:
    """Steps that tear the weights apart."""
    level = reading.recent
    if level is None or not reading.largest_updates:
        return None
    part, update = max(reading.largest_updates.items(), key=lambda item: item[1])
    rate = reading.highest_rate
    if update < MOST_UPDATE or level.way > LEARNT or reading.ranks(RANKED):
        return RuledOut(
            "rate_too_high", f"a step changes {part} by {update:.1e} of its weights at most"
        )
    return Finding(
        "rate_too_high",
        "the learning rate is too high",
        (
            f"The largest steps change {part} by {update:.0%} of its weights (0.1 % is usual), and "
            f"the loss is {level.loss:.3f} with chance at {level.chance:.3f}.",
        ),
        "certain" if update > TORN_UPDATE else "likely",
        "Begin again from the base at a tenth of the rate",
        {} if rate is None else {"train.optimiser.lr": f"{rate / 10:.2g}"},
    )


def rate_too_low(reading: Reading) -> Finding | RuledOut | None:
    """Steps that change nothing, for the rate is low or warm-up hardly over."""
    level = reading.recent
    if level is None or not reading.updates:
        return None
    part, update = max(reading.updates.items(), key=lambda item: item[1])
    last, rate, settled = reading.last_probe, reading.highest_rate, reading.settled
    moved = None if last is None else max(last.query_distance, last.document_distance)
    has_stayed = moved is not None and moved < LEAST_DISTANCE
    is_still = update < LEAST_UPDATE or (has_stayed and update < SMALL_UPDATE)
    if not reading.is_poor or not is_still:
        return RuledOut("rate_too_low", f"a step changes {part} by {update:.1e} of its weights")
    evidence = [f"A step changes the weights of {part}, the most of all, by {update:.1e} of them."]
    if moved is not None:
        evidence.append(f"Vectors have turned by {moved:.1e} (1 - cosine) since the beginning.")
    is_warming = bool(settled.warmup_steps and settled.steps and reading.steps) and _is_warming(
        reading
    )
    if is_warming:
        evidence.append(
            f"The rate rises for {settled.warmup_steps} steps and came to {rate:.1e} of "
            f"{settled.lr:.1e}."
        )
        return Finding(
            "warmup_too_long",
            "the run is in warm-up nearly all the time, and its rate stays low",
            tuple(evidence),
            "certain",
            "Warm up for a tenth of the steps at most",
            {"train.optimiser.warmup_steps": str(max(1, (settled.steps or 0) // 20))},
        )
    return Finding(
        "rate_too_low",
        "the learning rate is too low",
        tuple(evidence),
        "likely",
        "Raise it tenfold; colfolio check finds the highest at which the loss still falls",
        {} if rate is None else {"train.optimiser.lr": f"{rate * 10:.2g}"},
    )


def _is_warming(reading: Reading) -> bool:
    settled, rate = reading.settled, reading.highest_rate
    if not settled.warmup_steps or not settled.steps or settled.lr is None or rate is None:
        return False
    return settled.warmup_steps > SHORT_WARMUP * settled.steps and rate < 0.9 * settled.lr


def few_candidates(reading: Reading) -> Finding | RuledOut | None:
    """A task too easy, or too noisy, to teach what a search asks for."""
    candidates, settled = reading.evidence.candidates, reading.settled
    if candidates is None or settled.loss == "distillation":  # a teacher grades the few it scored
        return None
    if candidates >= FEW_CANDIDATES:
        return RuledOut("few_candidates", f"a query has {candidates:.0f} candidates")
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
        "likely",
        "Raise the rows of a batch, not the accumulation: with train.memory.chunk_tokens a large "
        "one costs no more memory, and the gradient is exact",
        {"train.batch.rows": "128"} if settled.rows is None or settled.rows < 128 else {},
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
    """A loss at chance whose scores are still alive."""
    level = reading.recent
    if level is None or level.chance <= 0:
        return None
    if not reading.is_at_chance or reading.ranks(RANKED):
        return RuledOut("not_started", f"the loss has gone {level.way:.0%} of the way")
    if reading.has_collapsed:
        return RuledOut("not_started", "scores are gone")
    left = reading.spread_left
    spread = "" if left is None else f" Scores spread by {left:.0%} of what they did at the start."
    return Finding(
        "not_started",
        "learning has not begun yet",
        (
            f"After {reading.steps[-1].step} steps the loss is {level.loss:.3f}, chance is "
            f"{level.chance:.3f}.{spread}",
        ),
        "likely",
        "Go on: models from random weights stand at chance for some hundred steps. If it lasts, "
        "colfolio check shows whether one batch can be learnt",
    )
