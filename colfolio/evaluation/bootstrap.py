"""Percentile bootstrap over queries: how far a mean could lie with other queries of the same kind.

Queries are drawn again, documents are not: the interval says nothing about another collection.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

_DRAWN_AT_ONCE = 1 << 22


def bootstrap_interval(
    values: Float64[Tensor, "queries metrics"],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Float64[Tensor, " metrics"], Float64[Tensor, " metrics"]]:
    """Lower and upper end of the interval of each column's mean (Efron 1979, percentile method).

    All columns share the resamples, so that intervals of two metrics can be compared.
    """
    if len(values) == 0 or num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "a bootstrap needs a query, a resample and a confidence between 0 and 1, "
            f"got {len(values)} queries, {num_resamples} resamples, confidence {confidence}"
        )
    generator = torch.Generator().manual_seed(seed)
    means, num_queries = [], len(values)
    step = max(1, _DRAWN_AT_ONCE // num_queries)
    for first in range(0, num_resamples, step):
        size = (min(step, num_resamples - first), num_queries)
        drawn = torch.randint(num_queries, size, generator=generator)
        times = torch.zeros(size, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(size, dtype=torch.float64)
        )
        means.append(times @ values / num_queries)  # [resamples, metrics]
    tail = (1 - confidence) / 2
    quantiles = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.cat(means).quantile(quantiles, dim=0)
    return low, high
