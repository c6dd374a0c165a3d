"""Scores and relevance judgements to metrics, beside chance and a baseline that reads nothing."""

from colfolio.evaluation.baseline import ExtentLine, fit_extent_line
from colfolio.evaluation.benchmark import (
    Encoder,
    quick_metrics,
    relevance_of,
    score_index,
    score_model,
)
from colfolio.evaluation.bootstrap import bootstrap_interval
from colfolio.evaluation.metrics import (
    METRICS,
    RelevantRanks,
    chance,
    mean_metrics,
    per_query,
    ranks,
)
from colfolio.evaluation.results import (
    Evaluation,
    Metric,
    Outcome,
    Scored,
    evaluate_scores,
    outcomes,
)

__all__ = [
    "METRICS",
    "Encoder",
    "Evaluation",
    "ExtentLine",
    "Metric",
    "Outcome",
    "RelevantRanks",
    "Scored",
    "bootstrap_interval",
    "chance",
    "evaluate_scores",
    "fit_extent_line",
    "mean_metrics",
    "outcomes",
    "per_query",
    "quick_metrics",
    "ranks",
    "relevance_of",
    "score_index",
    "score_model",
]
