import pytest
import torch
from torch import nn

from colfolio.maxsim import product
from colfolio.models.linear import FastLinear, speed_up_linears


@pytest.fixture
def onednn_for_all(monkeypatch):
    """Lets small products go the fast way too; gives how many did."""
    monkeypatch.setattr(product, "_WORTH_ONEDNN", 0)
    assert product._has_onednn()  # asked once, which is a product too
    multiply, calls = product._onednn_product, []
    monkeypatch.setattr(
        product, "_onednn_product", lambda *sides: calls.append(1) or multiply(*sides)
    )
    return calls


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(layer, inputs, weights):
    inputs = inputs.clone().requires_grad_()
    layer.zero_grad()
    out = layer(inputs)
    (out * weights).sum().backward()
    return [out.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (1, 24)])
def test_it_is_a_linear_layer_forward_and_backward(onednn_for_all, shape, bias):
    plain = nn.Linear(24, 40, bias=bias)
    exact = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    inputs, weights = draw(*shape), draw(*shape[:-1], 40, seed=1)
    theirs = results(plain, inputs, weights)
    truth = results(exact, inputs.double(), weights.double())
    assert not onednn_for_all
    speed_up_linears(plain)
    mine = results(plain, inputs, weights)
    assert len(onednn_for_all) == 3
    for fast, slow, right in zip(mine, theirs, truth, strict=True):
        assert (fast - right).abs().max() <= 2 * (slow - right).abs().max() + 1e-6


def test_what_is_frozen_costs_no_product(onednn_for_all):
    layer = FastLinear(24, 40)
    layer.weight.requires_grad_(False)
    layer(draw(5, 24).requires_grad_()).sum().backward()
    assert len(onednn_for_all) == 2
    layer.weight.requires_grad_(True)
    layer(draw(5, 24)).sum().backward()
    assert len(onednn_for_all) == 4


def test_autocast_and_other_dtypes_go_the_usual_way(onednn_for_all):
    layer = FastLinear(24, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(draw(5, 24)).dtype == torch.bfloat16
    layer.double()(draw(5, 24, dtype=torch.float64))
    assert not onednn_for_all


def test_a_model_keeps_its_names_weights_and_other_kinds_of_layers():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 4), Other(4, 5), nn.ReLU())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    speed_up_linears(model)
    assert [type(layer) for layer in model] == [FastLinear, Other, nn.ReLU]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
