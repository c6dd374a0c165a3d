"""AdamW in groups of parameters, each with its rate; a schedule over all; a clipped gradient.

The rate of a group at a step, both counted from 0, is a product:

    base_lr * depth_factor * rise(step - opened) * schedule(step)

The rise is a line up to 1 over the group's own warm-up, from the step at which it began to train.
The schedule is the run's one: 1 for `warmup_steps`, then a cosine to the run's last step, so that a
group that joins half-way begins at half of its rate, and all end together.
"""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from colfolio.config import Settings
from colfolio.distributed import whole
from colfolio.errors import ColfolioError, RecipeError
from colfolio.models.precision import SettledPrecision

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimiserSettings(Settings):
    """AdamW and its schedule.

    Args:
        lr: the highest learning rate, reached after the warm-up.
        betas: decay of the running mean and the running square of the gradient.
        weight_decay: on matrices only, never on embeddings, norms and biases.
        warmup_steps: steps of linear rise.
        final_lr_share: the share of `lr` on which the cosine ends.
        clip_norm: the gradient is scaled down to this norm.
        state: in what the running mean and square are kept; in 8 bits by torchao or bitsandbytes.
    """

    lr: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=100, ge=0)
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    state: Literal["fp32", "torchao_8bit", "bitsandbytes_8bit"] = "fp32"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that train at one rate.

    Args:
        names: as in `named_parameters()` of the model.
        part: what they are, for a reader.
        base_lr: the highest learning rate.
        opened: the step, counted from 0, with which they began to train.
        warmup: steps of linear rise from there.
        depth_factor: of the rate, smaller for lower layers.
        weight_decay: see `OptimiserSettings`.
    """

    names: tuple[str, ...]
    part: str
    base_lr: float
    opened: int
    warmup: int
    depth_factor: float
    weight_decay: float


def first_groups(
    model: nn.Module, settings: OptimiserSettings, part: str = ""
) -> list[ParameterGroup]:
    """All that trains in a model, at the rate of the settings."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {"base_lr": settings.lr, "opened": 0, "warmup": settings.warmup_steps}
    return split_by_decay(model, names, settings, part=part, depth_factor=1.0, **rates)


def split_by_decay(
    model: nn.Module, names: Collection[str], settings: OptimiserSettings, **values: Any
) -> list[ParameterGroup]:
    """A group of the matrices among some parameters, and one of the others, in order of name.

    Args:
        values: the other fields of the groups.
    """
    embeddings = {id(weight) for weight in _embeddings(model)}
    decayed, plain = [], []
    for name, parameter in sorted(model.named_parameters()):
        if name in names:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else plain).append(name)
    both = ((decayed, settings.weight_decay), (plain, 0.0))
    return [
        ParameterGroup(names=tuple(some), weight_decay=decay, **values)
        for some, decay in both
        if some
    ]


