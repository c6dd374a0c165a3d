"""A model that is spread over ranks, put together again on each: to be changed, and spread anew.

FSDP2 settles what a unit holds, and in which dtype its gradients travel, when it is made. So a part
that opens, or an adapter that leaves, needs new units.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from colfolio.distributed import whole

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def blank_copy(model: AnyModel) -> AnyModel:
    """The same modules with parameters on the meta device; what is no module is shared."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        twin = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        memo[id(parameter)] = twin
    blank = copy.copy(model)
    blank._modules = {name: copy.deepcopy(each, memo) for name, each in model._modules.items()}
    return blank


@torch.no_grad()
def put_together(spread: nn.Module, blank: AnyModel) -> AnyModel:
    """A blank copy with the weights of a spread model, whole on each rank; all ranks call it.

    Args:
        blank: of the model before it was spread; it is filled.
    """
    named = dict(spread.named_parameters(remove_duplicate=False))
    filled: dict[int, nn.Parameter] = {}  # one for all places that share it
    for name, twin in list(blank.named_parameters(remove_duplicate=False)):
        if id(twin) not in filled:
            own = named[name]
            filled[id(twin)] = nn.Parameter(whole(own.detach()), own.requires_grad)
        path, _, last = name.rpartition(".")
        setattr(blank.get_submodule(path), last, filled[id(twin)])
    return blank
