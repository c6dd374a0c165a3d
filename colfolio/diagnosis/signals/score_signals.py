"""What the scores of a batch say: margins, ranks, shifted labels, rounding, a histogram.

Letters: Q queries, D documents. Documents that are neither positive nor ignored are negatives; a
query without any positive takes no part. What is no number counts against the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_MOST_SHIFT = 3
_LEAST_SEEN = 3  # queries whose document at an offset is in the batch
_LEAD = 0.5  # of the spread
_BINS = 24

Histogram = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]]


def mean_margin(
    scores: Float[Tensor, "Q D"], positives: Bool[Tensor, "Q D"], ignored: Bool[Tensor, "Q D"]
) -> float:
    """The mean positive's score less the mean negative's, mean over queries that have both.

    NaN if there is none.
    """
    negatives = ~(positives | ignored)
    takes_part = positives.any(dim=1) & negatives.any(dim=1)
    margins = _mean_of(scores, positives) - _mean_of(scores, negatives)
    return float(margins[takes_part].mean())


def mean_rank(
    scores: Float[Tensor, "Q D"], positives: Bool[Tensor, "Q D"], ignored: Bool[Tensor, "Q D"]
) -> float:
    """Mean place of the weakest positive among the negatives, from 1; ties count against it."""
    takes_part = positives.any(dim=1)
    negatives = ~(positives | ignored)
    weakest = scores.masked_fill(~positives, math.inf).amin(dim=1, keepdim=True)
    before = negatives & ~(scores < weakest)
    return float(1 + before.sum(dim=1)[takes_part].double().mean())


def best_shift(
    scores: Float[Tensor, "Q D"],
    answering: Bool[Tensor, "Q D"],
    order: Int64[Tensor, " Q"],
    answers: Int64[Tensor, " Q"],
) -> tuple[int, float]:
    """The offset in the data set's order of the document that queries would rather have.

    For offset s a query looks at the document that the query s further on brought, unless it
    answers both. Queries whose neighbour is not in the batch say nothing of s, and an offset of
    which fewer than three queries say something is left out.

    Args:
        answering: documents that answer a query, masked or not, copies among them.
        order: where each query stands in the data set.
        answers: the column of the document that each query brought.

    Returns:
        The offset, not 0 unless none could be asked about, and the share of those queries that rank
        its document strictly first of all.
    """
    place_of = {int(number): place for place, number in enumerate(order)}
    first = _strictly_first(scores)
    shares: dict[int, float] = {}
    for size in range(1, _MOST_SHIFT + 1):
        for offset in (size, -size):
            seen = [
                first[query] == column
                for query, number in enumerate(order.tolist())
                if (other := place_of.get(number + offset)) is not None
                and not answering[query, column := int(answers[other])]
            ]
            if len(seen) >= _LEAST_SEEN:
                shares[offset] = sum(seen) / len(seen)
    if not shares:
        return 0, 0.0
    offset = max(shares, key=lambda each: shares[each])
    return offset, shares[offset]


def confident_share(
    scores: Float[Tensor, "Q D"], positives: Bool[Tensor, "Q D"], ignored: Bool[Tensor, "Q D"]
) -> float:
    """Share of queries whose first document is a negative that leads all others by far.

    By far is more than half of the standard deviation of the query's scores. Copies of an answer
    tie with it, so they are not in the lead.
    """
    takes_part = positives.any(dim=1)
    if scores.shape[1] < 2:
        return 0.0
    shown = scores.masked_fill(ignored, -math.inf)
    best, columns = shown.topk(2, dim=1)
    leads = best[:, 0] - best[:, 1] > _LEAD * scores.std(dim=1, correction=0)
    is_negative = ~positives.gather(1, columns[:, :1])[:, 0]
    return float((leads & is_negative)[takes_part].double().mean())


def distinct_share(scores: Float[Tensor, "Q D"]) -> float:
    """Share of the scores that no other score equals; what is no number equals all."""
    _, counts = scores[~scores.isnan()].unique(return_counts=True)
    return float((counts == 1).sum() / max(scores.numel(), 1))


def score_error(scores: Float[Tensor, "Q D"], exact: Float[Tensor, "Q D"], spread: float) -> float:
    """The largest difference of a score from the exact one, over the spread; 0 without a spread.

    NaN where scores are no numbers.
    """
    if spread == 0:
        return 0.0
    return float((scores.double() - exact.double()).abs().max()) / spread


def score_histogram(
    scores: Float[Tensor, "Q D"], positives: Bool[Tensor, "Q D"], ignored: Bool[Tensor, "Q D"]
) -> Histogram:
    """Counts of positives and of negatives in equal bins, and the ends of all bins.

    Scores that are no finite numbers are left out.
    """
    takes_part = positives.any(dim=1, keepdim=True)
    negatives = ~(positives | ignored) & takes_part
    sides = [scores[which & scores.isfinite()].double().cpu() for which in (positives, negatives)]
    together = torch.cat(sides)
    if not len(together):
        return ((), ()), (0.0, 0.0)
    low, high = float(together.min()), float(together.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    of_positives, of_negatives = (_counts(side, low, high) for side in sides)
    return (of_positives, of_negatives), (low, high)


def _counts(scores: Tensor, low: float, high: float) -> tuple[int, ...]:
    bins = ((scores - low) / (high - low) * _BINS).long().clamp(0, _BINS - 1)
    return tuple(torch.bincount(bins, minlength=_BINS).tolist())


def _strictly_first(scores: Tensor) -> Sequence[int]:
    """The column of each row's greatest score; -1 where two share it or it is no number."""
    best, columns = scores.max(dim=1)
    is_alone = (scores == best[:, None]).sum(dim=1) == 1
    return torch.where(is_alone, columns, -1).tolist()


def _mean_of(scores: Tensor, chosen: Tensor) -> Tensor:
    return scores.double().masked_fill(~chosen, 0).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
