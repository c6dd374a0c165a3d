"""Inner products of all vectors of two sides, by the faster of the two products that torch has."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

# Multiplications from which oneDNN's start, a fifth of a millisecond for a shape not seen before,
# is worth it: batches are ragged, so most shapes are new.
_WORTH_ONEDNN = 1 << 25


def inner_products(
    left: Float[Tensor, "left dim"], right: Float[Tensor, "right dim"]
) -> Float[Tensor, "left right"]:
    """Equal to `left @ right.T` up to rounding; it has no gradient of its own."""
    return _onednn_product(left, right) if is_faster(left, right) else left @ right.T


def is_faster(left: Float[Tensor, "left dim"], right: Float[Tensor, "right dim"]) -> bool:
    """Whether `inner_products` takes another product than `@` does."""
    is_worth_it = left.numel() * len(right) >= _WORTH_ONEDNN
    is_plain = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return is_worth_it and is_plain and _has_onednn()


@cache
def _has_onednn() -> bool:
    """Whether torch's private call of oneDNN is there and computes what `mm` does.

    `mm` on the CPU is MKL's, which reaches less than half of an AMD processor's speed, and oneDNN's
    product most of it. torch hands float32 to oneDNN only through this private call, so it can
    change or go with any release; `mm` is then what is left.
    """
    left, right = torch.arange(-12.0, 12.0).view(6, 4), torch.linspace(-1, 1, 20).view(5, 4)
    try:
        found = _onednn_product(left, right)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return found.shape == (6, 5) and torch.allclose(found, left @ right.T, rtol=1e-5, atol=1e-5)


def _onednn_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
