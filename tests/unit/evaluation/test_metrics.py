from itertools import permutations

import pytest
import pytrec_eval
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colfolio.evaluation import metrics as metrics_module
from colfolio.evaluation.metrics import METRICS, chance, mean_metrics, per_query, ranks

TREC_NAMES = {
    "ndcg@1": "ndcg_cut_1",
    "ndcg@5": "ndcg_cut_5",
    "ndcg@10": "ndcg_cut_10",
    "recall@1": "recall_1",
    "recall@5": "recall_5",
    "recall@10": "recall_10",
    "mrr": "recip_rank",
}


def random_case(seed: int, queries: int, documents: int, relevant: int, grades: int):
    generator = torch.Generator().manual_seed(seed)
    # a permutation a query: no two documents share a score
    scores = torch.stack(
        [torch.randperm(documents, generator=generator).float() for _ in range(queries)]
    )
    relevance = torch.zeros(queries, documents, dtype=torch.int64)
    for row in relevance:
        chosen = torch.randperm(documents, generator=generator)[:relevant]
        row[chosen] = torch.randint(1, grades + 1, (len(chosen),), generator=generator)
    return scores, relevance


def trec_eval(scores, relevance):
    qrels = {
        str(q): {str(d): int(gain) for d, gain in enumerate(row)}
        for q, row in enumerate(relevance.tolist())
    }
    run = {
        str(q): {str(d): float(score) for d, score in enumerate(row)}
        for q, row in enumerate(scores.tolist())
    }
    measures = {"ndcg_cut.1,5,10", "recall.1,5,10", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    return [found[str(q)] for q in range(len(scores))]


@pytest.mark.parametrize(
    ("documents", "relevant", "grades"),
    [(40, 1, 1), (40, 7, 1), (60, 12, 4), (3, 2, 2), (12, 12, 3)],
)
def test_metrics_agree_with_trec_eval(documents, relevant, grades):
    scores, relevance = random_case(documents, 25, documents, relevant, grades)
    expected = trec_eval(scores, relevance)
    ranked = ranks(scores, relevance)
    for name, trec_name in TREC_NAMES.items():
        theirs = torch.tensor([query[trec_name] for query in expected], dtype=torch.float64)
        torch.testing.assert_close(per_query(ranked, name), theirs, rtol=0, atol=1e-9)


def test_documents_of_gain_0_or_less_are_irrelevant_as_in_trec_eval():
    scores, relevance = random_case(3, 10, 20, 5, 3)
    relevance[relevance == 0] = -1
    expected = trec_eval(scores, relevance)
    values = per_query(ranks(scores, relevance), "ndcg@10")
    assert values.tolist() == pytest.approx([query["ndcg_cut_10"] for query in expected])


def test_bool_relevance_means_a_gain_of_1():
    scores, relevance = random_case(4, 10, 30, 4, 1)
    assert mean_metrics(scores, relevance) == mean_metrics(scores, relevance > 0)


def test_a_relevant_document_stands_behind_every_irrelevant_one_of_its_score():
    relevant = torch.tensor([[True, False, False, True]])
    ranked = ranks(torch.tensor([[2.0, 2.0, 2.0, 1.0]]), relevant)
    assert ranked.ranks.tolist() == [3, 4]
    assert ranked.tied.tolist() == [1.0, 0.0]


def test_of_tied_documents_the_smaller_gain_stands_first():
    ranked = ranks(torch.zeros(1, 4), torch.tensor([[3, 0, 1, 3]]))
    assert ranked.ranks.tolist() == [3, 2, 4]


def test_a_collapsed_model_is_worse_than_chance():
    relevance = torch.eye(64, dtype=torch.bool)
    values = mean_metrics(torch.full((64, 64), 0.7), relevance)
    assert values == {name: pytest.approx(1 / 64 if name == "mrr" else 0.0) for name in METRICS}
    assert ranks(torch.full((64, 64), 0.7), relevance).tied.mean() == 1.0


def test_scores_apart_by_rounding_only_are_reported_as_tied():
    noise = 1 + 1e-7 * torch.rand(8, 200)
    assert ranks(7.5 * noise, torch.eye(8, 200, dtype=torch.bool)).tied.mean() > 0.99


@pytest.mark.parametrize("value", [0.0, 5.0, -torch.inf])
def test_a_score_that_is_not_a_number_never_helps(value):
    nan = torch.nan
    relevant = torch.tensor([[True, False, False]])
    assert ranks(torch.tensor([[nan, value, value]]), relevant).ranks.tolist() == [3]
    assert ranks(torch.tensor([[value, nan, nan]]), relevant).ranks.tolist() == [3]


def test_a_query_without_a_relevant_document_is_an_error_that_names_its_row():
    with pytest.raises(ValueError, match=r"1 of 2 have none, rows \[1\]"):
        ranks(torch.zeros(2, 3), torch.tensor([[1, 0, 0], [0, 0, -1]]))


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "recall@x", "mrr@5", "map", ""])
def test_an_unknown_metric_is_an_error(name):
    ranked = ranks(torch.zeros(1, 2), torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="unknown metric"):
        per_query(ranked, name)


