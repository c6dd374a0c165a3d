"""Which layers keep their input alone and compute the rest again in backward (arXiv:1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

# "all" layers of both towers, or the first of every n
GradientCheckpointing = Literal["none", "all"] | Annotated[int, Field(ge=2)]
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_layers(
    backbone: Any, which: GradientCheckpointing, contexts: Contexts = noop_context_fn
) -> None:
    """Let these layers of a backbone be computed again in backward, and no others.

    A layer does so in training mode only, and never if nothing that it computes needs a gradient.
    Draws of torch's generators are replayed.

    Args:
        backbone: with `visual` and `language_model`, each counting its layers for itself.
        contexts: called when a layer runs; gives what to run it in, and what to run it in again.
            `RowDropouts.contexts` is one.

    Raises:
        ValueError: a tower has no layers that can.
    """
    again = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for name in ("visual", "language_model"):
        tower: nn.Module = getattr(backbone, name)
        layers: list[Any] = [
            each for each in tower.modules() if isinstance(each, GradientCheckpointingLayer)
        ]
        if not layers and which != "none":
            raise ValueError(f"{name} ({type(tower).__name__}) has no layers to checkpoint")
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = _is_chosen(number, which)
            layer._gradient_checkpointing_func = again


def _is_chosen(number: int, which: GradientCheckpointing) -> bool:
    if isinstance(which, int):
        return number % which == 0
    return which == "all"
