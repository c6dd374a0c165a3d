"""Generators are adapted, frozen and opened in stages as retrievers are."""

import pytest
from adapters import state_of
from conversing import generator_of, write_moving
from thawing import all_of, assert_same, watched

from colfolio.data.conversations import load_conversations
from colfolio.models.adapters import has_adapter
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
def moving(tmp_path_factory):
    """Two batches an epoch."""
    folder = tmp_path_factory.mktemp("moving")
    write_moving(folder, "train", 24, seed=1)
    return load_conversations(folder, "train")


@pytest.mark.parametrize("name", POLICIES)
def test_exactly_the_named_parts_change_and_a_resumed_run_is_the_same(
    tiny_shape_of, moving, tmp_path, name
):
    values, table = POLICIES[name]
    settings = TrainSettings.model_validate(BASE | values)
    state = start_training(generator_of(tiny_shape_of("colfolio_grafted")), settings)
    reports = watched(state, moving, table, lambda: save_checkpoint(state, tmp_path, DATA, keep=9))
    resumed = load_checkpoint(tmp_path / "step-000003", settings, DATA)
    rest = watched(resumed, moving, table)
    assert [each.loss for each in rest] == [each.loss for each in reports[3:]]
    assert_same(all_of(resumed), all_of(state))


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