def test_counting_in_pieces_changes_nothing(monkeypatch):
    scores, relevance = random_case(5, 30, 50, 6, 3)
    whole = ranks(scores, relevance)
    monkeypatch.setattr(metrics_module, "_COUNTED_AT_ONCE", 120)
    pieces = ranks(scores, relevance)
    assert torch.equal(whole.ranks, pieces.ranks)
    assert torch.equal(whole.tied, pieces.tied)


@pytest.mark.parametrize(
    "gains", [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [3, 1, 1, 0, 0], [2, 2, 2, 1, 1]]
)
def test_chance_is_the_mean_over_all_orders(gains):
    orders = torch.tensor(list(permutations(range(5))), dtype=torch.float32)  # [120, 5]
    ranked = ranks(orders, torch.tensor(gains).expand(120, 5))
    for name in ["ndcg@1", "ndcg@3", "ndcg@10", "recall@1", "recall@3", "recall@10", "mrr"]:
        expected = float(per_query(ranked, name).mean())
        assert chance(ranked, name).tolist() == pytest.approx([expected] * 120), name


def test_chance_of_one_relevant_document_is_the_harmonic_number_for_mrr():
    ranked = ranks(torch.zeros(1, 1566), torch.eye(1, 1566, dtype=torch.bool))
    harmonic = sum(1 / rank for rank in range(1, 1567))
    assert chance(ranked, "mrr").item() == pytest.approx(harmonic / 1566)
    assert chance(ranked, "recall@5").item() == pytest.approx(5 / 1566)


@st.composite
def cases(draw):
    """Few distinct scores, so that ties are common; at least one relevant document a query."""
    queries, documents = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    score = st.sampled_from([-1.0, 0.0, 0.5, 1.0, float("nan"), float("-inf")])
    row = st.lists(score, min_size=documents, max_size=documents)
    gains = st.lists(st.integers(0, 3), min_size=documents, max_size=documents)
    scores = [draw(row) for _ in range(queries)]
    relevance = [draw(gains.filter(any)) for _ in range(queries)]
    return torch.tensor(scores), torch.tensor(relevance)


@given(cases(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=80)
def test_the_order_of_documents_never_matters(case, random):
    scores, relevance = case
    order = random.sample(range(scores.shape[1]), scores.shape[1])
    assert mean_metrics(scores[:, order], relevance[:, order]) == pytest.approx(
        mean_metrics(scores, relevance)
    )


@given(cases())
@settings(deadline=None, max_examples=80)
def test_no_way_to_break_the_ties_scores_less(case):
    scores, relevance = case
    clean = torch.where(scores.isnan(), -10.0, scores).clamp(min=-10.0)
    tied = mean_metrics(clean, relevance)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        broken = clean + 1e-3 * torch.rand(clean.shape, generator=generator)
        found = mean_metrics(broken, relevance)
        assert all(tied[name] <= found[name] + 1e-12 for name in METRICS)


@given(cases())
@settings(deadline=None, max_examples=80)
def test_a_collapsed_model_is_the_worst_case_of_all(case):
    scores, relevance = case
    collapsed, found = (
        mean_metrics(torch.zeros_like(scores), relevance),
        mean_metrics(scores, relevance),
    )
    assert all(collapsed[name] <= found[name] + 1e-12 for name in METRICS)


@given(cases())
@settings(deadline=None, max_examples=80)
def test_an_irrelevant_document_below_all_others_changes_nothing(case):
    scores, relevance = case
    scores = scores.nan_to_num(nan=-1.0, neginf=-1.0)
    wider = torch.cat([scores, torch.full((len(scores), 1), -9.0)], dim=1)
    more = torch.cat([relevance, torch.zeros(len(scores), 1, dtype=torch.int64)], dim=1)
    assert mean_metrics(wider, more) == mean_metrics(scores, relevance)


@given(cases())
@settings(deadline=None, max_examples=80)
def test_every_metric_lies_between_0_and_1(case):
    ranked = ranks(*case)
    for name in METRICS:
        for values in (per_query(ranked, name), chance(ranked, name)):
            assert ((values >= 0) & (values <= 1 + 1e-12)).all()
