"""The gradient of answers is the same in any number of ranks, replicated or sharded."""

import numpy as np
import pytest
import torch
from conversing import QUESTION, generator_of, write_moving
from ranks import run_in_ranks

from colfolio.data.conversations import load_conversations
from colfolio.data.video import Clip
from colfolio.distributed import World, shard, whole
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.generator import Generator
from colfolio.training import TrainSettings, start_training, train
from colfolio.training.exact_batch import MemorySettings
from colfolio.training.generation import ExactText
from colfolio.training.text_objective import text_metrics

# rows of each rank in two batches; in a world of three one has none of the first
SHARES = {1: ([6], [3]), 2: ([4, 2], [1, 2]), 3: ([0, 5, 1], [1, 1, 1])}


def batches_of(generator):
    """Two batches of images and clips whose answers differ in length."""
    drawn = np.random.default_rng(0)
    sizes = [(28, 28), (56, 84), (28, 112), (84, 84), (56, 56), (28, 56), (112, 28), (56, 28)]
    visuals = [drawn.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    visuals.append(Clip(drawn.integers(0, 256, (3, 56, 28, 3), dtype=np.uint8), 0.5))
    answers = ["left " * (1 + row * row % 5) for row in range(9)]
    batch = generator.chat.conversations(visuals, [QUESTION] * 9, answers, range(9))
    return batch.rows(0, 6), batch.rows(6, 9)


def share_of(batch, sizes, rank):
    begin = sum(sizes[:rank])
    return batch.rows(begin, begin + sizes[rank])


def gradients_in(world, path, parallel, frozen):
    generator = Generator.from_pretrained(path, device="cpu").train()
    for part in frozen:
        generator.backbone.get_submodule(part).requires_grad_(False)
    cast_parameters(generator, torch.float64)
    if parallel == "fsdp2":
        shard(generator, generator.units(), world, methods=["run_below"])
    exact = ExactText(
        generator, MemorySettings(chunk_tokens=70), world=world, is_sharded=parallel == "fsdp2"
    )
    shares = zip(batches_of(generator), SHARES[world.size], strict=True)
    batches = [share_of(batch, sizes, world.rank) for batch, sizes in shares]
    summary = exact.backward(batches, [7, 8])
    world.sum_gradients(generator.parameters())
    named = generator.named_parameters()
    gradients = {name: whole(w.grad).clone() for name, w in named if w.grad is not None}
    numbers = (summary.loss, summary.accuracy, summary.answer_tokens, summary.tokens)
    return [number.item() for number in numbers], gradients


@pytest.fixture
def save(tiny_shape_of, tmp_path):
    def save(tied):
        generator_of(tiny_shape_of("qwen2_vl"), tied=tied).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def check(path, folder, size, parallel, frozen=()):
    numbers, expected = gradients_in(World(), path, "ddp", frozen)
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for found, gradients in run_in_ranks(gradients_in, size, folder, path, parallel, frozen):
        assert found == pytest.approx(numbers, rel=1e-12)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-12 * total, name


def test_two_ranks_have_the_gradient_of_one(save, tmp_path):
    check(save(tied=True), tmp_path / "ranks", 2, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [(), ("visual", "language_model.embed_tokens")])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_has_the_gradient_of_one(save, tmp_path, size, parallel, tied, frozen):
    check(save(tied), tmp_path / "ranks", size, parallel, frozen)


def run_in(world, path, folder, parallel):
    """Losses of a short run and of a held-out split, and the weights that came out."""
    settings = TrainSettings.model_validate(
        {
            "objective": "generation",
            "steps": 4,
            "batch": {"rows": 5},
            "accumulation": 2,
            "optimiser": {"lr": 1e-3, "warmup_steps": 0},
            "precision": "fp32",
            "parallel": parallel,
        }
    )
    state = start_training(Generator.from_pretrained(path, device="cpu"), settings, world)
    losses = [report.loss for report in train(state, load_conversations(folder, "train"))]
    held_out = text_metrics(state, load_conversations(folder, "validation"))
    weights = {name: whole(tensor) for name, tensor in state.model.weights().items()}
    return losses, held_out, weights


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_run_in_two_ranks_is_that_in_one(save, tmp_path, parallel):
    path = save(tied=True)
    write_moving(tmp_path / "moving", "train", 12)
    write_moving(tmp_path / "moving", "validation", 6)
    folder = tmp_path / "moving"
    losses, held_out, weights = run_in(World(), path, folder, "ddp")
    for found in run_in_ranks(run_in, 2, tmp_path / "ranks", path, folder, parallel):
        assert found[0] == pytest.approx(losses, rel=1e-4)
        assert found[1] == pytest.approx(held_out, rel=1e-4)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[2][name], tensor, rtol=1e-3, atol=1e-4)
