"""A model spread over ranks has the gradients, steps and state of the same model in one piece."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from ranks import run_in_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from colfolio.distributed import gather_state, place_optimiser_state, shard, whole
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.retriever import Retriever

TEXTS = ["red circle", "a", "chapter 12: results", "blue square left of a grey one"]
SIZES = [(28, 28), (56, 84), (28, 112), (84, 84)]


def units_of(retriever):
    """What is run by calling it, tensors in and out, and together holds every parameter."""
    towers = (retriever.backbone.visual, retriever.backbone.language_model)
    for child in [child for tower in towers for child in tower.children()]:
        modules = child if isinstance(child, nn.ModuleList) else [child]
        yield from (module for module in modules if any(True for _ in module.parameters()))
    yield retriever.projection


def chunks_of(retriever):
    """Each rank's calls: pages, then texts, of other lengths on each rank."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    collator = retriever.collator
    pages = [collator.documents([image]) for image in images]
    texts = [collator.queries([text]) for text in TEXTS]
    return [[pages[0], pages[1], texts[0], texts[1]], [pages[2], pages[3], texts[2], texts[3]]]


def loss_of(vectors):
    weights = torch.arange(vectors.numel(), dtype=vectors.dtype).view_as(vectors).sin()
    return (vectors * weights).sum() / 3


def backward_at_once(retriever, chunks, context):
    for chunk in chunks:
        with context():
            vectors = retriever(chunk).vectors
        loss_of(vectors).backward()


def backward_with_kept_graphs(retriever, chunks, context):
    """All graphs first, a run without one in between, then backward through each."""
    kept = []
    for chunk in chunks:
        with context():
            kept.append(retriever(chunk).vectors)
            with torch.no_grad():
                retriever(chunk)
    for vectors in kept:
        loss_of(vectors).backward()


def backward_by_recomputing(retriever, chunks, context):
    retriever.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    backward_at_once(retriever.train(), chunks, context)
    retriever.backbone.gradient_checkpointing_disable()


def freeze_some(retriever):
    """Whole units, and parts of units."""
    retriever.backbone.visual.requires_grad_(False)
    retriever.backbone.language_model.embed_tokens.requires_grad_(False)
    for name, parameter in retriever.backbone.language_model.layers.named_parameters():
        parameter.requires_grad_("q_proj" in name or "norm" in name)


def thaw_all(retriever):
    retriever.requires_grad_(True)


def gradients_of(retriever):
    """By name; None where there is none."""
    return {
        name: None if parameter.grad is None else whole(parameter.grad).clone()
        for name, parameter in retriever.named_parameters()
    }


def load(path, dtype=torch.float64):
    retriever = Retriever.from_pretrained(path, device="cpu")
    cast_parameters(retriever, dtype)
    return retriever


def sharded(path, world, dtype=torch.float64, **values):
    retriever = load(path, dtype)
    shard(retriever, list(units_of(retriever)), world, **values)
    return retriever


def summed_plainly(plain, backward, context=torch.enable_grad):
    """The gradient of all ranks' chunks in one piece."""
    plain.zero_grad()
    for chunks in chunks_of(plain):
        backward(plain, chunks, context)
    return gradients_of(plain)


def assert_close(mine, expected, share):
    for name, gradient in expected.items():
        assert (mine[name] is None) == (gradient is None), name
    found = {name: gradient for name, gradient in expected.items() if gradient is not None}
    total = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    for name, gradient in found.items():
        assert (mine[name] - gradient).norm() <= share * total, name


def check_gradients(world, path):
    plain, spread = load(path), sharded(path, world)
    assert all(isinstance(parameter, DTensor) for parameter in spread.parameters())
    own = chunks_of(spread)[world.rank]
    for change in (thaw_all, freeze_some):
        for backward in (backward_at_once, backward_with_kept_graphs, backward_by_recomputing):
            change(plain)
            change(spread)
            expected = summed_plainly(plain, backward_at_once)
            spread.zero_grad()
            backward(spread, own, torch.enable_grad)
            assert_close(gradients_of(spread), expected, 1e-12)
            clipped = nn.utils.clip_grad_norm_(spread.parameters(), 0.5)
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            torch.testing.assert_close(whole(clipped), norm, rtol=1e-12, atol=0)
            assert_close(gradients_of(spread), gradients_of(plain), 1e-12)


def check_one_reduction(world, path):
    """Gradients may also be kept whole until the last backward, which then reduces them all."""
    plain, spread = load(path), sharded(path, world)
    own = chunks_of(spread)[world.rank]
    assert isinstance(spread, FSDPModule)
    spread.set_requires_gradient_sync(False)
    backward_at_once(spread, own[:-1], torch.enable_grad)
    spread.set_requires_gradient_sync(True)
    backward_at_once(spread, own[-1:], torch.enable_grad)
    assert_close(gradients_of(spread), summed_plainly(plain, backward_at_once), 1e-12)


def check_mixed_precision(world, path):
    """Gathered in bf16 under autocast, gradients are as far from exact as without sharding."""
    exact = summed_plainly(load(path), backward_at_once)
    context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    plain = summed_plainly(load(path, torch.float32), backward_at_once, context)
    spread = sharded(path, world, torch.float32, compute_dtype=torch.bfloat16)
    backward_with_kept_graphs(spread, chunks_of(spread)[world.rank], context)
    mine = gradients_of(spread)
    assert {gradient.dtype for gradient in mine.values()} == {torch.float32}
    of_mine, of_plain = (
        torch.stack([(each[name] - exact[name]).norm() for name in exact]).norm()
        for each in (mine, plain)
    )
    assert 0 < of_mine <= 1.2 * of_plain
    return float(of_mine / of_plain)


