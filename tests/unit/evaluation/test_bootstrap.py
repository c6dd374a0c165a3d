import pytest
import torch

from colfolio.evaluation import bootstrap as bootstrap_module
from colfolio.evaluation.bootstrap import bootstrap_interval


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(2000, 1, generator=generator, dtype=torch.float64)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std().item() / 2000**0.5
    assert low.item() == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert high.item() == pytest.approx(values.mean().item() + half, abs=0.15 * half)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, again, other = (bootstrap_interval(values, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_in_pieces_draws_every_resample(monkeypatch):
    monkeypatch.setattr(bootstrap_module, "_DRAWN_AT_ONCE", 150)
    values = torch.rand(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values, num_resamples=1000)
    assert low < values.mean() < high


def test_equal_values_have_no_spread():
    low, high = bootstrap_interval(torch.full((10, 3), 0.25, dtype=torch.float64))
    assert low.tolist() == pytest.approx([0.25] * 3)
    assert high.tolist() == pytest.approx([0.25] * 3)


def test_no_queries_are_an_error():
    with pytest.raises(ValueError, match="got 0 queries"):
        bootstrap_interval(torch.zeros(0, 1, dtype=torch.float64))
