"""Whether a run can learn: what gets a gradient, what a step moves, and one batch by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from colfolio.diagnosis.causes.mends import higher_rate, lower_rate
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import (
    GONE_SPREAD,
    LEAST_UPDATE,
    MOST_UPDATE,
    USUAL_UPDATE,
)
from colfolio.diagnosis.evidence import Evidence
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.steps import FACTORS, MOST_STEPS, WAY, Descent, Steps
from colfolio.diagnosis.preflight.trial import Trial, as_found, settled
from colfolio.diagnosis.run_evidence import settled_of
from colfolio.diagnosis.signals.finite import find_fault
from colfolio.diagnosis.training_log import LoggedPart, LoggedStep
from colfolio.distributed import whole
from colfolio.models.contract import hash_weights
from colfolio.models.parts import inventory
from colfolio.models.weights import listed
from colfolio.training.optim import build_scaler
from colfolio.training.retrieval_objective import batch_loss

GRADIENT, FROZEN, ONE_BATCH = (
    "gradient reaches what trains",
    "frozen weights stay",
    "one batch by heart",
)
_CLEAR = 0.1  # share of the way by which one rate is better than another
_FIRST = 3  # steps whose change is measured
_TENTH = 0.1  # which was tried too
_LEAST_NORM = 1e-12


def reach_of_gradient(trial: Trial) -> Check:
    """Every matrix that trains gets a gradient from a small batch; all ranks call it.

    Of an adapter one of its two matrices does, as the other is zero at first. A bias may get none:
    attention does not see that of its keys.
    """
    precision, model = settled(trial), trial.retriever
    try:
        norms = _gradient_norms(trial, build_scaler(precision, model.device))
    finally:
        model.zero_grad(set_to_none=True)
    if not norms:
        return Check(GRADIENT, True, "0 tensors train before the first stage of thaw opens")
    endless = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if endless and precision != "fp16":  # which scales gradients up, and skips what overflows
        scaler = build_scaler(precision, model.device)
        what, where = find_fault(model, lambda: _gradient_norms(trial, scaler))
        told = f"{len(endless)} of {len(norms)} tensors have a gradient that is not finite"
        first = f", from {where} on ({what})" if where else f": {listed(endless)}"
        return Check(GRADIENT, False, f"{told}{first}; look at the weights there", "not_finite")
    dead = _dead(model, norms)
    told = f"{sum(norm != 0 for norm in norms.values())} of {len(norms)} tensors"
    if dead:
        where = inventory(model).label(dead)
        return Check(
            GRADIENT,
            False,
            f"{told}: none comes to {where} ({listed(dead)}), which would never learn; look for a "
            "detach or an output that is not used on the way from there to the vectors, or freeze "
            "it",
            "dead_part",
        )
    return Check(GRADIENT, True, f"{told}, norms up to {max(norms.values()):.1e}")


def frozen_weights(trial: Trial) -> Check:
    """One optimiser step moves what trains and leaves what is frozen equal to the bit."""
    model = trial.retriever
    with as_found(trial) as before:
        frozen = _digests(model, before)
        steps = Steps(trial)
        norms = _gradient_norms(trial, steps.scaler)
        steps.update(1.0)
        after = _digests(model, before)
        named = dict(model.named_parameters())
        still = [name for name, copy in before.items() if torch.equal(named[name], copy)]
    changed = sorted(name for name in frozen if frozen[name] != after[name])
    resting = sorted(name for name in still if math.isfinite(norms[name]) and norms[name] > 0)
    told = f"{len(before) - len(still)} tensors moved in a step, {len(frozen)} frozen ones did not"
    if changed:
        told = f"a step changed {len(changed)} of {len(frozen)} frozen tensors: {listed(changed)}"
        return Check(
            FROZEN, False, f"{told}; leave their modules in evaluation mode", "frozen_parts"
        )
    if resting:
        return Check(
            FROZEN,
            False,
            f"a step left {len(resting)} of {len(before)} tensors that train as they were to the "
            f"bit, though they have a gradient: {listed(resting)}; raise train.optimiser.lr",
            "rate_too_low",
        )
    return Check(FROZEN, True, told)


def one_batch_by_heart(trial: Trial) -> Check:
    """A small batch, trained on alone, goes half of the way from chance to floor in a few steps.

    At the recipe's highest rates without warm-up, and if these do not, at ten times and at a tenth.
    """
    found: dict[float, Descent] = {}
    for factor in FACTORS:
        with as_found(trial):
            found[factor] = descent = Steps(trial).descend(factor)
        if descent.way >= WAY:
            at = "the recipe's rate" if factor == 1 else f"{factor:g} x the recipe's rate"
            own = "" if factor == 1 else f"; at its own {found[1.0].told}"
            return Check(ONE_BATCH, True, f"{descent.told} at {at}{own}")
    cause, mend = _why_not_learnt(trial, found[1.0], found[10.0], found[0.1])
    told = "; ".join(f"{factor:g} x the rate: {each.told}" for factor, each in found.items())
    return Check(
        ONE_BATCH,
        False,
        f"{len(trial.batch.queries)} rows are not learnt in {MOST_STEPS} steps ({told}), though "
        f"{WAY:.0%} of the way from chance to floor is little for so few; {mend}",
        cause,
    )


def _why_not_learnt(
    trial: Trial, own: Descent, faster: Descent, slower: Descent
) -> tuple[str, str]:
    """The cause, and what to do, by what each rate came to and what a step changes."""
    is_gone = own.spread_left < GONE_SPREAD
    if is_gone and trial.state.settings.loss.kind == "pairwise":
        return "collapsed", (
            f"scores are equal but for {own.spread_left:.0%} of their spread, which hurts this "
            "loss least; set train.loss.kind to info_nce"
        )
    reading = _first_steps(trial)
    part, change = max(reading.updates.items(), key=lambda item: item[1])
    told = f"a step changes {part} by {change:.1e} of its weights, where {USUAL_UPDATE:g} is usual"
    if own.way < own.begin - _CLEAR or slower.way > own.way + _CLEAR or change > MOST_UPDATE:
        return "rate_too_high", f"{told}; set {_setting(lower_rate(reading, _TENTH))}"
    if faster.way > own.way + _CLEAR or change < LEAST_UPDATE:
        return "rate_too_low", f"{told}; set {_setting(higher_rate(reading, change))}"
    if is_gone:
        return "collapsed", "scores have become equal; mend what else failed"
    return "not_started", "mend what else failed, or train.optimiser.lr"


def _first_steps(trial: Trial) -> Reading:
    """What a step adds to each part's weights, of them, as the log of a run would have it.

    It is the change after the first steps, over their number.
    """
    settings = trial.state.settings
    rate = settings.optimiser.lr
    with as_found(trial) as before:
        steps = Steps(trial)
        for seed in range(_FIRST):
            steps.gradient(seed)
            steps.update(1.0)
        named = dict(trial.retriever.named_parameters())
        moved = {name: named[name].detach() - copy for name, copy in before.items()}
        changed, weights = _part_norms(trial, moved), _part_norms(trial, before)
    ratios = {
        part: changed[part] / max(norm, _LEAST_NORM) / _FIRST for part, norm in weights.items()
    }
    parts = {part: LoggedPart(rate, math.nan, ratio) for part, ratio in ratios.items()}
    step = LoggedStep(_FIRST, 0.0, None, None, rate, None, parts=parts)
    return Reading(Evidence(settled_of(settings), steps=(step,)))


def _part_norms(trial: Trial, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of tensors that bear the names of weights, of each part together."""
    places = inventory(trial.retriever).places
    norms: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        norms.setdefault(places[name].part, []).append(
            float(whole(torch.linalg.vector_norm(tensor)))
        )
    return {part: math.hypot(*each) for part, each in norms.items()}


