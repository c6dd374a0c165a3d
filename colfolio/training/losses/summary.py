"""The loss of one step, beside the numbers that say what it means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from colfolio.training.losses.formulas import LossSettings, loss_of_scores
from colfolio.training.losses.levels import ScoreRange, chance_level, floor_level


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What one step's scores say; every field is a tensor of no dimensions, on the scores' device.

    All are means over the queries that take part: those with a positive. The others sit out.

    Args:
        loss: alone carries a graph.
        chance: the least that the loss can be while all scores are equal.
        floor: the least that it can be while scores stay in their range; 0 if that is not known,
            which is what every loss tends to as the range grows.
        margin: the weakest positive's score less that of the hardest negative.
        spread: standard deviation of all scores of a query.
        candidates: number of documents that a query is compared with, one positive among them,
            for several are not compared with each other; `sigmoid` asks of each by itself, so that
            it is one more than its negatives there too. For distillation, number of documents that
            the teacher scored.
        masked: number of documents that are masked: `ignored` for a query.
        accuracy: share of queries whose positives stand strictly before every negative.
    """

    loss: Float[Tensor, ""]
    chance: Float[Tensor, ""]
    floor: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    spread: Float[Tensor, ""]
    candidates: Float[Tensor, ""]
    masked: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def contrastive_loss(
    scores: Float[Tensor, "queries documents"],
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    settings: LossSettings,
    teacher: Float[Tensor, "queries documents"] | None = None,
    score_range: ScoreRange | None = None,
) -> ScoreSummary:
    """The loss that the settings name; hard negatives are simply more documents.

    With several positives, a query pays in `info_nce` and `pairwise` the mean over them, each
    against the negatives alone, so that it weighs as much as any other query; in `sigmoid` the sum,
    for each is a question of its own; in `distillation` what the teacher says of them.

    Masks are taken as they are: `check_masks` refuses those that teach nothing, before the model
    runs. Nothing here waits for the device.

    Args:
        teacher: for `distillation`, and only there: NaN where the teacher says nothing.
        score_range: in which scores lie, for the floor.
    """
    loss = loss_of_scores(scores, positives, ignored, settings, teacher)
    with torch.no_grad():
        floor = torch.zeros((), device=scores.device)
        if score_range is not None:
            floor = floor_level(positives, ignored, settings, score_range, teacher)
        chance = chance_level(positives, ignored, settings, teacher)
        candidates = (~(positives | ignored)).sum(dim=1) + 1
        if teacher is not None:
            candidates = (~(ignored | teacher.isnan())).sum(dim=1)
        return _summary(loss, chance, floor, scores, positives, ignored, candidates)


def info_nce(
    scores: Float[Tensor, "queries documents"],
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    settings: LossSettings,
) -> ScoreSummary:
    """`contrastive_loss` of settings whose kind is InfoNCE."""
    if settings.kind != "info_nce":
        raise ValueError(f"info_nce was called with settings of kind {settings.kind}")
    return contrastive_loss(scores, positives, ignored, settings)


def _summary(
    loss: Tensor,
    chance: Tensor,
    floor: Tensor,
    scores: Tensor,
    positives: Tensor,
    ignored: Tensor,
    candidates: Tensor,
) -> ScoreSummary:
    takes_part = positives.any(dim=1)
    hardest = scores.masked_fill(positives | ignored, float("-inf")).amax(dim=1)
    weakest = scores.masked_fill(~positives, float("inf")).amin(dim=1)
    margin = weakest - hardest

    def mean(numbers: Tensor) -> Tensor:
        return numbers.masked_fill(~takes_part, 0).sum() / takes_part.sum()

    return ScoreSummary(
        loss=loss,
        chance=chance,
        floor=floor,
        margin=mean(margin),
        spread=mean(scores.std(dim=1, correction=0)),
        candidates=mean(candidates.float()),
        masked=mean(ignored.sum(dim=1).float()),
        accuracy=mean((margin > 0).float()),
    )
