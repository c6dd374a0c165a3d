"""AdamW with warm-up and cosine decay, weight decay on matrices only, and a clipped gradient."""

from __future__ import annotations

import importlib
import math
import weakref
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
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

    lr: float = Field(default=5e-4, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    state: Literal["fp32", "torchao_8bit", "bitsandbytes_8bit"] = "fp32"


def build_optimiser(model: nn.Module, settings: OptimiserSettings) -> Optimizer:
    """AdamW over the trainable parameters of a model, in order of name.

    Raises:
        ColfolioError: the package that keeps the state in 8 bits is missing.
        RecipeError: no parameter is trainable.
    """
    embeddings = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad
    }
    decayed, plain = [], []
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else plain).append(parameter)
    if not decayed and not plain:
        raise RecipeError(
            "no parameter of the model trains: all are frozen; leave at least the projection open"
        )
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if settings.state == "fp32":
        return AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
    package = _package(settings.state)
    if settings.state == "bitsandbytes_8bit":
        _keep_in_32_bits(package, list(embeddings.values()))
    return package.optim.AdamW8bit(groups, lr=settings.lr, betas=settings.betas)


def build_scaler(precision: SettledPrecision, device: torch.device) -> GradScaler:
    """What multiplies gradients on their way through fp16, where small ones would become 0.

    For other precisions it does nothing. It halves its scale when a gradient overflows, and doubles
    it after 2000 steps without (arXiv:1710.03740, section 3.2).
    """
    return GradScaler(device.type, enabled=precision == "fp16")


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The rate of a step counted from 0: linear warm-up, then a cosine down to the final share.

    >>> settings = OptimiserSettings(lr=1.0, warmup_steps=2)
    >>> [round(learning_rate(step, 4, settings), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, share))) / 2
    return settings.lr * (settings.final_lr_share + (1 - settings.final_lr_share) * cosine)


def optimiser_step(
    model: nn.Module,
    optimiser: Optimizer,
    rate: float,
    settings: OptimiserSettings,
    scaler: GradScaler | None = None,
) -> Tensor:
    """Clip, step, and clear the gradients; returns the gradient's norm before clipping.

    Args:
        scaler: that scaled the gradients. If it finds one that is not finite, neither is the norm,
            and the step is skipped.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if scaler is None or all(parameter.grad is None for parameter in trainable):
        scaler = GradScaler(enabled=False)  # an enabled one refuses a step without any gradient
    scaler.unscale_(optimiser)
    norm = whole(nn.utils.clip_grad_norm_(trainable, settings.clip_norm))
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step with it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return norm


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


def _keep_in_32_bits(bitsandbytes: Any, weights: list[Tensor]) -> None:
    """Embeddings, as the package advises: few of their rows have a gradient in a step."""
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for weight in weights:
        manager.override_config(weight, "optim_bits", 32)
        # it remembers by id, which another tensor may have later
        weakref.finalize(weight, manager.pid2config.pop, id(weight), None)
