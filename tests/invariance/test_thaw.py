"""At every stage of every policy exactly the named parameters change, in any number of ranks."""

from pathlib import Path

import pytest
from ranks import run_in_ranks
from thawing import all_of, assert_same, tensors_of, watched

from colfolio.data.dataset import load_dataset
from colfolio.distributed import World
from colfolio.models.contract import hash_weights
from colfolio.models.retriever import Retriever
from colfolio.training import (
    TrainSettings,
    load_checkpoint,
    save_checkpoint,
    start_training,
)

DATA = "a fingerprint"
STEPS = 6
BASE = {
    "steps": STEPS,
    "seed": 3,
    "batch": {"rows": 6},
    "memory": {"chunk_tokens": 60},
    "optimiser": {"lr": 1e-2, "warmup_steps": 2},
    "precision": "fp32",
    "threads": 1,
}
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.1, "projection": "full"}
BELOW = ["vision", "merger", "embedding", "layers", "norm"]
TOP = {"open": ["layers[1]", "norm"], "step": 2, "lr": 3e-3, "warmup": 2}
REST = {"open": ["all"], "step": 4, "lr": 2e-3, "depth_decay": 0.5}
# settings, and from which step on which parts of the model change
POLICIES = {
    "full": ({}, {0: ["all"]}),
    "frozen": (
        {"frozen": ["vision", "merger", "layers[0]"]},
        {0: ["embedding", "layers[1]", "norm", "projection"]},
    ),
    "lora, projection adapted": ({"lora": LORA | {"projection": "adapter"}}, {0: ["adapters"]}),
    "lora, projection full": ({"lora": LORA}, {0: ["adapters", "projection"]}),
    "lora, projection frozen": (
        {"lora": LORA | {"projection": "frozen", "vision": ["attn.qkv"]}},
        {0: ["adapters"]},
    ),
    "thaw by step": (
        {"frozen": BELOW, "thaw": [TOP, REST]},
        {0: ["projection"], 2: ["projection", "layers[1]", "norm"], 4: ["all"]},
    ),
    "thaw by epoch": (
        {
            "frozen": BELOW,
            "features": {"ram_mb": 20.0},
            "thaw": [
                {"open": ["merger"], "epoch": 0.5, "lr": 1e-3},
                {"open": ["vision[1]"], "epoch": 1.0, "lr": 1e-3},
            ],
        },
        {0: ["projection"], 2: ["projection", "merger"], 4: ["projection", "merger", "vision[1]"]},
    ),
    "thaw at chance": (
        {
            "loss": {"temperature": 1e4},
            "frozen": BELOW,
            "thaw": [{"open": ["norm"], "at_chance": 2, "lr": 1e-3}],
        },
        {0: ["projection"], 2: ["projection", "norm"]},
    ),
    "thaw by margin": (
        {
            "optimiser": {"lr": 1e-5, "warmup_steps": 0},
            "frozen": BELOW,
            "thaw": [{"open": ["embedding"], "margin_flat": 1, "lr": 1e-3}],
            "thaw_window": 2,
        },
        {0: ["projection"], 4: ["projection", "embedding"]},
    ),
    "lora, then full": (
        {"lora": LORA, "thaw": [TOP, REST]},
        {0: ["adapters", "projection"], 2: ["adapters", "projection", "layers[1]", "norm"]}
        | {4: ["all"]},
    ),
    "adapters wait": (
        {
            "lora": LORA,
            "frozen": ["adapters"],
            "thaw": [{"open": ["adapters"], "step": 2, "lr": 1e-2}],
        },
        {0: ["projection"], 2: ["projection", "adapters"]},
    ),
    "nothing at first": (
        {"frozen": ["all"], "thaw": [{"open": ["projection"], "step": 0, "lr": 1e-2}, REST]},
        {0: ["projection"], 4: ["all"]},
    ),
}


def settings_of(name, **values):
    return TrainSettings.model_validate(BASE | POLICIES[name][0] | values)


