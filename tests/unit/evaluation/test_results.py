import json

import pytest
import torch

from colfolio.evaluation.metrics import METRICS
from colfolio.evaluation.results import Scored, evaluate_scores, outcomes


def scored(scores, relevance, unseen=None):
    baseline = torch.zeros_like(scores)
    return Scored(scores, relevance, baseline, unseen, "sample, test", "ink width")


def test_an_evaluation_stands_beside_chance_baseline_and_interval():
    generator = torch.Generator().manual_seed(0)
    relevance = torch.eye(100, dtype=torch.bool)
    scores = torch.randn(100, 100, generator=generator) + 3.0 * relevance
    evaluation = evaluate_scores(scored(scores, relevance))
    assert [metric.name for metric in evaluation.metrics] == list(METRICS)
    recall = evaluation.metric("recall@5")
    assert recall.low < recall.value < recall.high
    assert recall.chance == pytest.approx(0.05)
    assert recall.baseline == 0.0
    assert not evaluation.is_collapsed
    assert (evaluation.num_queries, evaluation.num_candidates) == (100, 100)


def test_unseen_queries_are_evaluated_apart():
    relevance = torch.eye(4, dtype=torch.bool)
    scores = torch.eye(4)
    scores[:2] = torch.eye(4)[:2].flip(1)
    unseen = torch.tensor([False, False, True, True])
    evaluation = evaluate_scores(scored(scores, relevance, unseen))
    assert evaluation.num_unseen == 2
    assert evaluation.metric("recall@1").value == 0.5
    assert {metric.name: metric.value for metric in evaluation.unseen}["recall@1"] == 1.0


def test_nothing_is_said_of_unseen_queries_where_the_dataset_does_not_know():
    evaluation = evaluate_scores(scored(torch.eye(3), torch.eye(3, dtype=torch.bool)))
    assert evaluation.num_unseen is None
    assert evaluation.unseen == ()


def test_a_collapsed_model_is_named_as_such():
    constant = torch.full((20, 20), 0.3) + 1e-8 * torch.rand(20, 20)
    evaluation = evaluate_scores(scored(constant, torch.eye(20, dtype=torch.bool)))
    assert evaluation.is_collapsed
    assert evaluation.metric("ndcg@5").value < 0.5


def test_an_evaluation_survives_json():
    evaluation = evaluate_scores(scored(torch.eye(3), torch.eye(3, dtype=torch.bool)))
    values = json.loads(json.dumps(evaluation.as_json()))
    assert values["metrics"]["ndcg@5"]["value"] == 1.0
    assert values["is_collapsed"] is False
    assert values["unseen"] == {}


def test_outcomes_show_the_best_right_answer_and_the_top():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1]])
    relevance = torch.tensor([[True, False, True, False], [True, False, False, False]])
    first, second = outcomes(scored(scores, relevance), num_top=2)
    assert (first.rank, first.answer, first.top) == (2, 2, (1, 2))
    assert first.top_scores == pytest.approx((0.9, 0.5))
    assert (second.rank, second.answer) == (1, 0)


def test_a_tied_right_answer_is_shown_behind_the_wrong_ones():
    relevance = torch.tensor([[True, False, False]])
    (outcome,) = outcomes(scored(torch.zeros(1, 3), relevance))
    assert outcome.rank == 3
    assert outcome.top[-1] == 0
