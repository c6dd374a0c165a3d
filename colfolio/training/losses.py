"""Losses as functions of scores and positives, each with the level it has without information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from colfolio.config import Settings
from colfolio.errors import DatasetError


class LossSettings(Settings):
    """Which loss, and how.

    Args:
        temperature: scores are divided by it; MaxSim summed over about ten query tokens wants 1.
    """

    temperature: float = Field(default=1.0, gt=0)


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What one step's scores say; every field is a tensor of no dimensions, on the scores' device.

    Args:
        loss: mean over queries.
        chance: the loss if all scores were equal: mean of ln(candidates).
        margin: mean of the positive's score less that of the hardest negative.
        spread: standard deviation of all scores of a query, mean over queries.
        candidates: mean number of documents that a query is compared with, its positive included.
        accuracy: share of queries whose positive stands strictly before every negative.
    """

    loss: Float[Tensor, ""]
    chance: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    spread: Float[Tensor, ""]
    candidates: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def info_nce(
    scores: Float[Tensor, "queries documents"],
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    settings: LossSettings,
) -> ScoreSummary:
    """InfoNCE (arXiv:1807.03748, equation 4) of each query's positives against its negatives.

    A query with several positives pays the mean over them, each against the negatives alone;
    ignored documents are neither. Only `loss` carries a graph. Every query needs a positive and a
    negative (`check_masks`).
    """
    logits = scores / settings.temperature
    negatives = ~(positives | ignored)
    against = logits.masked_fill(~negatives, float("-inf")).logsumexp(dim=1, keepdim=True)
    # -log( e^p / (e^p + sum of e^n) ) = softplus(logsumexp(n) - p)
    each = torch.nn.functional.softplus(against - logits)
    count = positives.sum(dim=1)
    loss = ((each * positives).sum(dim=1) / count).mean()
    with torch.no_grad():
        return _summary(loss, scores, positives, negatives)


def check_masks(
    positives: Bool[Tensor, "queries documents"], ignored: Bool[Tensor, "queries documents"]
) -> None:
    """Refuse a batch in which a query has nothing to find or nothing to tell it from.

    Raises:
        DatasetError: names the first such query.
    """
    if not positives.any(dim=1).all():
        row = int((~positives.any(dim=1)).nonzero()[0])
        raise DatasetError(f"query {row} of the batch has no positive document")
    negatives = ~(positives | ignored)
    if not negatives.any(dim=1).all():
        row = int((~negatives.any(dim=1)).nonzero()[0])
        raise DatasetError(
            f"query {row} of the batch has no negative among {positives.shape[1]} documents: its "
            "loss is always 0 and teaches nothing; use more rows, from more than one page"
        )


def _summary(loss: Tensor, scores: Tensor, positives: Tensor, negatives: Tensor) -> ScoreSummary:
    hardest = scores.masked_fill(~negatives, float("-inf")).amax(dim=1)
    weakest = scores.masked_fill(~positives, float("inf")).amin(dim=1)
    margin = weakest - hardest
    candidates = negatives.sum(dim=1).float() + 1
    return ScoreSummary(
        loss=loss,
        chance=candidates.log().mean(),
        margin=margin.mean(),
        spread=scores.std(dim=1, correction=0).mean(),
        candidates=candidates.mean(),
        accuracy=(margin > 0).float().mean(),
    )
