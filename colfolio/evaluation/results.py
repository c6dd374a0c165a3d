"""What scores say: metrics with intervals beside chance and a baseline, and each outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from colfolio.evaluation.bootstrap import bootstrap_interval
from colfolio.evaluation.metrics import METRICS, RelevantRanks, chance, per_query, ranks

_COLLAPSED = 0.5


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of a dataset's queries against candidates, and what should have been found.

    Args:
        scores: `[queries, candidates]`.
        relevance: the same shape: bool or integer gains.
        baseline: the same shape: the scores of the baseline that reads nothing.
        unseen: bool `[queries]`: the text of the query is known not to occur in training; None when
            the dataset does not say.
        dataset: its name and split, for people.
        extent: what the baseline measures: "ink width" or "image size".
    """

    scores: Float[Tensor, "queries candidates"]
    relevance: Bool[Tensor, "queries candidates"] | Int[Tensor, "queries candidates"]
    baseline: Float[Tensor, "queries candidates"]
    unseen: Bool[Tensor, " queries"] | None
    dataset: str
    extent: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over queries with its 95 % interval, beside chance and the baseline."""

    name: str
    value: float
    low: float
    high: float
    chance: float
    baseline: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation says.

    Args:
        dataset: name and split.
        num_queries: all queries.
        num_candidates: documents each query was compared with.
        metrics: over all queries.
        num_unseen: queries whose text does not occur in training; None when that is not known.
        unseen: the same metrics over these; empty when there are none or it is not known.
        tied: share of wrong candidates whose score cannot be told from the right one's.
        extent: what the baseline compares the length of a query with: "ink width" or "image size".
    """

    dataset: str
    num_queries: int
    num_candidates: int
    metrics: tuple[Metric, ...]
    num_unseen: int | None
    unseen: tuple[Metric, ...]
    tied: float
    extent: str

    @property
    def is_collapsed(self) -> bool:
        """Most wrong candidates score as the right one does: the model does not tell them apart."""
        return self.tied > _COLLAPSED

    def metric(self, name: str) -> Metric:
        """One metric over all queries."""
        return {metric.name: metric for metric in self.metrics}[name]

    def as_json(self) -> dict[str, Any]:
        """Plain values, metrics by name."""
        values: dict[str, Any] = asdict(self)
        values["is_collapsed"] = self.is_collapsed
        for group in ("metrics", "unseen"):
            values[group] = {metric.pop("name"): metric for metric in values[group]}
        return values


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one query fared: the best rank of a right candidate, and the top candidates with scores.

    Args:
        query: row of the query.
        rank: from 1, ties broken against the model.
        answer: column of the right candidate that stands at that rank.
        top: columns of the best candidates, best first.
        top_scores: their scores.
    """

    query: int
    rank: int
    answer: int
    top: tuple[int, ...]
    top_scores: tuple[float, ...]


def evaluate_scores(scored: Scored, num_resamples: int = 1000, seed: int = 0) -> Evaluation:
    """Metrics over all queries and over the unseen ones, from scores."""
    model = ranks(scored.scores, scored.relevance)
    blind = ranks(scored.baseline, scored.relevance)
    everything = torch.ones(model.num_queries, dtype=torch.bool)
    unseen = scored.unseen if scored.unseen is not None else ~everything
    return Evaluation(
        dataset=scored.dataset,
        num_queries=model.num_queries,
        num_candidates=model.num_documents,
        metrics=_metrics_of(model, blind, everything, num_resamples, seed),
        num_unseen=None if scored.unseen is None else int(unseen.sum()),
        unseen=_metrics_of(model, blind, unseen, num_resamples, seed),
        tied=float(model.tied.mean()),
        extent=scored.extent,
    )


def outcomes(scored: Scored, num_top: int = 3) -> list[Outcome]:
    """How each query fared, in the order of the queries."""
    ranked = ranks(scored.scores, scored.relevance)
    best: dict[int, tuple[int, int]] = {}
    columns = (ranked.queries.tolist(), ranked.ranks.tolist(), ranked.documents.tolist())
    for query, rank, document in zip(*columns, strict=True):
        best[query] = min(best.get(query, (rank, document)), (rank, document))
    scores = torch.where(scored.scores.isnan(), -torch.inf, scored.scores)
    # a tie is lost here as in `ranks`: the right candidate is shown behind a wrong one of its score
    behind = torch.nextafter(scores, torch.tensor(-torch.inf, dtype=scores.dtype))
    order = torch.where(scored.relevance > 0, behind, scores)
    top = order.topk(min(num_top, ranked.num_documents)).indices  # [queries, num_top]
    shown = zip(top.tolist(), scores.gather(1, top).tolist(), strict=True)
    return [Outcome(row, *best[row], tuple(ids), tuple(of)) for row, (ids, of) in enumerate(shown)]


def _metrics_of(
    model: RelevantRanks, blind: RelevantRanks, chosen: Tensor, num_resamples: int, seed: int
) -> tuple[Metric, ...]:
    if not chosen.any():
        return ()
    values = torch.stack([per_query(model, name)[chosen] for name in METRICS], dim=1)
    low, high = bootstrap_interval(values, num_resamples, seed=seed)
    return tuple(
        Metric(
            name=name,
            value=float(values[:, column].mean()),
            low=float(low[column]),
            high=float(high[column]),
            chance=float(chance(model, name)[chosen].mean()),
            baseline=float(per_query(blind, name)[chosen].mean()),
        )
        for column, name in enumerate(METRICS)
    )
