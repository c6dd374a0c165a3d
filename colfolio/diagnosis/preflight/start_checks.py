"""Where a run's loss begins, beside its chance level and its floor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.diagnosis.causes.thresholds import (
    HIGH_FLOOR,
    NO_ROOM,
    STEEP_START,
)
from colfolio.diagnosis.ledgers.ledger import Ledger
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.trial import Trial, scores_of
from colfolio.diagnosis.signals.model_facts import can_retrieve
from colfolio.diagnosis.signals.score_signals import mean_rank
from colfolio.training.retrieval_objective import batch_loss

START, FLOOR = "loss at the start", "floor of the loss"
_NEAR_CHANCE = 1.5  # times chance: scores that lie apart at random cost more than equal ones
_HALVINGS = 60
_ERRORS = 2.0  # standard errors by which a rank is better than a guess


def start_of_loss(trial: Trial, count: Callable[[], Ledger]) -> Check:
    """Before step 1 a model that never trained guesses, and one that did does better.

    Args:
        count: makes the ledger of the run.
    """
    scores = scores_of(trial)
    with torch.no_grad():
        summary = batch_loss(trial.state, trial.batch)(scores)
    loss, chance, spread = (float(each) for each in (summary.loss, summary.chance, summary.spread))
    told = f"{loss:.3f} nats, chance {chance:.3f} ({float(summary.candidates):.0f} candidates)"
    if not math.isfinite(loss):
        return Check(START, False, f"{told}: scores are no finite numbers", "not_finite")
    if can_retrieve(trial.retriever):
        return _start_of_trained(trial, scores, told, loss < chance)
    settings = trial.state.settings.loss
    is_near = loss <= _NEAR_CHANCE * chance
    if settings.kind == "sigmoid" and not is_near:
        bias = _fitting_bias(trial, scores, count())
        told += f"; the loss is least with train.loss.bias {bias:.2f}, {settings.bias:g} now"
        return Check(START, True, told)
    if is_near or spread < STEEP_START * settings.temperature:
        return Check(START, True, f"{told}; scores lie {spread:.2g} apart")
    return Check(
        START,
        False,
        f"{told}: far above it; scores of a query lie {spread:.2g} apart before anything is "
        f"learnt, and are divided by a temperature of {settings.temperature:g}; set "
        f"train.loss.temperature to about {spread:.2g}",
        "temperature_too_low",
    )


def floor_of_loss(count: Callable[[], Ledger]) -> Check:
    """The temperature leaves a loss room to fall.

    Args:
        count: makes the ledger of the run.
    """
    ledger = count()
    share = ledger.floor / ledger.chance
    told = f"{ledger.floor:.3f} nats, chance {ledger.chance:.3f}"
    if share < HIGH_FLOOR:
        return Check(FLOOR, True, f"{told}: {1 - share:.0%} of it can be learnt away")
    cause = "temperature_floor" if share < NO_ROOM else "temperature_too_high"
    told += (
        f": no scores that MaxSim can give take the loss further down ({ledger.loss}); judge a run "
        "by accuracy and validation, or set a lower train.loss.temperature"
    )
    return Check(FLOOR, False, told, cause)


def _start_of_trained(
    trial: Trial, scores: Float[Tensor, "queries documents"], told: str, is_below: bool
) -> Check:
    """Weights that can retrieve rank answers better than a guess, whatever the loss makes of it.

    A low temperature, or rows unlike those that they were trained on, take the loss far above
    chance.
    """
    batch = trial.batch
    negatives = ~(batch.positives | batch.ignored)
    takes_part = batch.positives.any(dim=1)
    rank = mean_rank(scores.cpu(), batch.positives, batch.ignored)
    places = (negatives.sum(dim=1) + 1)[takes_part].double()
    guess = float((places.mean() + 1) / 2)
    error = float(((places**2 - 1) / 12).sum().sqrt() / len(places))  # of uniform places
    told += (
        f"; answers stand at place {rank:.1f} of {float(places.mean()):.0f}, guessed {guess:.1f}"
    )
    if is_below or rank <= guess - min(_ERRORS * error, (guess - 1) / 2):
        return Check(START, True, f"{told}: weights that were trained before know more than that")
    return Check(
        START,
        False,
        f"{told}: the weights were trained before and yet say nothing of these rows; if they are "
        "meant for such data, templates, positions or the adapter are not those that they were "
        "trained with, or answers are not those of their queries",
    )


def _fitting_bias(
    trial: Trial, scores: Float[Tensor, "queries documents"], ledger: Ledger
) -> float:
    """The bias at which the sigmoid loss of these scores is least, in batches of the run.

    There the pairs that it takes for answers are as many as the answers, and their number rises
    with the bias, so halving finds it.
    """
    batch, temperature = trial.batch, trial.state.settings.loss.temperature
    logits = scores.double().cpu() / temperature
    negatives = logits[~(batch.positives | batch.ignored)]
    answers = logits[batch.positives]
    count = len(answers) / int(batch.positives.any(dim=1).sum())
    others = max(ledger.candidates.median - 1, 1.0)
    reach = float(logits.abs().max()) + math.log(others / count) + 1
    low, high = -reach, reach
    for _ in range(_HALVINGS):
        bias = (low + high) / 2
        taken = others * (negatives + bias).sigmoid().mean() + count * (
            (answers + bias).sigmoid().mean()
        )
        low, high = (bias, high) if taken < count else (low, bias)
    return (low + high) / 2
