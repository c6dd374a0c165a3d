import pytest
import torch

from colfolio.data.dataset import load_dataset
from colfolio.errors import DatasetError
from colfolio.evaluation import benchmark
from colfolio.evaluation.baseline import fit_extent_line
from colfolio.evaluation.benchmark import (
    relevance_of,
    score_index,
    score_model,
)
from colfolio.evaluation.results import evaluate_scores

from .conftest import WidthEncoder


class FakeSearcher:
    """Holds two pages more than the dataset asks for, in another order."""

    def __init__(self, num_pages: int = 4) -> None:
        self.pages = [("other.pdf", 0), *(("manual.pdf", p) for p in reversed(range(num_pages)))]
        self.pages.append(("other.pdf", 1))

    def search_many(self, queries):
        scores = torch.zeros(len(queries), len(self.pages))
        for row in range(len(queries)):
            scores[row, self.pages.index(("manual.pdf", row))] = 1.0
        return scores


def test_a_model_that_reads_is_told_from_one_that_does_not(strips):
    evaluation = evaluate_scores(score_model(WidthEncoder(), strips))
    assert evaluation.metric("recall@1").value == 1.0
    assert evaluation.metric("recall@1").chance == 0.25
    assert (evaluation.num_queries, evaluation.num_candidates) == (4, 4)
    assert evaluation.num_unseen == 2
    assert not evaluation.is_collapsed
    blind = evaluate_scores(score_model(WidthEncoder(is_blind=True), strips))
    assert blind.metric("recall@1").value == 0.0
    assert blind.is_collapsed


def test_the_baseline_stands_beside_the_model(strips_folder, strips):
    line = fit_extent_line(load_dataset(strips_folder, "train"))
    evaluation = evaluate_scores(score_model(WidthEncoder(is_blind=True), strips, line))
    assert evaluation.metric("recall@1").baseline == 1.0
    assert evaluation.extent == "ink width"


def test_images_are_encoded_in_pieces_without_changing_the_scores(strips, monkeypatch):
    whole = score_model(WidthEncoder(), strips).scores
    encoder, progress = WidthEncoder(), []
    monkeypatch.setattr(benchmark, "_IMAGES_AT_ONCE", 3)
    pieces = score_model(encoder, strips, on_progress=lambda *now: progress.append(now)).scores
    torch.testing.assert_close(pieces, whole)
    assert encoder.num_documents == [3, 1]
    assert progress == [(3, 4), (4, 4)]
    monkeypatch.setattr(benchmark, "_PIXELS_AT_ONCE", 1)
    encoder = WidthEncoder()
    torch.testing.assert_close(score_model(encoder, strips).scores, whole)
    assert encoder.num_documents == [1, 1, 1, 1]


def test_an_index_is_evaluated_on_the_pages_of_the_corpus_alone(strips):
    scored = score_index(FakeSearcher(), strips)
    assert torch.equal(scored.scores, torch.eye(4))
    evaluation = evaluate_scores(scored)
    assert evaluation.num_candidates == 4
    assert evaluation.metric("ndcg@1").value == 1.0


def test_pages_that_the_index_lacks_are_named_from_1(strips):
    with pytest.raises(DatasetError, match=r"1 of 4 pages are not in the index: manual.pdf page 4"):
        score_index(FakeSearcher(num_pages=3), strips)


def test_an_index_is_not_evaluated_on_parts_of_pages(strips, monkeypatch):
    monkeypatch.setattr(strips.corpus, "pages", [0, 0, 1, 2])
    with pytest.raises(DatasetError, match="several images of this corpus show the same page"):
        score_index(FakeSearcher(), strips)


def test_relevance_has_the_gain_of_each_judged_pair(strips, monkeypatch):
    qrels = {"test-q0": {"test-c2": 3, "test-c0": 0}, "test-q1": {"test-c1": 1}}
    monkeypatch.setattr(strips, "qrels", qrels | {"test-q2": {}, "test-q3": {"test-c0": 2}})
    expected = [[0, 0, 3, 0], [0, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert relevance_of(strips).tolist() == expected
