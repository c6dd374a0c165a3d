"""Causes that lie in the size of the steps: a rate too high or too low, and what it destroys."""

from __future__ import annotations

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.mends import higher_rate, lower_rate
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import (
    BETTER_RANKED,
    FORGOTTEN,
    LEARNT,
    LEAST_DISTANCE,
    LEAST_RATE,
    LEAST_UPDATE,
    MOST_UPDATE,
    RANKED,
    SHORT_WARMUP,
    SMALL_UPDATE,
    STARTED,
    TIMES_EXPECTED,
    TORN_UPDATE,
)

_TENTH, _THIRD = 0.1, 1 / 3


def rate_too_high(reading: Reading) -> Finding | RuledOut | None:
    """Steps that tear the weights apart."""
    level = reading.recent
    if level is None or not reading.largest_updates:
        return None
    part, update = max(reading.largest_updates.items(), key=lambda item: item[1])
    has_lost = isinstance(_lost(reading), str)
    learns = (level.way > LEARNT or reading.ranks(RANKED)) and not has_lost
    if update < MOST_UPDATE or learns:
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
        "Begin again from the base at a rate at which steps are as large as usual",
        lower_rate(reading, _TENTH),
    )


def rate_too_low(reading: Reading) -> Finding | RuledOut | None:
    """Steps that change nothing, for the rate is low or warm-up hardly over."""
    if reading.recent is None:
        return None
    if not reading.updates:
        return _rate_next_to_nothing(reading)
    part, update = max(reading.updates.items(), key=lambda item: item[1])
    last, rate, settled = reading.last_probe, reading.highest_rate, reading.settled
    moved = None if last is None else max(last.query_distance, last.document_distance)
    if moved is None:  # of a model that has collapsed gradients become 0, and steps with them
        is_still = update < LEAST_UPDATE and not reading.has_gone_silent
    else:
        is_still = update < SMALL_UPDATE and moved < LEAST_DISTANCE
    never_warm = _is_never_warm(reading)
    if not never_warm and (not is_still or reading.has_gained or reading.was_good):
        return RuledOut("rate_too_low", f"a step changes {part} by {update:.1e} of its weights")
    evidence = [f"A step changes the weights of {part}, the most of all, by {update:.1e} of them."]
    if moved is not None:
        evidence.append(f"Vectors have turned by {moved:.1e} (1 - cosine) since the beginning.")
    if never_warm or _is_warming(reading):
        evidence.append(
            f"The rate rises for {settled.warmup_steps} steps and came to {rate:.1e} of "
            f"{settled.lr:.1e}."
        )
        return Finding(
            "warmup_too_long",
            "the run is in warm-up nearly all the time, and its rate stays low",
            tuple(evidence),
            "certain" if is_still else "likely",
            "Warm up for a tenth of the steps at most",
            {"train.optimiser.warmup_steps": str(max(1, (settled.steps or 0) // 20))},
        )
    return Finding(
        "rate_too_low",
        "the learning rate is too low",
        tuple(evidence),
        "likely",
        "Raise it until a step changes a thousandth of the weights, as is usual",
        higher_rate(reading, update),
    )


def _rate_next_to_nothing(reading: Reading) -> Finding | RuledOut | None:
    """The same of a log that tells rates and no updates."""
    rate = reading.highest_rate
    if rate is None or rate >= LEAST_RATE or reading.has_gained or reading.was_good:
        return None
    return Finding(
        "rate_too_low",
        "the learning rate is too low",
        (f"It is {rate:.1g} at most, and weights that are stored in float32 hardly feel it.",),
        "likely",
        "Look at the schedule, and raise the rate until a step changes a thousandth of the weights",
    )


def _is_warming(reading: Reading) -> bool:
    settled, rate = reading.settled, reading.highest_rate
    if not settled.warmup_steps or not settled.steps or settled.lr is None or rate is None:
        return False
    return settled.warmup_steps > SHORT_WARMUP * settled.steps and rate < 0.9 * settled.lr


def _is_never_warm(reading: Reading) -> bool:
    """Whether the rate rises to the last step, and the model has learnt little or nothing by it.

    A loss that falls a little at a thousandth of its rate is no sign that the run goes well.
    """
    settled, level = reading.settled, reading.recent
    if not settled.warmup_steps or not settled.steps or level is None or not _is_warming(reading):
        return False
    if settled.warmup_steps < settled.steps or reading.was_good or reading.has_collapsed:
        return False
    if level.way > LEARNT or reading.ranks(RANKED):
        return False
    has_ended = reading.steps[-1].step >= settled.steps
    stays_low = settled.steps < _TENTH * settled.warmup_steps  # below a tenth of the rate
    return stays_low or (has_ended and reading.is_poor)


def forgetting(reading: Reading) -> Finding | RuledOut | None:
    """A model that has become worse than it was before the first step."""
    found = _lost(reading)
    if found is None or isinstance(found, RuledOut):
        return found
    return Finding(
        "forgetting",
        _what_is_lost(reading),
        (found,),
        "certain" if reading.last_probe is not None else "likely",
        "Begin again from the base at a lower rate. Adapters (train.lora) or frozen parts hold "
        "what a base knows as well; if it is lost all the same, read some queries beside their "
        "documents",
        lower_rate(reading, _THIRD),
    )


def _what_is_lost(reading: Reading) -> str:
    first, last = reading.first_probe, reading.last_probe
    if first is not None and last is not None and last.loss < first.loss:
        return "the model ranks worse than the base that it began from"
    return "the model is worse than the base that it began from"


def _lost(reading: Reading) -> str | RuledOut | None:
    """What a run has lost, in a sentence."""
    first, last, now, begun = (
        reading.first_probe,
        reading.last_probe,
        reading.recent,
        reading.beginning,
    )
    if reading.gain is None or now is None or begun is None:
        return None
    has_gone_back = reading.gain < -FORGOTTEN - reading.gain_noise
    if first is None or last is None:
        if begun.way < STARTED or not has_gone_back:
            return RuledOut("forgetting", "the loss is no higher than in the first steps")
        return (
            f"The loss is {now.loss:.3f} and was {begun.loss:.3f} in the first steps, with chance "
            f"at {now.chance:.3f}."
        )
    lost = first.accuracy - last.accuracy
    if first.accuracy < TIMES_EXPECTED / first.documents:
        return RuledOut("forgetting", "the base could not rank, and has nothing to forget")
    if lost < BETTER_RANKED and (not has_gone_back or lost < 0):
        return RuledOut(
            "forgetting",
            f"{last.accuracy:.0%} of the probe's queries rank their answer first, "
            f"{first.accuracy:.0%} did at the start",
        )
    told = f"is {last.loss:.3f} and was {first.loss:.3f}"
    if last.loss < first.loss:
        told = f"fell nevertheless, from {first.loss:.3f} to {last.loss:.3f}"
    return (
        f"On the same {last.documents} documents {last.accuracy:.0%} of the queries rank their "
        f"answer first, and {first.accuracy:.0%} did before the first step; the loss there {told}."
    )
