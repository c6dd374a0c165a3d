"""Gradient signals and the range of rates, on copies of a model."""

import math
from itertools import pairwise

import pytest
import torch

from colfolio.data.sampler import SamplerPosition
from colfolio.diagnosis.signals.gradients import gradient_signals, noise_scale, part_gradients
from colfolio.diagnosis.signals.rate_range import highest_falling, rate_range
from colfolio.diagnosis.signals.trial_steps import copied_state, drawn_batches
from colfolio.training import TrainSettings, start_training, train
from colfolio.training.retrieval_objective import batch_backward


@pytest.fixture
def settings():
    return TrainSettings.model_validate(
        {
            "steps": 3,
            "batch": {"rows": 6},
            "optimiser": {"lr": 1e-2, "warmup_steps": 1},
            "precision": "fp32",
        }
    )


@pytest.fixture
def batches(retriever, settings, shapes):
    state = start_training(retriever, settings)
    return list(drawn_batches(state, shapes, SamplerPosition(), 3))


def test_the_first_gradient_is_that_of_the_first_step(make_retriever, settings, batches, shapes):
    signals = gradient_signals(make_retriever(), settings, batches)
    report = next(iter(train(start_training(make_retriever(), settings), shapes)))
    assert signals.norm == pytest.approx(report.gradient_norm, rel=1e-5)
    assert set(signals.parts) == set(report.parts)
    for part, found in signals.parts.items():
        assert found.norm == pytest.approx(report.parts[part].gradient_norm, rel=1e-5)


def test_the_model_that_is_given_stays_as_it_is(make_retriever, settings, batches):
    retriever = make_retriever().eval()
    weights, state = retriever.fingerprint(), torch.get_rng_state()
    gradient_signals(retriever, settings, batches)
    rate_range(retriever, settings, batches, steps=3)
    assert retriever.fingerprint() == weights
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in retriever.parameters())
    assert not retriever.training


def test_numbers_without_gradient_are_dead(make_retriever, settings, batches):
    state = copied_state(make_retriever(), settings)
    batch_backward(state, batches[0], step=0)
    model = state.retriever
    model.projection.weight.grad[:4] = 0
    model.projection.bias.grad = None
    dead = (4 * 32 + 16) / (16 * 32 + 16)
    assert part_gradients(model)["projection"].dead == pytest.approx(dead)
    assert part_gradients(model)["norm"].dead == 0
    assert part_gradients(model)["embedding"].dead > 0.3  # tokens that no query has


def test_the_noise_scale_finds_what_gradients_were_drawn_from():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((200,), 0.5)
    found = []
    for _ in range(300):
        drawn = mean + 2 * torch.randn(8, 200, generator=generator)
        squares = drawn.square().sum(dim=1).tolist()
        found.append(noise_scale(squares, float(drawn.mean(dim=0).square().sum())))
    signal = sum(each.signal for each in found) / len(found)
    noise = sum(each.noise for each in found) / len(found)
    assert signal == pytest.approx(200 * 0.25, rel=0.05)
    assert noise == pytest.approx(200 * 4, rel=0.05)


def test_equal_gradients_have_no_noise_and_opposite_ones_no_signal():
    assert noise_scale([4.0, 4.0, 4.0], 4.0).batches == 0
    assert noise_scale([4.0, 4.0], 0.0).batches == math.inf


def test_the_noise_asks_for_rows(make_retriever, settings, batches):
    signals = gradient_signals(make_retriever(), settings, batches)
    assert signals.rows == pytest.approx(6 * signals.scale.batches)
    assert gradient_signals(make_retriever(), settings, batches[:1]).scale is None


def test_the_rate_rises_until_the_loss_does(make_retriever, settings, batches):
    found = rate_range(make_retriever(), settings, batches[:1], low=1e-6, high=10.0, steps=25)
    assert all(one < other for one, other in pairwise(found.rates))
    assert len(found.rates) == len(found.losses)
    assert 1e-4 < found.highest < 1
    assert min(found.losses) < found.losses[0]
    assert found.losses[-1] > min(found.losses)


def test_a_loss_that_never_falls_has_no_rate():
    assert highest_falling([0.1, 0.2, 0.3], [1.0, 2.0, math.nan]) is None
    assert highest_falling([0.1], [1.0]) is None


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"low": 0.0}, {"low": 2.0}])
def test_a_range_that_does_not_rise_is_refused(retriever, settings, batches, wrong):
    with pytest.raises(ValueError, match="a range test needs"):
        rate_range(retriever, settings, batches, **wrong)
