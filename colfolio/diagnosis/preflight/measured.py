"""What the gradients of a run's first batches say of the rate and the batch that it asks for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from colfolio.batch import ContrastiveBatch
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import SamplerPosition
from colfolio.diagnosis.signals.gradients import GradientSignals, gradient_signals
from colfolio.diagnosis.signals.rate_range import RateRange, rate_range
from colfolio.diagnosis.signals.trial_steps import copied_state, drawn_batches
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings

_BATCHES = 8
_FAR_BELOW = 300.0  # times: so far below the highest rate that falls, a run hardly moves


@dataclass(frozen=True, slots=True)
class Measured:
    """A number that no line between right and wrong is drawn through, and what it means.

    Args:
        told: the number with its unit, beside what the recipe has.
        seconds: that it took.
    """

    name: str
    told: str
    seconds: float


def measure_run(
    retriever: Retriever, settings: TrainSettings, dataset: RetrievalDataset
) -> Iterator[Measured]:
    """Measure on copies of a model, one after another; it stays as it is.

    Args:
        retriever: as it was loaded.
        dataset: the training split, of which eight batches are read.

    Raises:
        RecipeError: a chunk of a batch does not fit.
        DatasetError: images cannot be read.
    """
    begin = time.perf_counter()
    drawn = drawn_batches(copied_state(retriever, settings), dataset, SamplerPosition(), _BATCHES)
    batches = list(drawn)
    signals = gradient_signals(retriever, settings, batches)
    yield Measured("gradient", _told_gradient(signals), time.perf_counter() - begin)
    yield Measured("batch", _told_noise(signals, settings), 0.0)
    yield _rates(retriever, settings, batches)


def _told_gradient(signals: GradientSignals) -> str:
    parts = ", ".join(
        f"{name} {part.norm:.1e} ({part.dead:.0%} dead)" for name, part in signals.parts.items()
    )
    return f"norm {signals.norm:.1e} of the first batch; of its parts: {parts}"


def _told_noise(signals: GradientSignals, settings: TrainSettings) -> str:
    rows = settings.batch.rows * settings.accumulation
    own = f"a step of the recipe has {rows}"
    if signals.rows is None or not math.isfinite(signals.rows):
        return f"{_BATCHES} batches have no gradient in common beside their noise; {own} rows"
    return (
        f"before step 1 the gradient of {signals.rows:.3g} rows is half noise, {own}; the number "
        "grows while the loss falls, and counts rows of a step, not candidates of a query"
    )


def _rates(
    retriever: Retriever, settings: TrainSettings, batches: Sequence[ContrastiveBatch]
) -> Measured:
    begin = time.perf_counter()
    found = rate_range(retriever, settings, batches)
    return Measured("rates", told_rates(found, settings), time.perf_counter() - begin)


def told_rates(found: RateRange, settings: TrainSettings) -> str:
    """The highest rate at which the loss still fell, and where the recipe's stands beside it."""
    own, ends = settings.optimiser.lr, f"from {found.rates[0]:.0e} to {found.rates[-1]:.0e}"
    told = f"{len(found.rates)} steps {ends}: loss {found.losses[0]:.3f} before them"
    if found.highest is None:
        return f"{told}, and no step lowered it; the recipe has {own:.1e}"
    told += f", lowest {min(found.losses):.3f} at {found.highest:.1e}; the recipe has {own:.1e}"
    if own > found.highest:
        return f"{told}, which is above it: set train.optimiser.lr to {found.highest / 3:.1e}"
    if own < found.highest / _FAR_BELOW:
        return f"{told}, {found.highest / own:.0f} times below, where a run hardly moves"
    return f"{told}, {found.highest / own:.3g} times below"
