"""Steps on one small batch alone, to see whether it can be learnt, and on what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from colfolio.diagnosis.preflight.trial import Trial, settled
from colfolio.training.losses import ScoreSummary
from colfolio.training.optim import build_optimiser, build_scaler, optimiser_step
from colfolio.training.retrieval_objective import batch_loss

MOST_STEPS = 40
WAY = 0.5  # from chance to floor
_LEAST_SPREAD = 1e-12


FACTORS = (1.0, 10.0, 0.1)  # of the recipe's rates, in the order in which they are tried


@dataclass(frozen=True, slots=True)
class Descent:
    """How far some steps went.

    Args:
        way: share of the way from chance to floor, after them.
        begin: before them.
        spread_left: of the scores of a query, over that before them.
        told: all that in words.
    """

    way: float
    begin: float
    spread_left: float
    told: str


class Steps:
    """Steps on the trial's batch alone, with an optimiser and a scaler of their own."""

    def __init__(self, trial: Trial) -> None:
        state = trial.state
        self._trial = trial
        self._settings = state.settings.optimiser
        self._groups = state.groups
        self._optimiser = build_optimiser(state.model, self._settings, state.groups)
        self.scaler = build_scaler(settled(trial), state.model.device)

    def descend(self, factor: float) -> Descent:
        """Steps until the batch is known by heart."""
        ways, spreads = [], []
        loss, step = math.nan, 0
        for step in range(1, MOST_STEPS + 1):
            summary = self.gradient(step)
            loss, chance, floor, spread = (
                float(each)
                for each in (summary.loss.detach(), summary.chance, summary.floor, summary.spread)
            )
            ways.append((chance - loss) / (chance - floor) if chance > floor else 1.0)
            spreads.append(spread)
            if not math.isfinite(loss) or ways[-1] >= WAY:
                break
            self.update(factor)
        left = spreads[-1] / max(spreads[0], _LEAST_SPREAD)
        if not math.isfinite(loss):
            return Descent(-math.inf, ways[0], left, f"{loss} after {step - 1} steps")
        told = f"{ways[-1]:.0%} of the way after {step - 1} steps ({loss:.3f} nats)"
        return Descent(ways[-1], ways[0], left, told)

    def update(self, factor: float) -> None:
        """One step on the gradient that there is."""
        rates = [group.base_lr * group.depth_factor * factor for group in self._groups]
        model = self._trial.retriever
        optimiser_step(model, self._optimiser, rates, self._settings, self.scaler)

    def gradient(self, seed: int) -> ScoreSummary:
        """Add the gradient of the batch."""
        trial = self._trial
        loss = batch_loss(trial.state, trial.batch)
        return trial.exact.backward(trial.batch, loss, seed, scale=self.scaler.scale)
