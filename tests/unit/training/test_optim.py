import copy
import io
import math
import sys

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from colfolio.errors import ColfolioError, RecipeError
from colfolio.training.optim import (
    OptimiserSettings,
    build_optimiser,
    build_scaler,
    check_scale,
    learning_rate,
    optimiser_step,
)

IN_8_BITS = ["torchao_8bit", "bitsandbytes_8bit"]


@pytest.fixture(params=IN_8_BITS)
def in_8_bits(request):
    """Settings of each package that keeps the state in 8 bits; torchao's step runs uncompiled."""
    pytest.importorskip(request.param.removesuffix("_8bit"))
    with torch.compiler.set_stance("force_eager"):
        yield OptimiserSettings(state=request.param)


@pytest.mark.parametrize("state", ["fp32", *IN_8_BITS])
def test_weight_decay_is_on_matrices_alone(shared_retriever, state):
    if state != "fp32":
        pytest.importorskip(state.removesuffix("_8bit"))
    settings = OptimiserSettings(weight_decay=0.3, state=state)
    optimiser = build_optimiser(shared_retriever, settings)
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


def test_a_gradient_that_is_no_number_leaves_every_weight_as_it_was():
    settings = OptimiserSettings(lr=0.1)
    for value, moves in ((1.0, True), (math.nan, False), (math.inf, False)):
        model = linear_with_gradient(value)
        optimiser = AdamW(model.parameters(), fused=True)
        before = copy.deepcopy(model.state_dict())
        norm = optimiser_step(model, optimiser, 0.1, settings)
        assert bool(norm.isfinite()) == moves
        is_same = all(torch.equal(model.state_dict()[name], before[name]) for name in before)
        assert is_same != moves


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