def run(world, model, data, folder, name, parallel="ddp", resumed=None, **values):
    """Train to the end, a checkpoint after every step.

    Raises if another tensor changes, or if ranks come to other weights. Returns reports without
    times, and all that is saved in the end, made whole.
    """
    settings = settings_of(name, parallel=parallel, **values)
    if resumed:
        state = load_checkpoint(Path(resumed), settings, DATA, "cpu", world)
    else:
        state = start_training(Retriever.from_pretrained(model, device="cpu"), settings, world)
    dataset, table = load_dataset(data, "train"), POLICIES[name][1]
    reports = watched(
        state, dataset, table, lambda: save_checkpoint(state, Path(folder), DATA, keep=STEPS)
    )
    world.same_everywhere(hash_weights(tensors_of(state.model)), "weights")
    told = [(each.loss, each.gradient_norm, each.lr, each.opened) for each in reports]
    return told, all_of(state)


@pytest.fixture
def model(retriever, tmp_path):
    retriever.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="module")
def data(write_shapes, tmp_path_factory):
    """Four batches an epoch."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, {"train": 24})
    return str(folder)


@pytest.mark.parametrize("name", POLICIES)
def test_exactly_the_named_parts_change_and_a_resumed_run_is_the_same(name, model, data, tmp_path):
    reports, end = run(World(), model, data, tmp_path / "whole", name)
    changes = [step for step in POLICIES[name][1] if step]
    assert [step for step in end["opened"] if step] == changes
    step = 3  # in the middle of a stage, where there are any
    saved = tmp_path / "whole" / f"step-{step:06d}"
    rest, again = run(World(), model, data, tmp_path / "rest", name, resumed=saved)
    assert rest == reports[step:]
    assert_same(again, end)


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_run_goes_on_before_within_and_right_at_a_stage(step, model, data, tmp_path):
    reports, end = run(World(), model, data, tmp_path / "whole", "lora, then full")
    saved = tmp_path / "whole" / f"step-{step:06d}"
    rest, again = run(World(), model, data, tmp_path / "rest", "lora, then full", resumed=saved)
    assert rest == reports[step:]
    assert_same(again, end)


def in_two_ranks(world, model, data, folder, parallel):
    """Every policy, in one piece and gone on with after step 3."""
    found = {}
    for number, name in enumerate(POLICIES):
        begun, rest = (Path(folder) / f"{number}-{each}" for each in ("begun", "rest"))
        reports, end = run(world, model, data, begun, name, parallel)
        again = run(world, model, data, rest, name, parallel, resumed=begun / "step-000003")
        assert again[0] == reports[3:], name
        if world.is_main:
            assert_same(again[1], end, name)
        found[name] = reports
    return found


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_change_the_same_parts_and_resume_to_the_bit(parallel, model, data, tmp_path):
    folder = str(tmp_path / "runs")
    first, second = run_in_ranks(
        in_two_ranks, 2, tmp_path / "ranks", model, data, folder, parallel, timeout=600.0
    )
    assert first == second
    for number, name in enumerate(POLICIES):
        alone, _ = run(World(), model, data, tmp_path / f"alone-{number}", name)
        for mine, plain in zip(first[name], alone, strict=True):
            assert mine[:3] == pytest.approx(plain[:3], rel=2e-3), name
            assert mine[3] == plain[3], name


def go_on(world, model, data, folder, parallel, resumed):
    return run(world, model, data, folder, "lora, then full", parallel, resumed=resumed)


@pytest.mark.slow
def test_a_run_with_stages_goes_on_in_another_number_of_ranks(model, data, tmp_path):
    plain, _ = run(World(), model, data, tmp_path / "alone", "lora, then full")
    for step in (1, 3):
        for parallel in ("ddp", "fsdp2"):
            saved = str(tmp_path / "alone" / f"step-{step:06d}")
            own = tmp_path / f"{parallel}-{step}"
            arguments = (model, data, str(own / "run"), parallel, saved)
            found, _ = run_in_ranks(go_on, 2, own / "ranks", *arguments, timeout=600.0)
            for mine, expected in zip(found[0], plain[step:], strict=True):
                assert mine[:3] == pytest.approx(expected[:3], rel=2e-3)
            saved = str(own / "run" / "step-000005")
            back, _ = run(World(), model, data, own / "back", "lora, then full", resumed=saved)
            assert back[0][:3] == pytest.approx(plain[5][:3], rel=2e-3)
