import math

import pytest
import torch
from torch import nn

from colfolio.training.optim import (
    OptimiserSettings,
    build_optimiser,
    learning_rate,
    optimiser_step,
)


def test_weight_decay_is_on_matrices_alone(shared_retriever):
    optimiser = build_optimiser(shared_retriever, OptimiserSettings(weight_decay=0.3))
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    for name, parameter in shared_retriever.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embed_tokens" not in name
        assert decay.pop(id(parameter)) == (0.3 if is_matrix else 0.0), name
    assert not decay


def test_frozen_parameters_are_left_out(retriever):
    retriever.backbone.visual.requires_grad_(False)
    optimiser = build_optimiser(retriever, OptimiserSettings())
    mine = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    assert mine == {id(weight) for weight in retriever.parameters() if weight.requires_grad}
    before = [weight.clone() for weight in retriever.backbone.visual.parameters()]
    retriever(retriever.collator.queries(["a"])).vectors.sum().backward()
    optimiser_step(retriever, optimiser, 0.1, OptimiserSettings())
    for old, new in zip(before, retriever.backbone.visual.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_rate_rises_in_a_line_then_falls_as_a_cosine():
    settings = OptimiserSettings(lr=2.0, warmup_steps=4, final_lr_share=0.1)
    rates = [learning_rate(step, 14, settings) for step in range(15)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 15):
        cosine = (1 + math.cos(math.pi * (step - 4) / 10)) / 2
        assert rates[step] == pytest.approx(2.0 * (0.1 + 0.9 * cosine))
    assert rates[14] == pytest.approx(0.2)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, 10, OptimiserSettings(lr=3.0, warmup_steps=0)) == 3.0


def test_a_run_shorter_than_its_warm_up_only_rises():
    settings = OptimiserSettings(lr=1.0, warmup_steps=10)
    assert [learning_rate(step, 3, settings) for step in range(3)] == [0.1, 0.2, 0.3]


def linear_with_gradient(value):
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0]]))
    layer.weight.grad = torch.tensor([[3.0 * value, 4.0 * value]])
    return layer


def test_a_large_gradient_is_scaled_down_to_the_norm_and_reported_as_it_was():
    settings = OptimiserSettings(clip_norm=1.0, weight_decay=0)
    layer = linear_with_gradient(10.0)
    seen = []
    layer.weight.register_hook(lambda _: None)
    optimiser = build_optimiser(layer, settings)
    optimiser.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad.clone()))
    norm = optimiser_step(layer, optimiser, 0.1, settings)
    assert norm.item() == pytest.approx(50.0)
    torch.testing.assert_close(seen[0], torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=1e-6)


def test_a_small_gradient_is_left_alone():
    settings = OptimiserSettings(clip_norm=1.0, weight_decay=0)
    layer = linear_with_gradient(0.1)
    optimiser = build_optimiser(layer, settings)
    seen = []
    optimiser.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad.clone()))
    optimiser_step(layer, optimiser, 0.1, settings)
    torch.testing.assert_close(seen[0], torch.tensor([[0.3, 0.4]]))


def test_a_step_uses_the_given_rate_and_clears_the_gradient():
    settings = OptimiserSettings(lr=9.0, weight_decay=0.5)
    layer = linear_with_gradient(0.1)
    optimiser = build_optimiser(layer, settings)
    optimiser_step(layer, optimiser, 0.01, settings)
    # the first step of Adam has the size of the rate; decay takes rate * decay off first
    expected = torch.full((1, 2), 1.0 * (1 - 0.01 * 0.5) - 0.01)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0},
        {"weight_decay": -1},
        {"warmup_steps": -1},
        {"final_lr_share": 2},
        {"clip_norm": 0},
    ],
)
def test_a_value_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        OptimiserSettings(**values)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9)])
def test_betas_outside_of_zero_to_one_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        OptimiserSettings(betas=betas)