def _setting(change: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in change.items())


def _gradient_norms(trial: Trial, scaler: GradScaler) -> dict[str, float]:
    """Of each tensor that trains, after one backward of the batch; the gradients stay."""
    state, model = trial.state, trial.retriever
    loss = batch_loss(trial.state, trial.batch)
    trial.exact.backward(trial.batch, loss, seed=0, scale=scaler.scale)
    state.world.sum_gradients(model.parameters())
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return {name: _norm(weight) for name, weight in named}


def _norm(weight: nn.Parameter) -> float:
    return 0.0 if weight.grad is None else float(whole(torch.linalg.vector_norm(weight.grad)))


def _dead(model: nn.Module, norms: dict[str, float]) -> list[str]:
    """Matrices without a gradient; of the two of an adapter, if neither has one."""
    alive = {_adapter_of(name) for name, norm in norms.items() if norm != 0}
    matrices = {name for name, weight in model.named_parameters() if weight.ndim >= 2}
    return [name for name in norms if name in matrices and _adapter_of(name) not in alive]


def _adapter_of(name: str) -> str:
    return name.replace(".lora_A.", ".lora.").replace(".lora_B.", ".lora.")


def _digests(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor of a model that does not train."""
    return {
        name: hash_weights({name: tensor})
        for name, tensor in model.state_dict().items()
        if name not in trained and tensor.numel()
    }
