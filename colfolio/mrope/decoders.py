"""Finds a model's rotary text decoder, and how its rotary embedding lays frequencies out.

Letters: F frequencies, D columns of cos and sin.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FITTING = "LlamaModel, MistralModel, Qwen2Model, Qwen3Model or SmolLM3Model"

# how a rotary embedding lays its F frequencies out over D columns
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda axes: axes.repeat(2),  # D = 2 F, behind one another: Llama
    "pairs": lambda axes: axes.repeat_interleave(2),  # D = 2 F, side by side: Cohere
    "single": lambda axes: axes,  # D = F: gpt-oss
}


def decoder_of(model: nn.Module) -> Any:
    """The one module with children `rotary_emb` and `layers` that takes position ids.

    Raises:
        ValueError: there is none, or there are several; says what was found and what fits.
    """
    found = {name: part for name, part in model.named_modules() if _is_decoder(part)}
    if len(found) > 1:
        # towers of images and sound may look alike, but embed no tokens
        texts = {name: part for name, part in found.items() if "embed_tokens" in _children(part)}
        found = texts or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        parts = ", ".join(f"{name or 'itself'} ({class_of(part)})" for name, part in found.items())
        raise ValueError(
            f"{class_of(model)} holds {len(found)} decoders: {parts}; pass the one that is meant"
        )
    learned = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
    ]
    reason = f"it has learned positions ({', '.join(learned)}), and " if learned else ""
    raise ValueError(
        f"{class_of(model)} cannot be grafted: {reason}no module of it has children rotary_emb and "
        f"layers, a config, and a forward with position_ids; what fits is {FITTING}, or a model "
        "that holds one such decoder"
    )


def probed(decoder: Any) -> tuple[int, str]:
    """F of the decoder's rotary embedding, and its layout, from what it returns for a few ids.

    Raises:
        ValueError: it returns no cosines and sines, holds weights, or differs between layers.
    """
    # a copy, for some change their frequencies with the positions they see
    rotary = copy.deepcopy(decoder.rotary_emb)
    if rotary.state_dict():
        raise ValueError(
            f"{class_of(rotary)} of {class_of(decoder)} saves {', '.join(rotary.state_dict())}; a "
            "graft would rename what checkpoints hold, so frequencies must not be learned or saved"
        )
    found = {kind: _probed_layout(decoder, rotary, kind) for kind in _layer_types(rotary)}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{kind}: {size} ({layout})" for kind, (size, layout) in found.items())
        raise ValueError(
            f"{class_of(decoder)} turns other frequencies in other layers, so one choice of "
            f"sections cannot fit all: {told}"
        )
    return next(iter(found.values()))


def parameters_of(part: nn.Module) -> list[str]:
    """Names of a forward's arguments."""
    return list(inspect.signature(part.forward).parameters)


def class_of(part: nn.Module) -> str:
    """The name of a module's class, as messages give it."""
    return type(part).__name__


def _is_decoder(part: nn.Module) -> bool:
    # children by name, not attributes: wrappers such as those of peft pass attributes on
    return (
        {"rotary_emb", "layers"} <= _children(part)
        and hasattr(part, "config")
        and "position_ids" in parameters_of(part)
    )


def _probed_layout(
    decoder: nn.Module, rotary: nn.Module, layer_type: str | None
) -> tuple[int, str]:
    tensors = [*rotary.buffers(), *rotary.parameters()]
    device = tensors[0].device if tensors else torch.device("cpu")
    positions = torch.arange(4, device=device)[None]  # [1, 4]
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    told = f"{class_of(rotary)} of {class_of(decoder)} cannot be grafted"
    try:
        turned = rotary(torch.zeros(1, 4, 1, device=device), positions, **kwargs)
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{told}: called as (x, position_ids), it raises {type(error).__name__}: {error}"
        ) from error
    parts = turned if isinstance(turned, tuple) else (turned,)
    shapes = {tuple(part.shape[:-1]) for part in parts}
    if len(parts) != 2 or shapes != {(1, 4)} or any(part.is_complex() for part in parts):
        seen = ", ".join(f"{list(part.shape)} ({part.dtype})" for part in parts)
        raise ValueError(
            f"{told}: for position ids [1, 4] it must return cos and sin, each [1, 4, columns], "
            f"but returns {seen}"
        )
    if device.type == "meta":
        raise ValueError(f"{told}: it is on the meta device; load the weights first")
    return _layout_of(*parts)


def _layout_of(cos: Tensor, sin: Tensor) -> tuple[int, str]:
    """F and the layout by which columns repeat."""
    half = cos.shape[-1] // 2
    for layout in ("halves", "pairs") if cos.shape[-1] == 2 * half else ():
        columns = LAYOUTS[layout](torch.arange(half, device=cos.device))  # [D]
        first = (columns[:, None] == columns).int().argmax(dim=0)  # [D], where each one began
        if all(torch.equal(part, part[..., first]) for part in (cos, sin)):
            return half, layout
    return cos.shape[-1], "single"


def _layer_types(rotary: Any) -> list[str | None]:
    """The kinds of layers that it turns in different ways, or None alone."""
    if "layer_type" not in parameters_of(rotary):
        return [None]
    # kinds of layers without rotation are not in `rope_type`
    kinds = rotary.rope_type if isinstance(rotary.rope_type, Mapping) else rotary.layer_types
    return list(kinds)


def _children(part: nn.Module) -> set[str]:
    return {name for name, _ in part.named_children()}
