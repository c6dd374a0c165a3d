"""A learning-rate range test: how high the rate may rise before the loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from colfolio.batch import ContrastiveBatch
from colfolio.diagnosis.signals.trial_steps import copied_state
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings
from colfolio.training.optim import optimiser_step
from colfolio.training.retrieval_objective import batch_backward

_SMOOTHING = 0.5  # the weight of what went before in a running mean


@dataclass(frozen=True, slots=True)
class RateRange:
    """What came of a rate that rises.

    Args:
        rates: of each step.
        losses: before each step.
        highest: the rate of the last step that still lowered the loss; None if none did.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    highest: float | None


def rate_range(
    retriever: Retriever,
    settings: TrainSettings,
    batches: Sequence[ContrastiveBatch],
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 40,
) -> RateRange:
    """Train a copy while the rate rises exponentially (Smith 2017, arXiv:1506.01186, section 3.3).

    It ends where the loss is no number, or has come as far above its beginning as chance lies.

    Args:
        retriever: as it was loaded; it stays as it is.
        settings: of the run; its schedule has no part in it, and its rates only by their ratios.
        batches: taken in turn.
        low, high: the first and the last rate, of what has the highest.
        steps: from the one to the other.

    Raises:
        ValueError: there are no batches, fewer than two steps, or the rates do not rise from above
            0.
    """
    if not batches or steps < 2 or not 0 < low < high:
        raise ValueError(
            "a range test needs a batch, two steps and rates 0 < low < high, received "
            f"{len(batches)} batches, {steps} steps, low {low} and high {high}"
        )
    state = copied_state(retriever, settings)
    own = [group.base_lr * group.depth_factor for group in state.groups]
    shares = [rate / max(own) for rate in own]
    rates, losses = [], []
    for step in range(steps):
        batch = batches[step % len(batches)]
        summary = batch_backward(state, batch, step, scale=state.scaler.scale)
        loss, chance = float(summary.loss.detach()), float(summary.chance)
        rates.append(low * (high / low) ** (step / (steps - 1)))
        losses.append(loss)
        if not math.isfinite(loss) or loss > losses[0] + chance:
            break
        each = [rates[-1] * share for share in shares]
        optimiser_step(state.model, state.optimiser, each, settings.optimiser, state.scaler)
    return RateRange(tuple(rates), tuple(losses), highest_falling(rates, losses))


def highest_falling(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate of the last step that lowered a running mean of the losses to a new minimum.

    Args:
        losses: before the step of each rate.

    >>> highest_falling([1e-3, 1e-2, 1e-1, 1.0], [4.0, 3.0, 2.0, 9.0])
    0.01
    """
    smooth = list(losses[:1])
    for loss in losses[1:]:
        smooth.append(_SMOOTHING * smooth[-1] + (1 - _SMOOTHING) * loss)
    finite = [value if math.isfinite(value) else math.inf for value in smooth]
    lowest = finite.index(min(finite))
    return rates[lowest - 1] if lowest > 0 else None
