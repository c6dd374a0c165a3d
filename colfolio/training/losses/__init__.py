"""Losses as functions of scores and positives, each beside what it is at chance and at best."""

from colfolio.training.losses.formulas import LossSettings, loss_of_scores
from colfolio.training.losses.levels import ScoreRange, chance_level, floor_level, maxsim_range
from colfolio.training.losses.masks import check_masks
from colfolio.training.losses.summary import ScoreSummary, contrastive_loss, info_nce

__all__ = [
    "LossSettings",
    "ScoreRange",
    "ScoreSummary",
    "chance_level",
    "check_masks",
    "contrastive_loss",
    "floor_level",
    "info_nce",
    "loss_of_scores",
    "maxsim_range",
]
