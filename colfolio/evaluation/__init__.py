"""Scores and relevance judgements to metrics, beside chance and a baseline that reads nothing."""

from colfolio.evaluation.baseline import ExtentLine, fit_extent_line
from colfolio.evaluation.benchmark import (
    Encoder,
    model_scores,
    random_order_score,
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
from colfolio.evaluation.pool import POOL_SIZE, Pool, draw_pool, pool_loss, validation_metrics
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
    "POOL_SIZE",
    "Encoder",
    "Evaluation",
    "ExtentLine",
    "Metric",
    "Outcome",
    "Pool",
    "RelevantRanks",
    "Scored",
    "bootstrap_interval",
    "chance",
    "draw_pool",
    "evaluate_scores",
    "fit_extent_line",
    "mean_metrics",
    "model_scores",
    "outcomes",
    "per_query",
    "pool_loss",
    "random_order_score",
    "ranks",
    "relevance_of",
    "score_index",
    "score_model",
    "validation_metrics",
]
