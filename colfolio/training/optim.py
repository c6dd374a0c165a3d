"""AdamW with warm-up and cosine decay, weight decay on matrices only, and a clipped gradient."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.optim import AdamW

from colfolio.config import Settings

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
    """

    lr: float = Field(default=5e-4, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)


def build_optimiser(model: nn.Module, settings: OptimiserSettings) -> AdamW:
    """AdamW over the trainable parameters of a model, in order of name."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    decayed, plain = [], []
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


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
    model: nn.Module, optimiser: AdamW, rate: float, settings: OptimiserSettings
) -> torch.Tensor:
    """Clip, step, and clear the gradients; returns the gradient's norm before clipping."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = nn.utils.clip_grad_norm_(trainable, settings.clip_norm)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm
