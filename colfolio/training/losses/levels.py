"""What a loss is when scores say nothing (chance), and the least it can be (floor).

Letters: as in `formulas`; scores of a query lie in [low, high], and w = (high - low) / T.

    loss          chance                                   floor, one positive
    info_nce      ln(N + 1)                                ln(1 + N e^-w)
    pairwise      ln 2                                     ln(1 + e^-w)
    sigmoid       P ln((P + N) / P) + N ln((P + N) / N)    P softplus(-high / T - bias)
                                                           + N softplus(low / T + bias)
    distillation  ln C - entropy of the teacher            0, unless the teacher's scores of a
                                                           query lie further apart than w T
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from colfolio.training.losses.formulas import (
    LossSettings,
    loss_of_scores,
    teacher_shares,
)

ScoreRange = tuple[float, float] | Float[Tensor, "queries 2"]
_HALVINGS = 30


def maxsim_range(lengths: Int64[Tensor, " queries"]) -> Float[Tensor, "queries 2"]:
    """The range of MaxSim between unit vectors, summed over a query's so many vectors: [-n, n]."""
    return torch.stack([-lengths, lengths], dim=1).to(torch.float32)


def chance_level(
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    settings: LossSettings,
    teacher: Float[Tensor, "queries documents"] | None = None,
) -> Float[Tensor, ""]:
    """The least that a loss can be while all scores are equal.

    InfoNCE: each positive has a share of 1 / (N + 1) beside N equal negatives; with `symmetric` the
    mean of both directions. Pairwise: softplus(0). Neither depends on the equal score, nor does
    distillation: the student's softmax is 1 / C, so that KL = sum of t ln(t C).

    Sigmoid does: with logit x everywhere it is P softplus(-x) + N softplus(x), whose derivative
    N sigmoid(x) - P sigmoid(-x) is 0 at x = ln(P / N), P and N counted over the batch. There it is
    the entropy of "is this pair a positive?". A loss above it tells of a bias that does not fit.
    """
    if settings.kind == "distillation":
        equal = torch.zeros(positives.shape, device=positives.device)
        return loss_of_scores(equal, positives, ignored, settings, teacher)
    negatives = ~(positives | ignored)
    if settings.kind == "pairwise":
        return torch.full((), math.log(2), device=positives.device)
    if settings.kind == "sigmoid":
        wanted, refused = positives.sum().float(), negatives.sum().float()
        share = wanted / (wanted + refused)
        entropy = -torch.special.xlogy(wanted, share) - torch.special.xlogy(refused, 1 - share)
        return entropy / positives.any(dim=1).sum()
    chance = _ln_candidates(positives, negatives)
    if settings.symmetric:
        chance = (chance + _ln_candidates(positives.T, negatives.T)) / 2
    return chance


def floor_level(
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    settings: LossSettings,
    score_range: ScoreRange,
    teacher: Float[Tensor, "queries documents"] | None = None,
) -> Float[Tensor, ""]:
    """The least that a loss can be while the scores of each query stay in their range.

    InfoNCE, pairwise and sigmoid never rise with a positive's score and never fall with a
    negative's, so they are least with every positive at the upper end and every negative at the
    lower, which free scores can reach. Vectors may not: a document at the upper end for one query
    cannot be at the lower end for all others that resemble it.

    Distillation: see `_closest`.

    Args:
        score_range: lower and upper end, for all queries or for each; `maxsim_range` gives those of
            MaxSim. Scores outside of it can take the loss below the floor.
    """
    low, high = _ends(score_range, len(positives), positives.device)
    if teacher is None:
        best = torch.where(positives, high, low)
    else:
        best = _closest(teacher, ignored, low, high, settings.temperature)
    return loss_of_scores(best, positives, ignored, settings, teacher)


def _ends(
    score_range: ScoreRange, queries: int, device: torch.device
) -> tuple[Float[Tensor, "queries 1"], Float[Tensor, "queries 1"]]:
    if isinstance(score_range, Tensor):
        return score_range[:, :1], score_range[:, 1:]
    low, high = score_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"score_range is (lower end, upper end), both finite, not {score_range}")
    return (
        torch.full((queries, 1), low, device=device),
        torch.full((queries, 1), high, device=device),
    )


def _closest(
    teacher: Tensor, ignored: Tensor, low: Tensor, high: Tensor, temperature: float
) -> Float[Tensor, "queries documents"]:
    """The scores in range whose softmax is closest to the teacher's.

    KL falls and rises with x = s / T as LSE(x) - sum of t x does, LSE being logsumexp: convex, with
    derivative softmax(x) - t. At its least, softmax(x) = t inside of the range, > t at the lower
    end, < t at the upper. So x = clip(ln t + c, low / T, high / T) with c = LSE(x). Its right side
    never rises faster with c than its left, so halving finds c, between low / T + ln C and
    high / T + ln C.
    """
    target, scored = teacher_shares(teacher, ignored, temperature)
    low, high = low / temperature, high / temperature
    log_count = scored.sum(dim=1, keepdim=True).clamp(min=1).log()
    below, above = low + log_count, high + log_count
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        reached = _clipped(target, middle, low, high).masked_fill(~scored, -math.inf)
        is_below = reached.logsumexp(dim=1, keepdim=True) > middle
        below, above = torch.where(is_below, middle, below), torch.where(is_below, above, middle)
    return _clipped(target, below, low, high) * temperature


def _clipped(target: Tensor, shift: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(target + shift, low), high)


def _ln_candidates(positives: Tensor, negatives: Tensor) -> Tensor:
    """Mean over the rows that have a positive; each of it sees its negatives and itself."""
    takes_part = positives.any(dim=1)
    candidates = negatives.sum(dim=1).float() + 1
    return candidates.log().masked_fill(~takes_part, 0).sum() / takes_part.sum()
