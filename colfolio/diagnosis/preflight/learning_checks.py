"""Whether a run can learn: where its loss begins, what gets a gradient, and one batch by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from colfolio.diagnosis.causes.thresholds import STEEP_START
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.steps import MOST_STEPS, WAY, Descent, Steps
from colfolio.diagnosis.preflight.trial import Trial, as_found, scores_of, settled
from colfolio.diagnosis.signals.finite import find_fault
from colfolio.distributed import whole
from colfolio.models.contract import hash_weights
from colfolio.models.parts import inventory
from colfolio.models.retriever import Retriever
from colfolio.models.weights import listed
from colfolio.training.optim import build_scaler
from colfolio.training.retrieval_objective import batch_loss

START, GRADIENT, FROZEN, ONE_BATCH = (
    "loss at the start",
    "gradient reaches what trains",
    "frozen weights stay",
    "one batch by heart",
)
_NEAR_CHANCE = 1.5  # times chance: scores that lie apart at random cost more than equal ones
_FACTORS = (1.0, 10.0, 0.1)  # of the recipe's rates, in the order in which they are tried


def can_retrieve(model: Retriever) -> bool:
    """Whether weights were trained to retrieve, by what is known of them.

    A base tells the hash of the projection that was drawn for it, and no recipe and no data.
    """
    contract = model.contract
    return bool(contract.recipe or contract.data) or not contract.projection_hash


def start_of_loss(trial: Trial) -> Check:
    """Before step 1 a model that never trained guesses, and one that did does better."""
    with torch.no_grad():
        summary = batch_loss(trial.state, trial.batch)(scores_of(trial))
    loss, chance, spread = (float(each) for each in (summary.loss, summary.chance, summary.spread))
    told = f"{loss:.3f} nats, chance {chance:.3f} ({float(summary.candidates):.0f} candidates)"
    if can_retrieve(trial.retriever):
        if loss < chance:
            return Check(
                START, True, f"{told}: weights that were trained before know more than that"
            )
        return Check(
            START,
            False,
            f"{told}: the weights were trained before and yet say nothing of these rows; if they "
            "are meant for such data, templates, positions or the adapter are not those that they "
            "were trained with",
        )
    settings = trial.state.settings.loss
    is_steep = spread >= STEEP_START * settings.temperature or settings.kind == "sigmoid"
    if math.isfinite(loss) and (loss <= _NEAR_CHANCE * chance or not is_steep):
        return Check(START, True, f"{told}; scores lie {spread:.2g} apart")
    if settings.kind == "sigmoid":
        mend = f"set train.loss.bias, {settings.bias:g} now, so that a run begins at chance"
    else:
        mend = (
            f"scores of a query lie {spread:.2g} apart before anything is learnt, and are divided "
            f"by a temperature of {settings.temperature:g}; set train.loss.temperature to about "
            f"{spread:.2g}"
        )
    return Check(START, False, f"{told}: far above it; {mend}", "temperature_too_low")


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
    for factor in _FACTORS:
        with as_found(trial):
            found[factor] = descent = Steps(trial).descend(factor)
        if descent.way >= WAY:
            at = "the recipe's rate" if factor == 1 else f"{factor:g} x the recipe's rate"
            own = "" if factor == 1 else f"; at its own {found[1.0].told}"
            return Check(ONE_BATCH, True, f"{descent.told} at {at}{own}")
    best = max(found, key=lambda factor: found[factor].way)
    cause = {1.0: "not_started", 10.0: "rate_too_low", 0.1: "rate_too_high"}[best]
    told = "; ".join(f"{factor:g} x the rate: {each.told}" for factor, each in found.items())
    return Check(
        ONE_BATCH,
        False,
        f"{len(trial.batch.queries)} rows are not learnt in {MOST_STEPS} steps ({told}), though "
        f"{WAY:.0%} of the way from chance to floor is little for so few; mend what else failed, "
        "or train.optimiser.lr",
        cause,
    )


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