def build_optimiser(
    model: nn.Module,
    settings: OptimiserSettings,
    groups: Sequence[ParameterGroup] | None = None,
) -> Optimizer:
    """AdamW over groups of a model's parameters.

    Args:
        groups: None is `first_groups`; without any, it waits for one that is built later.

    Raises:
        ColfolioError: the package that keeps the state in 8 bits is missing.
        RecipeError: nothing trains in the model, and no groups were given.
    """
    own = first_groups(model, settings) if groups is None else groups
    if not own and groups is None:
        raise RecipeError(
            "no parameter of the model trains: all are frozen; leave at least the projection open"
        )
    named = dict(model.named_parameters())
    options = [
        {
            "params": [named[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "part": group.part,
            "base_lr": group.base_lr,
            "opened": group.opened,
            "warmup": group.warmup,
            "depth_factor": group.depth_factor,
        }
        for group in own
    ] or [{"params": []}]
    if settings.state == "fp32":
        return AdamW(options, lr=settings.lr, betas=settings.betas, fused=True)
    package = _package(settings.state)
    if settings.state == "bitsandbytes_8bit":
        _keep_in_32_bits(package, [weight for weight in _embeddings(model) if weight.requires_grad])
    return package.optim.AdamW8bit(options, lr=settings.lr, betas=settings.betas)


def build_scaler(precision: SettledPrecision, device: torch.device) -> GradScaler:
    """What multiplies gradients on their way through fp16, where small ones would become 0.

    For other precisions it does nothing. It halves its scale when a gradient overflows, and doubles
    it after 2000 steps without (arXiv:1710.03740, section 3.2).
    """
    return GradScaler(device.type, enabled=precision == "fp16")


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The rate of what trains from the beginning, at a step counted from 0.

    >>> settings = OptimiserSettings(lr=1.0, warmup_steps=2)
    >>> [round(learning_rate(step, 4, settings), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rise = {"opened": 0, "warmup": settings.warmup_steps, "depth_factor": 1.0}
    return _rate({"base_lr": settings.lr} | rise, step, steps, settings)


def learning_rates(
    optimiser: Optimizer, step: int, steps: int, settings: OptimiserSettings
) -> list[float]:
    """The rate of each group at a step counted from 0."""
    return [_rate(group, step, steps, settings) for group in optimiser.param_groups]


def optimiser_step(
    model: nn.Module,
    optimiser: Optimizer,
    rates: float | Sequence[float],
    settings: OptimiserSettings,
    scaler: GradScaler | None = None,
) -> Tensor:
    """Clip, step, and clear the gradients; returns the gradient's norm before clipping.

    Args:
        rates: of all groups, or of each.
        scaler: that scaled the gradients. If it finds one that is not finite, neither is the norm,
            and the step is skipped.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if scaler is None or all(parameter.grad is None for parameter in trainable):
        scaler = GradScaler(enabled=False)  # an enabled one refuses a step without any gradient
    scaler.unscale_(optimiser)
    norm = whole(nn.utils.clip_grad_norm_(trainable, settings.clip_norm))
    groups = optimiser.param_groups
    each = rates if isinstance(rates, Sequence) else [rates] * len(groups)
    for group, rate in zip(groups, each, strict=True):
        if isinstance(group["lr"], Tensor):  # torchao compiles its step with it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    _keep_from_infinite(optimiser, norm, is_scaled=scaler.is_enabled())
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return norm


def _keep_from_infinite(optimiser: Optimizer, norm: Tensor, *, is_scaled: bool) -> None:
    """Let a step leave all weights as they are if the gradient's norm is not finite.

    What made it so can then be looked for in the weights that made it. A scaler does the same by
    itself; a step that is spread over ranks, or is not fused, knows no such thing.
    """
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    is_spread = any(isinstance(weight, DTensor) for weight in weights)
    if isinstance(optimiser, AdamW) and not is_scaled and not is_spread:
        optimiser.found_inf = (~norm.isfinite()).to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]


def check_scale(scaler: GradScaler) -> None:
    """Refuse to halve the scale of gradients further; to be asked after a step was skipped.

    It waits for the device.

    Raises:
        FloatingPointError: gradients are not finite even without scaling up.
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise FloatingPointError(
            f"gradients overflow fp16 at a loss scale of {2 * scaler.get_scale():g} already; train "
            "with precision bf16 or fp32"
        )


def _rate(group: dict[str, Any], step: int, steps: int, settings: OptimiserSettings) -> float:
    rate = group["base_lr"] * group["depth_factor"] * _schedule(step, steps, settings)
    risen = step - group["opened"]
    return rate * (risen + 1) / group["warmup"] if risen < group["warmup"] else rate


def _schedule(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The share of all rates: 1 as long as the run warms up, then a cosine to the final share."""
    if step < settings.warmup_steps:
        return 1.0
    share = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, share))) / 2
    return settings.final_lr_share + (1 - settings.final_lr_share) * cosine


def _embeddings(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def _package(state: str) -> Any:
    """The package that keeps a state in 8 bits."""
    name = state.removesuffix("_8bit")
    try:
        importlib.import_module(f"{name}.optim")
        return importlib.import_module(name)
    except ImportError as error:
        raise ColfolioError(
            f"optimiser.state {state} needs the package {name} ({error}): "
            f"pip install 'colfolio[{name}]'"
        ) from None


def _keep_in_32_bits(bitsandbytes: Any, weights: Sequence[Tensor]) -> None:
    """Embeddings, as the package advises: few of their rows have a gradient in a step."""
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for weight in weights:
        manager.override_config(weight, "optim_bits", 32)
        # it remembers by id, which another tensor may have later
        weakref.finalize(weight, manager.pid2config.pop, id(weight), None)
