"""In which precision a model computes: bf16 where the machine does that natively, else its own."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which products of matrices run in the wished precision.

    Args:
        precision: `auto` is bf16 where the machine computes it natively, and the weights' own dtype
            elsewhere, as `fp32` is everywhere.
        device: of the model.
    """
    is_bf16 = settled_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16)


def settled_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What a wish comes to on a device."""
    if precision == "auto":
        return "bf16" if _computes_bf16(device) else "fp32"
    return precision


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # without these instructions bf16 on a CPU is slower than fp32
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
