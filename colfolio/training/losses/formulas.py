"""Four losses of a score matrix: InfoNCE, pairwise softplus, sigmoid, and distillation by KL.

Letters: a query has P positives, N negatives and C candidates; s is a score, T the temperature.
Ignored documents are neither positive nor negative, and their scores never matter. A query without
any positive takes no part: means are over the others.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from colfolio.config import Settings

LossKind = Literal["info_nce", "pairwise", "sigmoid", "distillation"]


class LossSettings(Settings):
    """Which loss, and how.

    Args:
        kind: `info_nce`: the positive against all negatives; `pairwise`: against the hardest one;
            `sigmoid`: every pair for itself; `distillation`: the shares that a teacher's scores
            give, by its softmax.
        temperature: scores are divided by it, a teacher's too; MaxSim summed over about ten query
            tokens wants 1.
        symmetric: of `info_nce`: the mean of both directions, each query among documents and each
            document among queries.
        bias: of `sigmoid`: added to `s / T`. It should be `ln(P / N) - s / T` for the score s of
            documents that have nothing to do with a query, so that training starts at chance.
    """

    kind: LossKind = "info_nce"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    symmetric: bool = False
    bias: float = Field(default=0.0, allow_inf_nan=False)

    @field_validator("kind", mode="before")
    @classmethod
    def _in_either_spelling(cls, kind: object) -> object:
        """`infonce` is `info_nce`, here as on the command line."""
        return "info_nce" if kind == "infonce" else kind

    @model_validator(mode="after")
    def _is_honoured(self) -> LossSettings:
        """What the kind does not use is not set."""
        if self.symmetric and self.kind != "info_nce":
            raise ValueError(f"symmetric is for kind info_nce, not {self.kind}: remove it")
        if self.bias != 0 and self.kind != "sigmoid":
            raise ValueError(f"bias {self.bias} is for kind sigmoid, not {self.kind}: remove it")
        return self


def loss_of_scores(
    scores: Float[Tensor, "queries documents"],
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    settings: LossSettings,
    teacher: Float[Tensor, "queries documents"] | None = None,
) -> Float[Tensor, ""]:
    """The loss alone, float32 at least: mean over the queries that take part.

    Args:
        scores: a document of higher score stands before one of lower.
        positives: what each query wants.
        ignored: true nowhere where `positives` is.
        teacher: for distillation alone: scores to follow, NaN where the teacher says nothing.
    """
    if (settings.kind == "distillation") != (teacher is not None):
        raise ValueError(
            f"teacher scores go with the loss distillation and no other: kind is {settings.kind}, "
            f"teacher scores are {'missing' if teacher is None else 'given'}"
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    # an ignored score may be anything, infinite too, and would reach the gradient as 0 * inf
    logits = scores.to(dtype).masked_fill(ignored, 0) / settings.temperature
    negatives = ~(positives | ignored)
    if teacher is not None:
        return _distillation(logits, positives, ignored, teacher, settings.temperature)
    if settings.kind == "pairwise":
        return _pairwise(logits, positives, negatives)
    if settings.kind == "sigmoid":
        return _sigmoid(logits + settings.bias, positives, negatives)
    loss = _info_nce(logits, positives, negatives)
    if settings.symmetric:
        loss = (loss + _info_nce(logits.T, positives.T, negatives.T)) / 2
    return loss


def teacher_shares(
    teacher: Float[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    temperature: float,
) -> tuple[Float[Tensor, "queries documents"], Bool[Tensor, "queries documents"]]:
    """Logarithms of the teacher's softmax, and which documents it is over; 0 elsewhere."""
    scored = ~(ignored | teacher.isnan())
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    logits = teacher.to(dtype).masked_fill(~scored, 0) / temperature
    return log_shares(logits, scored).masked_fill(~scored, 0), scored


def log_shares(
    logits: Float[Tensor, "rows columns"], among: Bool[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """Logarithms of each row's softmax over some columns; meaningless, but finite, elsewhere."""
    return logits - _only(logits, among).logsumexp(dim=1, keepdim=True)


def _info_nce(logits: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """InfoNCE (arXiv:1807.03748, equation 4): -ln( e^p / (e^p + sum of e^n) )."""
    against = _only(logits, negatives).logsumexp(dim=1, keepdim=True)
    return _mean_over_positives(F.softplus(against - logits), positives, negatives)


def _pairwise(logits: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """-ln sigmoid(p - n) of the highest n; negatives that tie for it share its gradient."""
    hardest = _only(logits, negatives).amax(dim=1, keepdim=True)
    return _mean_over_positives(F.softplus(hardest - logits), positives, negatives)


def _sigmoid(logits: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """-ln sigmoid(p) and -ln sigmoid(-n), summed over pairs (arXiv:2303.15343, section 3.2)."""
    each = F.softplus(torch.where(positives, -logits, logits))
    return each.masked_fill(~(positives | negatives), 0).sum() / positives.any(dim=1).sum()


def _distillation(
    logits: Tensor, positives: Tensor, ignored: Tensor, teacher: Tensor, temperature: float
) -> Tensor:
    """KL(teacher ‖ student) over the documents that the teacher scored (arXiv:1503.02531).

    Not multiplied by T squared: the loss stays in nats, and an optimiser that divides by the size
    of gradients would not see the factor.
    """
    target, scored = teacher_shares(teacher, ignored, temperature)
    each = target.exp() * (target - log_shares(logits, scored))
    return each.masked_fill(~scored, 0).sum() / positives.any(dim=1).sum()


def _mean_over_positives(each: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Mean over a row's positives, then over the rows that have any.

    A row without a negative has nothing to pay; among queries `check_masks` refuses it, among
    documents it is one that every query wants.
    """
    count = positives.sum(dim=1)
    is_paid = positives & negatives.any(dim=1, keepdim=True)
    rows = each.masked_fill(~is_paid, 0).sum(dim=1) / count.clamp(min=1)
    return rows.sum() / (count > 0).sum()


def _only(logits: Tensor, among: Tensor) -> Tensor:
    """Minus infinity outside `among`; a row with nothing in it stays, lest its gradient be NaN."""
    return logits.masked_fill(~among & among.any(dim=1, keepdim=True), float("-inf"))
