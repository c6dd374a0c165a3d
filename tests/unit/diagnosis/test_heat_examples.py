"""Hits and misses are ranked as they should be, and the shares of their tokens are their score."""

import pytest
import torch

from colfolio.data.dataset import load_dataset
from colfolio.diagnosis.reporting import heat_examples as module
from colfolio.diagnosis.reporting.heat_examples import heat_examples
from colfolio.maxsim import maxsim


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, write_shapes):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, {"validation": 24})
    return load_dataset(folder, "validation")


@pytest.fixture
def examples(shared_retriever, shapes):
    return heat_examples(shared_retriever, shapes)


def test_there_are_two_hits_and_two_misses_at_most(examples):
    assert 1 <= len(examples) <= 4
    hits = [example for example in examples if example.rank == 1]
    assert len(hits) <= 2
    assert len(examples) - len(hits) <= 2
    assert examples == sorted(examples, key=lambda example: example.rank > 1)


def test_a_rank_is_that_of_scoring_the_query_with_every_document(
    examples, shared_retriever, shapes
):
    corpus = shapes.corpus
    documents = shared_retriever.encode_documents([corpus.image(row) for row in range(len(corpus))])
    for example in examples:
        query = next(each for each in shapes.queries if each.text == example.query)
        scores = maxsim(shared_retriever.encode_queries([query.text]), documents)[0]
        right = torch.tensor([id_ in shapes.positives(query.id) for id_ in corpus.ids])
        assert example.candidates == len(corpus)
        assert example.rank == 1 + int((scores[~right] >= scores[right].max()).sum())
        assert example.scores[0] == pytest.approx(float(scores[right].max()), abs=1e-4)


def test_shares_of_the_tokens_add_up_to_the_scores(examples, monkeypatch, shared_retriever, shapes):
    monkeypatch.setattr(module, "_MOST_TOKENS", 3)
    cut = heat_examples(shared_retriever, shapes)
    assert all(len(example.tokens) <= 3 for example in cut)
    assert any("more" in example.tokens[-1].text for example in cut)
    for example in [*examples, *cut]:
        answer = sum(token.answer for token in example.tokens)
        assert answer == pytest.approx(example.scores[0], abs=1e-3)
        if example.rank > 1:
            first = sum(token.first for token in example.tokens)
            assert first == pytest.approx(example.scores[1], abs=1e-3)
            assert example.scores[1] >= example.scores[0]


def test_a_hit_shows_its_answer_alone_and_a_miss_both_documents(examples):
    for example in examples:
        count = 1 if example.rank == 1 else 2
        assert len(example.images) == len(example.captions) == len(example.scores) == count
        for token in example.tokens:
            assert token.image.shape == example.images[0].shape


def test_heat_lies_on_the_patch_that_a_token_likes_best(shared_retriever, shapes):
    image = shapes.corpus.image(0)
    span = shared_retriever.visual_span(image.shape[:2])
    vectors = shared_retriever.encode_documents([image])[0]
    visual = vectors[span.first : span.first + span.rows * span.columns]
    for place in range(len(visual)):
        heat = module.visual_heat(visual[place : place + 1], visual)
        assert int(heat.argmax()) == place


def test_a_large_split_is_ranked_in_part(monkeypatch, shared_retriever, shapes):
    monkeypatch.setattr(module, "_QUERIES", 4)
    monkeypatch.setattr(module, "_DOCUMENTS", 7)
    assert {example.candidates for example in heat_examples(shared_retriever, shapes)} == {7}


def test_a_model_that_scores_all_alike_has_no_hits(monkeypatch, shared_retriever, shapes):
    monkeypatch.setattr(module, "maxsim", lambda texts, _: torch.zeros(len(texts), 24))
    for example in heat_examples(shared_retriever, shapes):
        wrong = example.candidates - len(
            shapes.positives(next(q.id for q in shapes.queries if q.text == example.query))
        )
        assert example.rank == 1 + wrong
