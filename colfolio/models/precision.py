"""In which precision a model computes: bf16 where the machine does that natively, else its own."""

from __future__ import annotations

from typing import Literal

import torch

SettledPrecision = Literal["fp32", "bf16", "fp16"]
Precision = Literal["auto", SettledPrecision]

_DTYPES: dict[SettledPrecision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(
    precision: Precision, device: torch.device, *, keeps_copies: bool = True
) -> torch.autocast:
    """A context in which products of matrices run in the wished precision.

    Args:
        precision: `auto` is bf16 where the machine computes it natively, and the weights' own dtype
            elsewhere, as `fp32` is everywhere. fp16 is never chosen unasked: its range is narrow,
            and training in it needs a scaled loss.
        device: of the model.
        keeps_copies: of weights that train, for their next use, until the outermost such context
            ends.
    """
    settled = settled_precision(precision, device)
    if settled == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=_DTYPES[settled], cache_enabled=keeps_copies)


def settled_precision(precision: Precision, device: torch.device) -> SettledPrecision:
    """What a wish comes to on a device."""
    if precision == "auto":
        return "bf16" if _computes_bf16(device) else "fp32"
    return precision


def product_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of products of matrices under `autocast`, for weights of float32."""
    return _DTYPES[settled_precision(precision, device)]


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # without these instructions bf16 on a CPU is slower than fp32
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
