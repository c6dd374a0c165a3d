"""Signals of scores, each beside its definition spelt out."""

import math

import numpy as np
import pytest
import torch

from colfolio.diagnosis.signals.score_signals import (
    best_shift,
    confident_share,
    distinct_share,
    mean_margin,
    mean_rank,
    score_error,
    score_histogram,
)
from colfolio.training.losses import LossSettings, contrastive_loss


@pytest.fixture
def drawn():
    """Scores, positives and ignored of 12 queries and 9 documents; the last query sits out."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 9, generator=generator)
    positives = torch.zeros(12, 9, dtype=torch.bool)
    positives[torch.arange(12), torch.arange(12) % 9] = True
    positives[0, 5] = True
    ignored = (torch.rand(12, 9, generator=generator) < 0.2) & ~positives
    positives[-1], ignored[-1] = False, True
    return scores, positives, ignored


def test_the_mean_margin_is_that_of_its_definition(drawn):
    scores, positives, ignored = (each.numpy() for each in drawn)
    margins = [
        row[wanted].mean() - row[~(wanted | left)].mean()
        for row, wanted, left in zip(scores, positives, ignored, strict=True)
        if wanted.any()
    ]
    assert mean_margin(*drawn) == pytest.approx(np.mean(margins), rel=1e-6)


def test_a_query_without_any_negative_has_no_margin():
    scores = torch.tensor([[5.0, 4.0], [1.0, 2.0]])
    positives = torch.tensor([[True, False], [True, False]])
    ignored = torch.tensor([[False, True], [False, False]])
    assert mean_margin(scores, positives, ignored) == -1
    assert math.isnan(mean_margin(scores[:1], positives[:1], ignored[:1]))


def test_the_rank_is_that_of_the_weakest_positive_among_the_negatives(drawn):
    scores, positives, ignored = (each.numpy() for each in drawn)
    ranks = [
        1 + (row[~(wanted | left)] >= row[wanted].min()).sum()
        for row, wanted, left in zip(scores, positives, ignored, strict=True)
        if wanted.any()
    ]
    assert mean_rank(*drawn) == pytest.approx(np.mean(ranks))


def test_a_rank_of_one_everywhere_is_an_accuracy_of_one(drawn):
    scores, positives, ignored = drawn
    lifted = scores + 10 * positives
    summary = contrastive_loss(lifted, positives, ignored, LossSettings())
    assert (mean_rank(lifted, positives, ignored), float(summary.accuracy)) == (1.0, 1.0)


def test_ties_and_nan_count_against_the_positive():
    positives = torch.eye(4, dtype=torch.bool)
    ignored = torch.zeros(4, 4, dtype=torch.bool)
    assert mean_rank(torch.zeros(4, 4), positives, ignored) == 4
    assert mean_rank(torch.full((4, 4), math.nan), positives, ignored) == 4


@pytest.mark.parametrize("offset", [-3, -2, -1, 1, 2, 3])
def test_labels_shifted_against_documents_are_seen_with_their_offset(offset):
    order = torch.tensor([*range(10, 18), *range(40, 48)])
    scores = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    place = {number: n for n, number in enumerate(order.tolist())}
    for number, query in list(place.items()):
        if number + offset in place:
            scores[query, place[number + offset]] = 9.0
    found = best_shift(scores, torch.eye(16, dtype=torch.bool), order, torch.arange(16))
    assert found == (offset, 1.0)


def test_a_model_that_ranks_well_shows_no_shift():
    scores = 9 * torch.eye(16) + torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    is_answer = torch.eye(16, dtype=torch.bool)
    assert best_shift(scores, is_answer, torch.arange(16), torch.arange(16))[1] == 0


def test_a_neighbour_that_answers_too_is_no_shift():
    # two queries a document: both rank it first
    answers = torch.arange(8) // 2
    answering = answers[:, None] == torch.arange(4)
    offset, share = best_shift(answering.float(), answering, torch.arange(8), answers)
    assert share == 0
    assert offset != 0


def test_documents_that_tie_for_the_first_place_are_no_shift():
    numbers = torch.arange(8)
    assert best_shift(torch.zeros(8, 8), torch.eye(8, dtype=torch.bool), numbers, numbers)[1] == 0


def test_queries_without_neighbours_say_nothing_of_a_shift():
    nothing = torch.eye(4, dtype=torch.bool)
    far = torch.tensor([0, 10, 20, 30])
    assert best_shift(torch.rand(4, 4), nothing, far, torch.arange(4)) == (0, 0.0)


def test_a_negative_that_leads_by_far_makes_a_query_confident():
    positives = torch.eye(4, dtype=torch.bool)
    ignored = torch.zeros(4, 4, dtype=torch.bool)
    scores = torch.zeros(4, 4)
    scores[0, 1] = 1.0  # leads
    scores[1, 1] = 1.0  # the answer leads
    scores[2, 2] = scores[2, 3] = 1.0  # a copy of the answer ties with it
    scores[3, 0] = 1.0
    ignored[3, 0] = True  # is not compared
    assert confident_share(scores, positives, ignored) == 0.25


def test_rounded_scores_are_less_distinct_and_have_an_error():
    scores = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)) + 12
    rounded = scores.bfloat16().float()
    assert distinct_share(scores) > 0.99
    assert distinct_share(rounded) < 0.2
    spread = float(scores.std(dim=1).mean())
    assert score_error(scores, scores.double(), spread) == 0
    expected = float((rounded.double() - scores.double()).abs().max()) / spread
    assert score_error(rounded, scores.double(), spread) == pytest.approx(expected)
    assert score_error(torch.ones(2, 2), torch.ones(2, 2), 0.0) == 0


def test_scores_that_are_no_numbers_are_neither_distinct_nor_exact():
    scores = torch.full((3, 3), math.nan)
    assert distinct_share(scores) == 0
    scores[0, 0] = 1.0
    assert distinct_share(scores) == pytest.approx(1 / 9)
    assert math.isnan(score_error(scores, scores.double(), math.nan))
    assert math.isnan(score_error(scores, scores.double(), 1.0))


def test_the_histogram_counts_every_score_that_is_compared_once(drawn):
    scores, positives, ignored = drawn
    (of_positives, of_negatives), (low, high) = score_histogram(*drawn)
    taking_part = positives.any(dim=1)
    negatives = ~(positives | ignored) & taking_part[:, None]
    assert (sum(of_positives), sum(of_negatives)) == (int(positives.sum()), int(negatives.sum()))
    compared = scores[positives | negatives]
    assert (low, high) == pytest.approx((float(compared.min()), float(compared.max())))
    counts, _ = np.histogram(scores[negatives].numpy(), len(of_negatives), (low, high))
    assert abs(counts - np.array(of_negatives)).sum() <= 2  # an edge may fall on either side


def test_a_histogram_leaves_out_what_is_no_finite_number(drawn):
    scores, positives, ignored = drawn
    scores[0] = math.nan
    of_both, _ = score_histogram(scores, positives, ignored)
    assert sum(map(sum, of_both)) < int((positives | ~ignored).sum())
    assert score_histogram(scores * math.nan, positives, ignored) == (((), ()), (0.0, 0.0))
