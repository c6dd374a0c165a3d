"""The first module, or gradient, that is not finite is found where it was planted."""

import pytest
import torch
from torch import nn

from colfolio.data.sampler import SamplerPosition
from colfolio.diagnosis.signals.finite import find_fault, gradient_fault, watching
from colfolio.diagnosis.signals.trial_steps import drawn_batches
from colfolio.training import TrainSettings, start_training
from colfolio.training.retrieval_objective import batch_backward


@pytest.fixture
def search(shapes):
    """Looks for the fault of a model on its first batch."""

    def search(retriever, **values):
        settings = {"steps": 3, "batch": {"rows": 6}, "precision": "fp32"} | values
        state = start_training(retriever, TrainSettings.model_validate(settings))

        def run_again():
            for batch in drawn_batches(state, shapes, SamplerPosition(), 1):
                batch_backward(state, batch, step=0)

        found = find_fault(state.model, run_again)
        assert all(parameter.grad is None for parameter in state.model.parameters())
        assert not any(module._forward_hooks for module in state.model.modules())
        return found

    return search


NAMES = [
    "backbone.visual.blocks.1.mlp.fc2",
    "backbone.visual.merger.mlp.0",
    "backbone.language_model.layers.0.self_attn.v_proj",
    "backbone.language_model.layers.1.mlp.down_proj",
    "backbone.language_model.norm",
    "projection",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_found_in_its_module(retriever, search, name, value):
    with torch.no_grad():
        retriever.get_submodule(name).weight.view(-1)[0] = value
    assert search(retriever) == ("loss", name)


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "merger", "layers[0:1]"]])
def test_frozen_layers_are_searched_too(retriever, search, frozen):
    with torch.no_grad():
        retriever.backbone.visual.blocks[1].attn.proj.bias[0] = float("nan")
    assert search(retriever, frozen=frozen) == ("loss", "backbone.visual.blocks.1.attn.proj")


class BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context, states):
        return states.clone()

    @staticmethod
    def backward(_context, *gradients):
        return gradients[0] * float("nan")


class Breaking(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return BrokenBackward.apply(self.inner(states))


def test_a_gradient_that_is_no_number_is_found_nearest_to_the_loss(retriever, search):
    layer = retriever.backbone.language_model.layers[0].mlp
    layer.down_proj = Breaking(layer.down_proj)
    what, name = search(retriever)
    assert what == "gradient"
    assert name == "backbone.language_model.layers.0.mlp.down_proj.inner.weight"


def test_a_sound_model_has_no_fault(retriever, search):
    assert search(retriever) == ("loss", "")


def test_weights_that_the_failed_step_destroyed_say_nothing(retriever, search):
    with torch.no_grad():
        for parameter in retriever.parameters():
            parameter.fill_(float("nan"))
    assert search(retriever) == ("loss", "")


def test_modules_are_told_in_the_order_in_which_they_end():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with torch.no_grad():
        model[1][0].bias.fill_(float("nan"))
    with watching(model) as seen:
        model(torch.ones(1, 2)).sum().backward()
    assert list(seen.order) == ["0", "1.0", "1.1", "1", "Sequential"]
    assert seen.wrong == ["1.0", "1.1", "1", "Sequential"]
    assert gradient_fault(model, seen.order) == ""
