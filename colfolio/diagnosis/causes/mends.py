"""Settings that mend: rates and rows, worked out from what was measured of the run."""

from __future__ import annotations

import math

from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import USUAL_UPDATE

MOST_ROWS = 128
_LEAST_RISE = 3.0  # of a rate that is too low
_MOST_RATE = 1e-3  # that a rate is raised to: what it did when it was next to 0 is rounded
_RATE = "train.optimiser.lr"
_LEAST_TEMPERATURE = 1e-3


def lower_rate(reading: Reading, share: float) -> dict[str, str]:
    """The rate at which the largest steps would be as large as usual; nothing if none is known.

    Args:
        share: of the rate so far that it is at most.
    """
    rate = reading.highest_rate
    if not rate:
        return {}
    largest = max(reading.largest_updates.values(), default=math.nan)
    factor = USUAL_UPDATE / largest if largest > 0 else share
    return {_RATE: _in_words(rate * min(share, factor))}


def higher_rate(reading: Reading, update: float) -> dict[str, str]:
    """The rate at which a step would change weights as much as is usual.

    Args:
        update: by which share of them it does so far.
    """
    rate = reading.highest_rate
    if not rate:
        return {}
    factor = USUAL_UPDATE / update if update > 0 else math.inf
    raised = max(_LEAST_RISE * rate, min(rate * factor, _MOST_RATE))
    return {_RATE: _in_words(raised)}


def lower_temperature(reading: Reading) -> dict[str, str]:
    """The temperature at which the base's scores spread by about 1; nothing if none is known."""
    probe, temperature = reading.first_probe, reading.settled.temperature
    if probe is None:
        return {}
    lower = max(_LEAST_TEMPERATURE, min(probe.spread, temperature / 2))
    return {"train.loss.temperature": f"{lower:.2g}"}


def more_rows(reading: Reading) -> dict[str, str]:
    """A batch of so many rows as give enough candidates, as far as there are queries."""
    settled, data = reading.settled, reading.evidence.data
    rows = MOST_ROWS if data is None else min(MOST_ROWS, data.queries)
    if settled.rows is not None and settled.rows >= rows:
        return {}
    found = {"train.batch.rows": str(rows)}
    return found | ({"train.accumulation": "1"} if settled.accumulation > 1 else {})


def _in_words(rate: float) -> str:
    """A rate as a recipe has it: YAML takes 1e-05 for a word, but not 1.0e-05."""
    return f"{rate:.1e}"
