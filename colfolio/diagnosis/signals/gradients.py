"""Gradients of a few batches: norm and dead share of each part, and how noisy a batch's is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from colfolio.batch import ContrastiveBatch
from colfolio.diagnosis.signals.trial_steps import copied_state
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings
from colfolio.training.part_norms import trained_parts
from colfolio.training.retrieval_objective import batch_backward


@dataclass(frozen=True, slots=True)
class PartGradient:
    """The gradient of what trains in a part.

    Args:
        norm: of all its numbers together.
        dead: share of its numbers that are exactly 0; of an embedding most are, for a batch has few
            of the tokens.
    """

    norm: float
    dead: float


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """How much the gradient of a batch differs from that of all data.

    Args:
        signal: squared norm of the mean gradient, |G|^2, without the noise in it.
        noise: variance of a batch's gradient, summed over its numbers.
        batches: noise over signal: so many batches like these, accumulated, have a mean gradient
            that is half noise. Infinite where no signal is found.
    """

    signal: float
    noise: float
    batches: float


@dataclass(frozen=True, slots=True)
class GradientSignals:
    """What the first gradients of a run say.

    Args:
        norm: of the first batch, all parts together.
        parts: of the first batch, by part.
        scale: over all batches; None of one.
        rows: queries of an optimiser step that the noise asks for, batches staying as large as they
            are: beyond it more rows bring little.
    """

    norm: float
    parts: Mapping[str, PartGradient]
    scale: NoiseScale | None
    rows: float | None


def gradient_signals(
    retriever: Retriever, settings: TrainSettings, batches: Sequence[ContrastiveBatch]
) -> GradientSignals:
    """Measure gradients on a copy of a model as it was loaded; it and its settings stay.

    Args:
        batches: as the run draws them, at least one; the noise is known the better the more.
    """
    state = copied_state(retriever, settings)
    sums: dict[str, Tensor] = {}
    squares: list[float] = []
    parts: dict[str, PartGradient] = {}
    for number, batch in enumerate(batches):
        batch_backward(state, batch, step=0, number=number)
        parts = parts or part_gradients(state.model)
        gradients = {
            name: weight.grad
            for name, weight in state.model.named_parameters()
            if weight.grad is not None
        }
        squares.append(_square(gradients.values()))
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        state.model.zero_grad(set_to_none=True)
    scale, rows = None, None
    if len(batches) > 1:
        scale = noise_scale(squares, _square(sums.values()) / len(batches) ** 2)
        rows = scale.batches * settings.batch.rows
    return GradientSignals(math.sqrt(squares[0]), parts, scale, rows)


def part_gradients(model: ProjectedBackbone) -> dict[str, PartGradient]:
    """Norm and dead share of the gradients that the parameters of each part have now.

    A parameter that trains and has no gradient is dead.
    """
    found = {}
    for part, parameters in trained_parts(model).items():
        gradients = [each.grad for each in parameters if each.grad is not None]
        alive = sum(int(gradient.count_nonzero()) for gradient in gradients)
        total = sum(each.numel() for each in parameters)
        found[part] = PartGradient(math.sqrt(_square(gradients)), 1 - alive / total)
    return found


def noise_scale(squares: Sequence[float], mean_square: float) -> NoiseScale:
    """The simple noise scale, tr(Sigma) / |G|^2 (McCandlish et al. 2018, arXiv:1812.06162, A.1).

    From two batch sizes, one batch and all of them together: with E|g|^2 = |G|^2 + tr(Sigma) / n
    for the mean g of n batches, both unknowns follow. Sizes are counted in batches, because a batch
    of another size has other candidates, and so another loss.

    Args:
        squares: squared norm of each batch's gradient, of two batches or more.
        mean_square: squared norm of their mean.
    """
    count, single = len(squares), fmean(squares)
    signal = (count * mean_square - single) / (count - 1)
    noise = (single - mean_square) / (1 - 1 / count)
    return NoiseScale(signal, noise, noise / signal if signal > 0 else math.inf)


def _square(gradients: Iterable[Tensor]) -> float:
    """Squared norm of all numbers, summed in float64."""
    return math.fsum(float(torch.sum(gradient.double() ** 2)) for gradient in gradients)
