"""Layers of a model with an adapter: merged, set back, dropped; and the base's weights in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colfolio.models.linear import FastLinear

_ASIDE = "adapted"
_BASE = "base_layer"  # of peft's layers
_SIDES = frozenset({"lora_A", "lora_B", "lora_dropout"})
_KEPT = {"base_weight": "weight", "base_bias": "bias"}


class TrainedProjection(nn.Linear):
    """A projection that is trained wholly beside adapters, and keeps what it is in the base.

    What was trained in a wider dtype than the base has stays in it, as matrices of adapters do.
    """

    base_weight: Tensor
    base_bias: Tensor

    def __init__(self, base: nn.Linear, weight: Tensor, bias: Tensor) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        like = base.weight
        dtype = torch.promote_types(like.dtype, weight.dtype)
        self.weight = nn.Parameter(weight.detach().to(like.device, dtype, copy=True))
        self.bias = nn.Parameter(bias.detach().to(like.device, dtype, copy=True))
        self.register_buffer("base_weight", like.detach())
        self.register_buffer("base_bias", base.bias.detach())

    def base(self) -> nn.Linear:
        """The projection of the base."""
        return _linear(self.base_weight, self.base_bias)

    def alone(self) -> nn.Linear:
        """A plain layer of the same parameters, in the dtype of the base."""
        for parameter in (self.weight, self.bias):
            parameter.data = parameter.data.to(self.base_weight.dtype)
        return _linear(self.weight, self.bias)


class MergedLinear(FastLinear):
    """A layer and its adapter as one product; the layer itself is set aside, not changed."""

    def __init__(self, adapted: Any) -> None:
        super().__init__(adapted.in_features, adapted.out_features, device="meta")
        weight, bias = merged_weight(adapted), adapted.bias
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.bias = bias
        self.adapted = adapted


def merged_weight(adapted: Any) -> Tensor:
    """`W + scale * B A`, summed in float32 at least and rounded once to the dtype of W."""
    weight = adapted.weight.detach()
    if isinstance(adapted, TrainedProjection):
        return weight.to(adapted.base_weight.dtype, copy=True)
    (name,) = adapted.lora_A
    sides = [adapted.lora_B[name].weight.detach(), adapted.lora_A[name].weight.detach()]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for side in sides:
        dtype = torch.promote_types(dtype, side.dtype)
    product = sides[0].to(dtype) @ sides[1].to(dtype)
    return torch.add(weight.to(dtype), product, alpha=adapted.scaling[name]).to(weight.dtype)


@torch.no_grad()
def fold_all(root: nn.Module) -> None:
    """Leave the plain layers alone, with the adapters in their weights."""
    for name, module in _adapted(root):
        weight = merged_weight(module)
        plain = _plain(module)
        if isinstance(module, TrainedProjection):
            plain.bias.copy_(module.bias)
        plain.weight.copy_(weight)
        _put(root, name, plain)


@torch.no_grad()
def fold_some(root: nn.Module, names: Collection[str]) -> None:
    """Leave some adapted layers alone with the adapters in their weights, which stay parameters.

    Where no adapter is left, the trained projection becomes a plain layer of the same parameters.
    """
    for name, module in _adapted(root):
        if name in names:
            plain = _plain(module)
            plain.weight.copy_(merged_weight(module))
            _put(root, name, plain)
    rest = _adapted(root)
    for name, module in rest:
        if not any(is_lora_layer(each) for _, each in rest):
            _put(root, name, module.alone())


def merge_all(root: nn.Module) -> None:
    """Put a merged layer into the place of each adapted one."""
    for name, module in _adapted(root):
        _put(root, name, MergedLinear(module))


def unmerge_all(root: nn.Module) -> int:
    """Put back the layers that were set aside; returns how many."""
    merged = [(name, each) for name, each in root.named_modules() if isinstance(each, MergedLinear)]
    for name, module in merged:
        _put(root, name, module.adapted)
    return len(merged)


def drop_all(root: nn.Module) -> None:
    """Leave the plain layers alone, as they are in the base."""
    unmerge_all(root)
    for name, module in _adapted(root):
        _put(root, name, _plain(module))


def is_adapted(root: nn.Module) -> bool:
    """Whether any layer has an adapter, merged or not."""
    return any(is_lora_layer(module) for module in root.modules())


def is_lora_layer(module: nn.Module) -> bool:
    """Whether it is one of peft's; asked without importing peft, which may be missing."""
    return hasattr(module, "lora_A") and hasattr(module, _BASE)


def is_set_aside(name: str) -> bool:
    """Whether a module of this path, or one that it is in, has been merged."""
    return _ASIDE in name.split(".")


def base_weights(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state without its adapter, by the names of a model that never had one.

    Of merged layers it is the merged weight.
    """
    plain: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in named.items():
        parts = [part for part in name.split(".") if part != _BASE]
        if is_set_aside(name) or _SIDES.intersection(parts):
            continue
        if parts[-1] in _KEPT:
            kept[".".join([*parts[:-1], _KEPT[parts[-1]]])] = tensor
        else:
            plain[".".join(parts)] = tensor
    return plain | kept


def _adapted(root: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in root.named_modules()
        if (is_lora_layer(module) or isinstance(module, TrainedProjection))
        and not is_set_aside(name)
    ]


def _plain(module: Any) -> nn.Linear:
    """The layer without its adapter, as it is in the base."""
    return module.base() if isinstance(module, TrainedProjection) else module.base_layer


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    path, _, child = name.rpartition(".")
    module.train(root.get_submodule(name).training)
    setattr(root.get_submodule(path), child, module)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Of these tensors; those that are parameters stay the same objects."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(linear, name, tensor if is_parameter else nn.Parameter(tensor))
    return linear
