"""Linear layers that multiply by the faster of the two products that torch has on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from colfolio.maxsim.product import inner_products, is_faster


class FastLinear(nn.Linear):
    """`nn.Linear`, and equal to it up to rounding; in float32 on a CPU its products are oneDNN's.

    Autocast, other dtypes, other devices and small inputs go the usual way.
    """

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """The weighted sums of the features of each row, and the bias."""
        return linear(input, self.weight, self.bias)


def linear(
    input: Float[Tensor, "*rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """`F.linear` by the faster product."""
    rows = input.flatten(0, -2)
    if torch.is_autocast_enabled(input.device.type) or not is_faster(rows, weight):
        return F.linear(input, weight, bias)
    products = _Products.apply(rows, weight)
    assert isinstance(products, Tensor)
    out = products.unflatten(0, input.shape[:-1])
    return out if bias is None else out + bias


def speed_up_linears(model: nn.Module) -> None:
    """Let every `nn.Linear` of a model be a `FastLinear`; names and weights stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


class _Products(torch.autograd.Function):
    """`rows @ weight.T`, and the two products of its gradient."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return inner_products(rows, weight)

    @staticmethod
    def backward(ctx, *gradients):
        return _gradients(ctx, *gradients)


@once_differentiable
def _gradients(ctx, gradient):
    rows, weight = ctx.saved_tensors
    wants_rows, wants_weight = ctx.needs_input_grad
    for_rows = inner_products(gradient, weight.T) if wants_rows else None
    for_weight = inner_products(gradient.T, rows.T) if wants_weight else None
    return for_rows, for_weight