def held_for_backward(retriever, chunk):
    """Bytes that the graph of a chunk holds, weights that are let go of aside."""
    held = {}

    def note(tensor):
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        vectors = retriever(chunk).vectors
    size = sum(storage.nbytes() for storage in held.values())
    vectors.sum().backward()
    return size


def check_no_weight_stays_in_the_graph(world, path):
    narrow = sharded(path, world, torch.float32, compute_dtype=torch.bfloat16)
    wide = sharded(path, world, torch.float32)
    chunk = chunks_of(narrow)[world.rank][0]
    matrices = sum(
        weight.numel() * 2
        for tower in (narrow.backbone.visual.blocks, narrow.backbone.language_model.layers)
        for weight in tower.parameters()
        if weight.ndim == 2
    )
    saved = held_for_backward(wide, chunk) - held_for_backward(narrow, chunk)
    assert saved >= matrices, (saved, matrices)


def steps(retriever, optimiser, backward_all, count):
    for _ in range(count):
        backward_all(retriever)
        optimiser.step()
        optimiser.zero_grad()


def adamw(retriever):
    return torch.optim.AdamW(retriever.parameters(), lr=1e-3, fused=True)


def check_state(world, path):
    """Whole state of a sharded run loads into a plain one and back, to the bit."""
    spread = sharded(path, world)
    optimiser = adamw(spread)

    def own_part(model):
        backward_at_once(model, chunks_of(model)[world.rank], torch.enable_grad)

    steps(spread, optimiser, own_part, 2)
    weights = gather_state(spread.weights())
    state = gather_state(optimiser.state_dict())
    if not world.is_main:
        assert all(value is None for value in weights.values())
    both = [(weights, state)] if world.is_main else [None]
    torch.distributed.broadcast_object_list(both)
    weights, state = both[0]
    assert not any(isinstance(value, DTensor) for value in weights.values())
    plain = load(path)
    named = {name.replace("custom_text_proj", "projection"): v for name, v in weights.items()}
    model = {n if n.startswith("projection") else f"backbone.{n}": v for n, v in named.items()}
    plain.load_state_dict(model)
    plain_optimiser = adamw(plain)
    plain_optimiser.load_state_dict(place_optimiser_state(plain_optimiser, copy.deepcopy(state)))
    again = load(path)
    again.load_state_dict(model)
    shard(again, list(units_of(again)), world)
    again_optimiser = adamw(again)
    again_optimiser.load_state_dict(place_optimiser_state(again_optimiser, copy.deepcopy(state)))
    assert_same(gather_state(again_optimiser.state_dict()), state, world)
    local = again_optimiser.state_dict()["state"][0]["exp_avg"].to_local()
    assert local.untyped_storage().nbytes() == local.nbytes
    summed_plainly(plain, backward_at_once)
    for model_with_state, its_optimiser in ((spread, optimiser), (again, again_optimiser)):
        own_part(model_with_state)
        its_optimiser.step()
    assert_same(gather_state(again.weights()), gather_state(spread.weights()), world)
    plain_optimiser.step()
    for name, weight in plain.weights().items():
        torch.testing.assert_close(whole(again.weights()[name]), weight, rtol=1e-10, atol=1e-12)


def assert_same(found, expected, world):
    """Tensors that are on the main rank, to the bit."""
    if not world.is_main:
        return
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key], world)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


class TwoSteps(nn.Module):
    """A model that can be run to the middle, whose output is no tensor."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def begin(self, inputs):
        return {"middle": self.first(inputs).tanh()}

    def forward(self, inputs):
        return {"end": self.second(self.begin(inputs)["middle"])}


def check_methods(world):
    """A method beside forward may come before it, with a graph that outlives a backward."""
    plain, spread = TwoSteps(), TwoSteps()
    shard(spread, [spread.first, spread.second], world, methods=["begin"])
    inputs = torch.arange(6.0).view(2, 3) / 6
    middle = spread.begin(inputs)["middle"]
    assert torch.equal(middle, plain.begin(inputs)["middle"])
    spread(inputs)["end"].square().sum().backward()
    middle.sum().backward()
    plain(inputs)["end"].square().sum().backward()
    plain.begin(inputs)["middle"].sum().backward()
    for name, gradient in gradients_of(plain).items():
        torch.testing.assert_close(gradients_of(spread)[name], gradient * world.size)


def check_refusal(world, path):
    retriever = load(path)
    with pytest.raises(ValueError, match=r"belong to a unit.*projection\.weight"):
        shard(retriever, list(units_of(retriever))[:-1], world)


def everything(world, path):
    check_refusal(world, path)
    check_methods(world)
    check_gradients(world, path)
    check_one_reduction(world, path)
    check_state(world, path)
    check_no_weight_stays_in_the_graph(world, path)
    return check_mixed_precision(world, path)


@pytest.mark.slow
def test_a_sharded_model_has_the_gradients_steps_and_state_of_a_whole_one(retriever, tmp_path):
    for name, parameter in retriever.named_parameters():
        if parameter.ndim == 1:  # norms and biases begin as numbers that bf16 holds exactly
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    retriever.save_pretrained(tmp_path / "model")
    ratios = run_in_ranks(everything, 2, tmp_path / "ranks", tmp_path / "model")
    assert len(ratios) == 2
