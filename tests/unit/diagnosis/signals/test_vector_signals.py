"""Signals of vectors, each beside its definition spelt out."""

import math

import pytest
import torch

from colfolio.batch import MultiVectors
from colfolio.diagnosis.signals.vector_signals import (
    effective_rank,
    mean_cosine,
    mean_distance,
    same_winner_share,
    sampled,
    winners,
)
from colfolio.maxsim import maxsim_by_definition


def ragged(*lengths, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, dim, generator=generator) for length in lengths]
    return MultiVectors.from_list([torch.nn.functional.normalize(row, dim=1) for row in rows])


def test_the_mean_cosine_is_over_pairs_of_different_rows():
    rows = ragged(3, 1, 5)
    pairs = [
        float(torch.cosine_similarity(one, other, dim=0))
        for row in range(3)
        for column in range(3)
        if row != column
        for one in rows[row]
        for other in rows[column]
    ]
    assert mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert mean_cosine(ragged(4)) == 0


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_the_effective_rank_is_exp_of_the_entropy_of_the_singular_values(scale):
    vectors = ragged(40).vectors * scale
    values = torch.linalg.svdvals(vectors.double())
    shares = values / values.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert effective_rank(vectors) == pytest.approx(expected, rel=1e-6)


def test_the_effective_rank_goes_from_one_to_the_dimensions():
    assert effective_rank(torch.ones(20, 8)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.eye(8).repeat(5, 1)) == pytest.approx(8)
    assert effective_rank(torch.zeros(3, 8)) == 0
    assert math.isnan(effective_rank(torch.full((3, 8), math.nan)))


def test_winners_and_exact_scores_are_those_of_the_definition():
    queries, documents = ragged(3, 2), ragged(4, 1, 6, seed=1)
    places, scores = winners(queries, documents)
    expected = [[int((q @ d.T).argmax()) for d in documents] for q in queries.vectors]
    assert places.tolist() == expected
    torch.testing.assert_close(scores.float(), maxsim_by_definition(queries, documents))


def test_one_place_that_wins_nearly_everywhere_is_found_from_either_end():
    lengths = torch.tensor([4, 6, 9, 5, 7, 8, 4, 6, 5, 9, 6])
    many = torch.randint(0, 4, (1, 11), generator=torch.Generator().manual_seed(0))
    from_begin = torch.full((1, 11), 2)
    from_begin[0, 0] = 3  # but for one
    from_end = (lengths - 1)[None]
    for places, expected in ((many, 0), (from_begin, 1), (from_end, 1)):
        assert same_winner_share(places, lengths) == expected
    together = torch.cat([many, from_begin, from_end, many])
    assert same_winner_share(together, lengths) == 0.5


def test_the_distance_is_one_less_the_cosine():
    before, now = ragged(5).vectors, ragged(5, seed=1).vectors
    assert mean_distance(before, before) == pytest.approx(0, abs=1e-7)
    assert mean_distance(before, -before) == pytest.approx(2)
    expected = 1 - torch.cosine_similarity(before, now, dim=1).mean()
    assert mean_distance(before, now) == pytest.approx(float(expected), abs=1e-6)


def test_of_many_vectors_some_thousands_are_kept():
    assert len(sampled(ragged(5000, 4000))) == 3000
    assert torch.equal(sampled(ragged(5, 2)), ragged(5, 2).vectors)
