"""nDCG, recall and MRR of score matrices, ties broken against the model, and their chance level.

Scores are `[queries, documents]`. Relevance has the same shape: true or a positive gain where a
document answers the query, false, 0 or less where it does not. Only relevant documents are ranked,
by counting what stands before them, so that nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

METRICS = ("ndcg@1", "ndcg@5", "ndcg@10", "recall@1", "recall@5", "recall@10", "mrr")

_COUNTED_AT_ONCE = 1 << 22  # scores compared in one piece: some ten MB each
_SAME_SCORE = 1e-5  # relative; the noise of float32 sums, not a difference between documents


@dataclass(frozen=True, slots=True)
class RelevantRanks:
    """Where each relevant document stands, one entry a pair of query and relevant document.

    Args:
        queries: int64 `[pairs]`, rising: the query of each pair.
        documents: int64 `[pairs]`: its document.
        ranks: int64 `[pairs]`, from 1.
        gains: float64 `[pairs]`, above 0.
        tied: float64 `[pairs]`: share of the irrelevant documents whose score cannot be told from
            this one's.
        num_queries: rows of the score matrix.
        num_documents: its columns.
    """

    queries: Int64[Tensor, " pairs"]
    documents: Int64[Tensor, " pairs"]
    ranks: Int64[Tensor, " pairs"]
    gains: Float64[Tensor, " pairs"]
    tied: Float64[Tensor, " pairs"]
    num_queries: int
    num_documents: int


def ranks(
    scores: Float[Tensor, "queries documents"],
    relevance: Bool[Tensor, "queries documents"] | Int[Tensor, "queries documents"],
) -> RelevantRanks:
    """The rank of every relevant document, ties broken against the model.

    Of documents with equal scores the one with the smaller gain stands first, so a relevant one
    stands behind every irrelevant one of its score. A score that is not a number counts as the
    worst for the model: last for a relevant document, first for an irrelevant one.

    Raises:
        ValueError: a query has no relevant document: no metric is defined for it.
    """
    _check_relevance(scores, relevance)
    queries, documents = (relevance > 0).nonzero(as_tuple=True)
    step = max(1, _COUNTED_AT_ONCE // scores.shape[1])
    counted = [
        _count_ahead(scores, relevance, *pairs)
        for pairs in zip(queries.split(step), documents.split(step), strict=True)
    ]
    return RelevantRanks(
        queries=queries,
        documents=documents,
        ranks=torch.cat([ahead for ahead, _ in counted]) + 1,
        gains=relevance[queries, documents].double(),
        tied=torch.cat([tied for _, tied in counted]),
        num_queries=scores.shape[0],
        num_documents=scores.shape[1],
    )


def mean_metrics(
    scores: Float[Tensor, "queries documents"],
    relevance: Bool[Tensor, "queries documents"] | Int[Tensor, "queries documents"],
    names: Sequence[str] = METRICS,
) -> dict[str, float]:
    """The mean over queries of each named metric.

    >>> scores = torch.tensor([[0.9, 0.1, 0.5]])
    >>> mean_metrics(scores, torch.tensor([[False, False, True]]), ["recall@1", "mrr"])
    {'recall@1': 0.0, 'mrr': 0.5}
    """
    ranked = ranks(scores, relevance)
    return {name: float(per_query(ranked, name).mean()) for name in names}


def per_query(ranked: RelevantRanks, name: str) -> Float64[Tensor, " queries"]:
    """One metric of each query, by name: `ndcg@k`, `recall@k` or `mrr`."""
    kind, k = _parse_name(name)
    if kind == "ndcg":
        return _ndcg(ranked, k)
    return _recall(ranked, k) if kind == "recall" else _mrr(ranked)


def chance(ranked: RelevantRanks, name: str) -> Float64[Tensor, " queries"]:
    """What a random order of the documents scores on average, exactly, for each query."""
    kind, k = _parse_name(name)
    total = ranked.num_documents
    if kind == "ndcg":
        discounts = 1 / torch.arange(2, min(k, total) + 2, dtype=torch.float64).log2()
        mean_gain = _sum_per_query(ranked, ranked.gains) / total
        return mean_gain * discounts.sum() / _ideal_dcg(ranked, k)
    if kind == "recall":
        return torch.full((ranked.num_queries,), min(k, total) / total, dtype=torch.float64)
    counts = torch.bincount(ranked.queries, minlength=ranked.num_queries)
    kinds, which = counts.unique(return_inverse=True)
    return torch.stack([_chance_mrr(int(count), total) for count in kinds])[which]


def _check_relevance(scores: Tensor, relevance: Tensor) -> None:
    if scores.numel() == 0:
        raise ValueError(f"metrics need at least one query and document, got {tuple(scores.shape)}")
    answered = (relevance > 0).any(dim=1)
    if not answered.all():
        missing = (~answered).nonzero().flatten().tolist()
        raise ValueError(
            f"every query needs a relevant document; {len(missing)} of {len(scores)} have none, "
            f"rows {missing[:10]}: leave them out"
        )


def _count_ahead(
    scores: Tensor, relevance: Tensor, queries: Tensor, documents: Tensor
) -> tuple[Int64[Tensor, " pairs"], Float64[Tensor, " pairs"]]:
    gains = relevance[queries].clamp(min=0) if relevance.dtype != torch.bool else relevance[queries]
    rows = scores[queries]
    infinity = torch.tensor(torch.inf, dtype=rows.dtype)
    rows = torch.where(rows.isnan(), torch.where(gains > 0, -infinity, infinity), rows)
    own, own_gain = rows.gather(1, documents[:, None]), gains.gather(1, documents[:, None])
    earlier = torch.arange(rows.shape[1]) < documents[:, None]
    ahead = (gains < own_gain) | ((gains == own_gain) & earlier)
    ahead = ((rows == own) & ahead) | (rows > own)
    irrelevant = gains <= 0
    tied = torch.isclose(rows, own, rtol=_SAME_SCORE, atol=0.0) & irrelevant
    return ahead.sum(dim=1), tied.sum(dim=1).double() / irrelevant.sum(dim=1).clamp(min=1)


def _parse_name(name: str) -> tuple[str, int]:
    kind, sign, k = name.partition("@")
    if kind == "mrr" and not sign:
        return kind, 0
    if kind in ("ndcg", "recall") and k.isdecimal() and int(k) > 0:
        return kind, int(k)
    raise ValueError(f"unknown metric {name!r}: expected ndcg@k, recall@k (k from 1) or mrr")


def _ndcg(ranked: RelevantRanks, k: int) -> Float64[Tensor, " queries"]:
    # linear gain over log2(rank + 1): Järvelin and Kekäläinen (2002), as in trec_eval's ndcg_cut
    return _dcg(ranked, ranked.gains, ranked.ranks, k) / _ideal_dcg(ranked, k)


def _ideal_dcg(ranked: RelevantRanks, k: int) -> Float64[Tensor, " queries"]:
    by_gain = ranked.gains.argsort(descending=True)
    order = by_gain[ranked.queries[by_gain].argsort(stable=True)]
    counts = torch.bincount(ranked.queries, minlength=ranked.num_queries)
    starts = (counts.cumsum(0) - counts)[ranked.queries]  # [pairs]
    return _dcg(ranked, ranked.gains[order], torch.arange(len(order)) - starts + 1, k)


def _dcg(ranked: RelevantRanks, gains: Tensor, positions: Tensor, k: int) -> Tensor:
    discounted = gains / (positions + 1).double().log2()
    return _sum_per_query(ranked, discounted * (positions <= k))


def _recall(ranked: RelevantRanks, k: int) -> Float64[Tensor, " queries"]:
    found = _sum_per_query(ranked, (ranked.ranks <= k).double())
    return found / torch.bincount(ranked.queries, minlength=ranked.num_queries)


def _mrr(ranked: RelevantRanks) -> Float64[Tensor, " queries"]:
    best = torch.zeros(ranked.num_queries, dtype=torch.float64)
    return best.scatter_reduce(0, ranked.queries, 1 / ranked.ranks.double(), "amax")


def _sum_per_query(ranked: RelevantRanks, values: Tensor) -> Float64[Tensor, " queries"]:
    return torch.zeros(ranked.num_queries, dtype=torch.float64).index_add(0, ranked.queries, values)


def _chance_mrr(relevant: int, total: int) -> Float64[Tensor, ""]:
    """Mean of 1 / rank of the first of `relevant` among `total` documents in random order."""
    # P(first = r + 1) / P(first = r) = (total - r - relevant + 1) / (total - r)
    rank = torch.arange(1, total - relevant + 1, dtype=torch.float64)
    ratios = (total - rank - relevant + 1) / (total - rank)
    first = torch.tensor([relevant / total], dtype=torch.float64)
    probability = torch.cat([first, ratios]).cumprod(0)
    return (probability / torch.arange(1, len(probability) + 1)).sum()
