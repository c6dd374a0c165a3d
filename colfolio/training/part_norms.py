"""What a step does to each part of the model: its gradient's norm and zeros, its update's size.

The size of an update is the norm of the change over the norm of the weights before it. Both are
measured, on copies taken before the step, whatever the optimiser keeps and however it rounds. Of a
part of up to a million weights all are copied; of a larger one every n-th, so that no second copy
of the model is held. The norm over k sampled weights is that of all to a relative error of about
1 / sqrt(k), a thousandth here, unless few of the weights change at all, as in an embedding. Zeros
of a gradient are counted at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from colfolio.distributed import World
from colfolio.models.parts import inventory
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.selectors import PARTS
from colfolio.training.step_report import PartReport

_MOST_SAMPLED = 2**20  # weights of a part


@dataclass(frozen=True, slots=True)
class BeforeStep:
    """What is kept of each part until its step is done: its gradient's norm and zeros, weights."""

    gradients: list[Float[Tensor, ""]]
    zeros: list[Float[Tensor, ""]]
    weights: list[Float[Tensor, " _sampled"]]


class PartNorms:
    """Measures the steps of parameters, part by part; nothing in it waits for a device.

    Args:
        parts: the parameters that train of each part, from the lowest part to the highest.
        partners: the ranks over which each parameter is spread, if it is.
    """

    def __init__(
        self, parts: Mapping[str, Sequence[nn.Parameter]], partners: World | None = None
    ) -> None:
        self._parts = parts
        self._partners = partners or World()

    def before_step(self, scale: Float[Tensor, ""]) -> BeforeStep:
        """To be called once the gradients are whole, before they are clipped.

        Args:
            scale: that the gradients are multiplied by.
        """
        of_parts = list(self._parts.values())
        gradients = [_gradient_norm(parameters) / scale for parameters in of_parts]
        zeros = list(map(_zeros, of_parts))
        return BeforeStep(gradients, zeros, list(map(_sampled, of_parts)))

    def after_step(self, before: BeforeStep) -> Float[Tensor, "parts 3"]:
        """Norm of the gradient, update ratio, and share of the gradient that is 0, of each part."""
        measured = [
            torch.stack(
                [gradient, *_change(weights, _sampled(parameters)), *_counts(zeros, weights)]
            )
            for gradient, zeros, weights, parameters in zip(
                before.gradients, before.zeros, before.weights, self._parts.values(), strict=True
            )
        ]
        of_ranks = self._partners.gather_rows(torch.stack(measured)[None], "own")
        gradient, change, weight = torch.linalg.vector_norm(of_ranks[..., :3], dim=0).unbind(dim=1)
        zeros, counted = of_ranks[..., 3:].sum(dim=0).unbind(dim=1)
        ratio = (change / weight).masked_fill(weight == 0, 0)
        return torch.stack([gradient, ratio, zeros / counted], dim=1)

    def reports(self, numbers: Sequence[float], optimiser: Optimizer) -> dict[str, PartReport]:
        """The report of each part, from all numbers of `after_step` behind one another."""
        rates = {
            id(parameter): float(group["lr"])
            for group in optimiser.param_groups
            for parameter in group["params"]
        }
        return {
            name: PartReport(
                lr=max(rates[id(parameter)] for parameter in parameters),
                gradient_norm=gradient,
                update_ratio=ratio,
                trains=sum(parameter.numel() for parameter in parameters),
                lr_least=min(rates[id(parameter)] for parameter in parameters),
                dead=dead,
            )
            for (name, parameters), gradient, ratio, dead in zip(
                self._parts.items(), numbers[::3], numbers[1::3], numbers[2::3], strict=True
            )
        }


def trained_parts(model: ProjectedBackbone) -> dict[str, list[nn.Parameter]]:
    """The parameters that train now, by part, from the lowest part to the highest."""
    places = inventory(model).places
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[places[name].part].append(parameter)
    return {part: parameters for part, parameters in parts.items() if parameters}


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """Of this rank's share; 0 where nothing has a gradient."""
    gradients = [_own(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    return nn.utils.get_total_norm(gradients)


def _zeros(parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """How many of the sampled places of this rank's share have a gradient of 0, or none."""
    every = _stride(parameters)
    zeros = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        place = _own(parameter if parameter.grad is None else parameter.grad)
        sampled = place.detach().flatten()[::every]
        zeros += sampled.numel() if parameter.grad is None else (sampled == 0).sum()
    return zeros


def _counts(zeros: Float[Tensor, ""], weights: Float[Tensor, " sampled"]) -> list[Tensor]:
    """Zeros, and the places that they were counted at."""
    return [zeros, torch.full_like(zeros, weights.numel())]


def _sampled(parameters: Sequence[nn.Parameter]) -> Float[Tensor, " sampled"]:
    """A copy of every n-th weight of this rank's share."""
    every = _stride(parameters)
    rows = [_own(parameter.detach()).flatten()[::every] for parameter in parameters]
    return torch.cat(rows)


def _stride(parameters: Sequence[nn.Parameter]) -> int:
    """Every how many of a part's weights are sampled."""
    size = sum(parameter.numel() for parameter in parameters)
    # odd, lest rows of even length always give the same columns
    return 1 if size <= _MOST_SAMPLED else -(-size // _MOST_SAMPLED) | 1


def _change(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of the change, and of the weights before it."""
    return torch.linalg.vector_norm(after.sub_(before)), torch.linalg.vector_norm(before)


def _own(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
