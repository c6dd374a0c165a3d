"""Generators are adapted, frozen and opened in stages as retrievers are."""

from pathlib import Path

import pytest
from adapters import state_of
from conversing import generator_of, write_moving
from ranks import run_in_ranks
from thawing import all_of, assert_same, tensors_of, watched

from colfolio.data.conversations import load_conversations
from colfolio.distributed import World
from colfolio.models.adapters import has_adapter
from colfolio.models.contract import hash_weights
from colfolio.models.generator import Generator
from colfolio.training import (
    TrainSettings,
    load_checkpoint,
    save_checkpoint,
    save_model,
    start_training,
)

DATA = "a fingerprint"
BASE = {
    "objective": "generation",
    "steps": 6,
    "seed": 3,
    "batch": {"rows": 12},
    "optimiser": {"lr": 1e-2, "warmup_steps": 2},
    "precision": "fp32",
}
LORA = {"rank": 2, "dropout": 0.1, "projection": "frozen"}
STAGES = [
    {"open": ["layers[1]"], "step": 2, "lr": 1e-3},
    {"open": ["all"], "epoch": 2.0, "lr": 1e-3, "depth_decay": 0.7},
]
# settings, and from which step on which parts change
POLICIES = {
    "frozen": (
        {"frozen": ["vision", "merger"], "features": {"ram_mb": 9.0}},
        {0: ["embedding", "layers", "norm", "projection"]},
    ),
    "thaw": (
        {"frozen": ["all"], "thaw": [STAGES[0] | {"step": 0}, STAGES[1]]},
        {0: ["layers[1]"], 4: ["all"]},
    ),
    "lora, then full": (
        {"lora": LORA, "thaw": STAGES},
        {0: ["adapters"], 2: ["adapters", "layers[1]"], 4: ["all"]},
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two batches an epoch."""
    folder = tmp_path_factory.mktemp("moving")
    write_moving(folder, "train", 24, seed=1)
    return str(folder)


@pytest.fixture
def moving(data):
    return load_conversations(Path(data), "train")


@pytest.fixture
def model(tiny_shape_of, tmp_path):
    generator_of(tiny_shape_of("colfolio_grafted")).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def every_policy(world, model, data, folder, parallel):
    """Losses of each policy; raises if another tensor changes or a resumed run is another one."""
    moving, found = load_conversations(Path(data), "train"), {}
    for name, (values, table) in POLICIES.items():
        settings = TrainSettings.model_validate(BASE | values | {"parallel": parallel})
        state = start_training(Generator.from_pretrained(model, device="cpu"), settings, world)
        saved = Path(folder) / name
        reports = watched(
            state, moving, table, lambda at=state, to=saved: save_checkpoint(at, to, DATA, keep=9)
        )
        resumed = load_checkpoint(saved / "step-000003", settings, DATA, "cpu", world)
        rest = watched(resumed, moving, table)
        assert [each.loss for each in rest] == [each.loss for each in reports[3:]], name
        expected, again = all_of(state), all_of(resumed)
        if world.is_main:
            assert_same(again, expected, name)
        world.same_everywhere(hash_weights(tensors_of(resumed.model)), "weights")
        found[name] = [each.loss for each in reports]
    return found


def test_exactly_the_named_parts_change_and_a_resumed_run_is_the_same(model, data, tmp_path):
    every_policy(World(), model, data, tmp_path, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_change_the_same_parts_and_resume_to_the_bit(parallel, model, data, tmp_path):
    folder = str(tmp_path / "runs")
    first, second = run_in_ranks(
        every_policy, 2, tmp_path / "ranks", model, data, folder, parallel, timeout=600.0
    )
    assert first == second
    alone = every_policy(World(), model, data, tmp_path / "alone", "ddp")
    for name, losses in alone.items():
        assert first[name] == pytest.approx(losses, rel=2e-3), name


def test_a_generator_with_adapters_is_saved_whole(tiny_shape_of, moving, tmp_path):
    settings = TrainSettings.model_validate(BASE | {"lora": LORA | {"dropout": 0.0}})
    state = start_training(generator_of(tiny_shape_of("colfolio_grafted")), settings)
    watched(state, moving, {0: ["adapters"]})
    before = state_of(state.model)
    save_model(state, tmp_path / "model", base="somewhere")
    saved = Generator.from_pretrained(tmp_path / "model", device="cpu")
    assert not has_adapter(saved)
    assert_same(state_of(state.model), before)
    base = generator_of(tiny_shape_of("colfolio_grafted")).weights()
    adapted = [name for name, weight in saved.weights().items() if (weight != base[name]).any()]
    assert len(adapted) == 2 * 7  # seven of each layer
