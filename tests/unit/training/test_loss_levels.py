"""Chance and floor are what constant scores, and the best scores in range, come to."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from colfolio.batch import MultiVectors
from colfolio.maxsim import maxsim
from colfolio.training.losses import (
    LossSettings,
    chance_level,
    contrastive_loss,
    floor_level,
    loss_of_scores,
    maxsim_range,
)

KINDS = {
    "info_nce": {},
    "symmetric": {"symmetric": True},
    "pairwise": {"kind": "pairwise"},
    "sigmoid": {"kind": "sigmoid", "bias": -1.0},
    "distillation": {"kind": "distillation"},
}
WANTED = [[0], [1, 4], [2], []]  # the last query takes no part


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def masks(kind):
    """Positives, ignored and, for distillation, a teacher; 4 queries and 6 documents."""
    positives = torch.zeros(4, 6, dtype=torch.bool)
    for query, wanted in enumerate(WANTED):
        positives[query, wanted] = True
    ignored = torch.zeros_like(positives)
    ignored[3], ignored[0, 3], ignored[2, 5] = True, True, True
    if kind != "distillation":
        return positives, ignored, None
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(4, 6, generator=generator, dtype=torch.float64) * 3
    teacher[1, 2] = teacher[0, 5] = math.nan
    return positives, ignored, teacher


def settings_of(kind, temperature=1.0):
    return LossSettings(temperature=temperature, **KINDS[kind])


def loss_of(scores, kind, temperature):
    positives, ignored, teacher = masks(kind)
    return loss_of_scores(scores, positives, ignored, settings_of(kind, temperature), teacher)


def chance_of(kind, temperature):
    positives, ignored, teacher = masks(kind)
    return chance_level(positives, ignored, settings_of(kind, temperature), teacher).item()


def floor_of(kind, temperature, score_range):
    positives, ignored, teacher = masks(kind)
    settings = settings_of(kind, temperature)
    return floor_level(positives, ignored, settings, score_range, teacher).item()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_chance_is_the_least_loss_of_equal_scores(kind, temperature):
    equal = torch.zeros((), dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([equal], max_iter=200, tolerance_grad=1e-12)

    def closure():
        descent.zero_grad()
        loss = loss_of((equal * temperature).expand(4, 6), kind, temperature)
        loss.backward()
        return loss

    descent.step(closure)
    assert closure().item() == pytest.approx(chance_of(kind, temperature), rel=1e-6)


@pytest.mark.parametrize("level", [-7.0, 0.0, 1e4])
@pytest.mark.parametrize("kind", ["info_nce", "symmetric", "pairwise", "distillation"])
def test_chance_is_the_loss_of_any_equal_scores_but_for_sigmoid(kind, level):
    loss = loss_of(torch.full((4, 6), level, dtype=torch.float64), kind, 0.5)
    assert loss.item() == pytest.approx(chance_of(kind, 0.5), rel=1e-6)


def test_sigmoid_starts_at_chance_with_the_bias_that_its_docstring_names():
    positives = torch.eye(8, dtype=torch.bool)
    ignored = torch.zeros_like(positives)
    scores, temperature = torch.full((8, 8), 0.4), 0.1
    bias = math.log(8 / 56) - 0.4 / temperature
    settings = LossSettings(kind="sigmoid", temperature=temperature, bias=bias)
    summary = contrastive_loss(scores, positives, ignored, settings)
    torch.testing.assert_close(summary.loss, summary.chance)
    unfit = LossSettings(kind="sigmoid", temperature=temperature)
    assert contrastive_loss(scores, positives, ignored, unfit).loss > 5 * summary.chance


@pytest.mark.parametrize("score_range", [(0.0, 1.0), (-2.0, 3.0)])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_free_scores_in_range_descend_to_the_floor_and_no_further(kind, temperature, score_range):
    low, high = score_range
    middle = (low + high) / 2
    scores = torch.full((4, 6), middle, dtype=torch.float64, requires_grad=True)
    for step in range(600):
        loss = loss_of(scores, kind, temperature)
        (gradient,) = torch.autograd.grad(loss, scores)
        # steps that shrink slowly, whatever the size of the gradient: it fades towards the floor
        direction = gradient / gradient.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)
        with torch.no_grad():
            scores.sub_((high - low) * 0.98**step * direction).clamp_(low, high)
    floor = floor_of(kind, temperature, score_range)
    assert loss.item() == pytest.approx(floor, rel=2e-3, abs=1e-6)
    assert loss.item() >= floor - 1e-6


@given(st.sampled_from(list(KINDS)), st.integers(0, 999), st.floats(0.1, 3), st.booleans())
def test_no_scores_in_range_go_below_the_floor(kind, seed, temperature, at_the_ends):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    low, high = torch.tensor([[-1.0], [-3.0], [0.0], [-2.0]]), torch.tensor([[1.0]] * 4)
    scores = low + (share.round() if at_the_ends else share) * (high - low)
    floor = floor_of(kind, temperature, torch.cat([low, high], dim=1))
    assert loss_of(scores, kind, temperature).item() >= floor * (1 - 1e-5) - 1e-6


def test_a_range_for_each_query_means_what_one_for_all_means(kind):
    alike = torch.tensor([[-2.0, 3.0]]).expand(4, 2)
    assert floor_of(kind, 0.7, alike) == pytest.approx(floor_of(kind, 0.7, (-2.0, 3.0)))


def test_a_floor_lies_below_chance_and_falls_to_zero_as_the_range_grows(kind):
    floors = [floor_of(kind, 1.0, (-size, size)) for size in (0.2, 1.0, 4.0, 30.0)]
    assert floors == sorted(floors, reverse=True)
    assert floors[-1] == pytest.approx(0, abs=1e-6)
    if kind != "sigmoid":  # its bias may be of no use in a narrow range
        assert floors[0] < chance_of(kind, 1.0)


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0])
def test_levels_with_one_positive_are_those_of_the_table(temperature):
    positives = torch.eye(32, dtype=torch.bool)
    ignored = torch.zeros_like(positives)
    w, n = 1 / temperature, 31

    def levels(**values):
        settings = LossSettings(temperature=temperature, **values)
        summary = contrastive_loss(
            positives.float(), positives, ignored, settings, None, (0.0, 1.0)
        )
        return summary.chance.item(), summary.floor.item()

    def softplus(x):
        return F.softplus(torch.tensor(x, dtype=torch.float64)).item()

    info_nce = (math.log(n + 1), math.log1p(n * math.exp(-w)))
    assert levels() == pytest.approx(info_nce, rel=1e-5)
    assert levels(symmetric=True) == pytest.approx(info_nce, rel=1e-5)
    pairwise = (math.log(2), math.log1p(math.exp(-w)))
    assert levels(kind="pairwise") == pytest.approx(pairwise, rel=1e-5)
    sigmoid = (math.log(n + 1) + n * math.log((n + 1) / n), softplus(-w + 4) + n * softplus(-4.0))
    assert levels(kind="sigmoid", bias=-4.0) == pytest.approx(sigmoid, rel=1e-5)


def test_length_normalised_scores_leave_pairwise_at_0_313():
    positives = torch.eye(4, dtype=torch.bool)
    settings = LossSettings(kind="pairwise")
    floor = floor_level(positives, torch.zeros_like(positives), settings, (0.0, 1.0))
    assert floor.item() == pytest.approx(0.3133, abs=1e-4)


def test_a_teacher_that_fits_into_the_range_can_be_followed_to_the_end():
    positives, ignored, teacher = masks("distillation")
    settings = LossSettings(kind="distillation", temperature=0.5)
    spread = teacher.nan_to_num(0).amax() - teacher.nan_to_num(0).amin()
    for share, can_be in [(1.01, True), (0.5, False)]:
        reach = (0.0, float(spread) * share)
        floor = floor_level(positives, ignored, settings, reach, teacher).item()
        assert (floor < 1e-9) == can_be


def test_maxsim_of_unit_vectors_stays_in_its_range_and_reaches_both_ends():
    generator = torch.Generator().manual_seed(0)

    def rows(*lengths):
        drawn = [torch.randn(length, 4, generator=generator) for length in lengths]
        return MultiVectors.from_list([F.normalize(row, dim=1) for row in drawn])

    queries, documents = rows(1, 3, 7), rows(2, 5)
    low, high = maxsim_range(queries.lengths).unbind(dim=1)
    scores = maxsim(queries, documents)
    assert ((low[:, None] < scores) & (scores < high[:, None])).all()

    vector = F.normalize(torch.ones(1, 4))
    query = MultiVectors.from_list([vector.repeat(3, 1)])
    ends = maxsim(query, MultiVectors.from_list([vector, -vector]))
    positives = torch.tensor([[True, False]])
    for kind in ("info_nce", "pairwise", "sigmoid"):
        settings = LossSettings(kind=kind)
        summary = contrastive_loss(
            ends, positives, ~positives & positives, settings, None, maxsim_range(query.lengths)
        )
        torch.testing.assert_close(summary.loss, summary.floor)


def test_the_floor_is_zero_where_the_range_is_not_known(kind):
    positives, ignored, teacher = masks(kind)
    scores = torch.zeros(4, 6)
    assert contrastive_loss(scores, positives, ignored, settings_of(kind), teacher).floor == 0


@pytest.mark.parametrize("score_range", [(1.0, 0.0), (1.0, 1.0), (-math.inf, 1.0), (0.0, math.nan)])
def test_a_range_that_is_none_is_refused(score_range):
    with pytest.raises(ValueError, match="lower end, upper end"):
        floor_of("info_nce", 1.0, score_range)