def large_model():
    """A matrix worth 8 bits, a bias that is not, and an embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"linear": nn.Linear(256, 128), "embedding": nn.Embedding(64, 128)})


def step_with(model, optimiser, settings, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimiser_step(model, optimiser, 1e-2, settings)


def state_bytes(optimiser, parameter):
    """Of the running mean and square, tables of the package aside."""
    size = 0
    for name, value in optimiser.state[parameter].items():
        if isinstance(value, torch.Tensor) and not name.startswith(("step", "qmap")):
            inner = getattr(value, "tensor_attrs", None)
            parts = [getattr(value, each) for each in inner if each != "qmap"] if inner else [value]
            size += sum(part.nbytes for part in parts)
    return size


def test_the_state_of_a_matrix_takes_about_a_quarter(in_8_bits):
    model = large_model()
    optimiser = build_optimiser(model, in_8_bits)
    step_with(model, optimiser, in_8_bits, seed=0)
    weight, bias = model["linear"].weight, model["linear"].bias
    assert 0.25 <= state_bytes(optimiser, weight) / (8 * weight.numel()) < 0.26
    assert state_bytes(optimiser, bias) == 8 * bias.numel()


def test_bitsandbytes_keeps_embeddings_in_32_bits_as_it_advises():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, settings = large_model(), OptimiserSettings(state="bitsandbytes_8bit")
    optimiser = build_optimiser(model, settings)
    step_with(model, optimiser, settings, seed=0)
    weight = model["embedding"].weight
    assert state_bytes(optimiser, weight) == 8 * weight.numel()
    configured = bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config
    number = id(weight)
    assert number in configured
    del weight, model, optimiser
    assert number not in configured


def test_in_8_bits_the_weights_move_as_with_adamw(in_8_bits):
    before = large_model()
    moved = []
    for settings in (OptimiserSettings(), in_8_bits):
        model = copy.deepcopy(before)
        optimiser = build_optimiser(model, settings)
        steps = []
        for seed in range(4):
            step_with(model, optimiser, settings, seed)
            pairs = zip(model.parameters(), before.parameters(), strict=True)
            steps.append(torch.cat([(new - old).detach().flatten() for new, old in pairs]))
        moved.append(steps)
    # a rounding of the state shows from the second step on: 8 bits are half a per cent each
    for (exact, coarse), share in zip(
        zip(*moved, strict=True), (1e-3, 0.05, 0.05, 0.05), strict=True
    ):
        assert (coarse - exact).norm() <= share * exact.norm()


def test_a_state_in_8_bits_resumes_to_the_bit(in_8_bits):
    model = large_model()
    optimiser = build_optimiser(model, in_8_bits)
    for seed in range(3):
        step_with(model, optimiser, in_8_bits, seed)
    stream = io.BytesIO()
    torch.save(optimiser.state_dict(), stream)
    stream.seek(0)
    resumed = copy.deepcopy(model)
    later = build_optimiser(resumed, in_8_bits)
    later.load_state_dict(torch.load(stream, map_location="cpu", weights_only=True))
    for seed in range(3, 6):
        step_with(model, optimiser, in_8_bits, seed)
        step_with(resumed, later, in_8_bits, seed)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("state", IN_8_BITS)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(state, monkeypatch):
    name = state.removesuffix("_8bit")
    monkeypatch.setitem(sys.modules, f"{name}.optim", None)
    with pytest.raises(ColfolioError, match=rf"needs the package {name}.*'colfolio\[{name}\]'"):
        build_optimiser(nn.Linear(2, 2), OptimiserSettings(state=state))


@pytest.fixture
def scaled():
    """A layer, its optimiser, and a scaler that has seen a gradient."""
    settings = OptimiserSettings(clip_norm=1.0, weight_decay=0)
    layer = linear_with_gradient(0.1)
    scaler = build_scaler("fp16", torch.device("cpu"))
    scaler.scale(torch.ones(()))
    optimiser = build_optimiser(layer, settings)

    def step(gradient):
        layer.weight.grad = torch.tensor([gradient]) * scaler.get_scale()
        return optimiser_step(layer, optimiser, 0.1, settings, scaler)

    return layer, optimiser, scaler, step


def test_gradients_are_scaled_down_before_they_are_clipped(scaled):
    layer, optimiser, scaler, step = scaled
    seen = []
    optimiser.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad.clone()))
    assert step([30.0, 40.0]).item() == pytest.approx(50.0)
    torch.testing.assert_close(seen[0], torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2**16


@pytest.mark.parametrize("overflow", [float("inf"), float("nan")])
def test_a_step_whose_gradient_overflows_is_skipped_and_the_scale_halved(scaled, overflow):
    layer, optimiser, scaler, step = scaled
    step([0.3, 0.4])
    before = copy.deepcopy(optimiser.state_dict()["state"])
    weights = layer.weight.detach().clone()
    assert not step([overflow, 0.4]).isfinite()
    assert torch.equal(layer.weight, weights)
    after = optimiser.state_dict()["state"]
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name
    assert scaler.get_scale() == 2**15
    assert step([0.3, 0.4]).item() == pytest.approx(0.5)
    assert not torch.equal(layer.weight, weights)


def test_the_scale_doubles_after_2000_steps_and_the_count_is_resumed(scaled):
    _, _, scaler, step = scaled
    for _ in range(1999):
        step([0.3, 0.4])
    assert scaler.get_scale() == 2**16
    saved = scaler.state_dict()
    step([0.3, 0.4])
    assert scaler.get_scale() == 2**17
    resumed = build_scaler("fp16", torch.device("cpu"))
    resumed.load_state_dict(saved)
    resumed.scale(torch.ones(()))
    layer = linear_with_gradient(0.1)
    optimiser_step(
        layer, build_optimiser(layer, OptimiserSettings()), 0.1, OptimiserSettings(), resumed
    )
    assert resumed.get_scale() == 2**17


def test_gradients_that_overflow_at_any_scale_end_the_run(scaled):
    _, _, scaler, step = scaled
    for _ in range(16):
        step([float("nan"), 0.0])
    assert scaler.get_scale() == 1
    check_scale(scaler)
    step([float("nan"), 0.0])
    with pytest.raises(FloatingPointError, match="overflow fp16 at a loss scale of 1 already"):
        check_scale(scaler)


def test_a_step_in_fp16_without_any_gradient_changes_nothing(scaled):
    layer, optimiser, scaler, step = scaled
    step([0.3, 0.4])
    weights = layer.weight.detach().clone()
    assert optimiser_step(layer, optimiser, 0.1, OptimiserSettings(), scaler).item() == 0
    assert torch.equal(layer.weight, weights)
    step([0.3, 0.4])
    assert not torch.equal(layer.weight, weights)


def test_a_model_of_which_nothing_trains_is_refused():
    layer = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter of the model trains"):
        build_optimiser(layer, OptimiserSettings())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_scale_nothing(precision):
    scaler = build_scaler(precision, torch.device("cpu"))
    gradient = torch.ones(2)
    assert scaler.scale(gradient) is gradient
    assert scaler.state_dict() == {}
    layer = linear_with_gradient(0.1)
    settings = OptimiserSettings()
    norm = optimiser_step(layer, build_optimiser(layer, settings), 0.1, settings, scaler)
    assert norm.item() == pytest.approx(0.5)
