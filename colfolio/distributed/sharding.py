"""A model spread over the ranks (FSDP2, arXiv:2304.11277), and its state made whole again.

Each rank holds a slice of every parameter, of its gradient and of its optimiser state. A unit of
the model is gathered before it computes and let go of after, forward and backward; its gradient
goes to the slices' owners, added up over ranks, at the end of each backward.

Every rank must run the same units equally often and in the same order, because gathering waits for
all: a rank without rows runs a row of its own with a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from colfolio.distributed.world import World


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    world: World,
    *,
    methods: Sequence[str] = (),
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Spread a model's parameters over all ranks, in place; of a world of one it stays as it is.

    To be called before the optimiser is built: the parameters are other objects afterwards.
    Gradients are sums over ranks, not means.

    Args:
        units: modules that are gathered one at a time, inner ones before outer ones. Together they
            hold every parameter, and each is run by calling it, tensors in and tensors out: that
            is how backward knows when to gather it again.
        methods: of the model beside `forward`, that run units.
        compute_dtype: what units are gathered in, where the model runs under autocast of that
            dtype; parameters and their gradients stay as they are. Gathered wider, each weight
            would leave its narrow copy in the graph, and every rank would hold the whole model.

    Raises:
        ValueError: a parameter belongs to no unit.
    """
    if world.size == 1:
        return
    _check_units(model, units)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*units, model):
        fully_shard(module, mesh=mesh, mp_policy=_precision(module, compute_dtype))
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        # else the factor is multiplied in on the way, which gloo cannot
        module.set_force_sum_reduction_for_comms(True)
    for name in methods:
        register_fsdp_forward_method(model, name)


def _check_units(model: nn.Module, units: Sequence[nn.Module]) -> None:
    held = {id(parameter) for unit in units for parameter in unit.parameters()}
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    if left:
        raise ValueError(f"every parameter must belong to a unit, but these do not: {left[:20]}")


def _precision(module: nn.Module, compute_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """As autocast has it: embeddings stay wide, and with them what layers add to one another."""
    if compute_dtype is None or isinstance(module, nn.Embedding):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over ranks, put together on each; any other as it is.

    All ranks call it: for the norm of a gradient, say, of which each has its part.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: Any) -> Any:
    """A state dict with every spread tensor put together on the CPU of rank 0, and None elsewhere.

    What is not spread is as it was, so a checkpoint says nothing of the ranks that wrote it. All
    ranks call it; one tensor at a time is whole on a device.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor().detach()
        return tensor.cpu() if state.device_mesh.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value) for value in state)
    return state


def place_optimiser_state(optimiser: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state dict as `optimiser.load_state_dict` takes it, spread like its parameters.

    Args:
        state: of an optimiser over the same parameters in the same groups, at any number of ranks.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))  # load_state_dict refuses others
    spread = {
        number: {name: _spread_like(by_number.get(number), value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": spread}


def _spread_like(parameter: nn.Parameter | None, value: Any) -> Any:
    """This rank's slice of a value, if its parameter is sliced and it has the same shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value
    # every rank has read the whole value, so nothing travels
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
