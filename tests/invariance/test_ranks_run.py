"""A run is the same in any number of ranks, and its checkpoints do not tell how many there were."""

import copy
from pathlib import Path

import pytest
import torch
from ranks import run_in_ranks

from colfolio.data.dataset import load_dataset
from colfolio.distributed import World, gather_state
from colfolio.models.retriever import Retriever
from colfolio.training import (
    TrainSettings,
    load_checkpoint,
    save_checkpoint,
    start_training,
    train,
)

SETTINGS = {
    "steps": 4,
    "seed": 3,
    "batch": {"rows": 5},
    "accumulation": 2,
    "memory": {"chunk_tokens": 40},
    "optimiser": {"lr": 1e-3, "warmup_steps": 2},
    "precision": "fp32",
    "threads": 1,
}
DATA = "a fingerprint"


def run(world, model, data, folder, parallel, resumed=None):
    """Train two steps, or from a checkpoint to the end; reports, and state made whole."""
    settings = TrainSettings.model_validate(SETTINGS | {"parallel": parallel})
    if resumed:
        state = load_checkpoint(Path(resumed), settings, DATA, "cpu", world)
        both = state.retriever.weights(), state.optimiser.state_dict()
        loaded = copy.deepcopy(gather_state(both))
    else:
        state = start_training(Retriever.from_pretrained(model, device="cpu"), settings, world)
        loaded = None
    reports = []
    for report in train(state, load_dataset(data, "train")):
        reports.append((report.loss, report.gradient_norm, report.candidates))
        if report.step == 2 and not resumed:
            break
    saved = save_checkpoint(state, Path(folder), DATA, keep=5)
    return reports, str(saved), gather_state(state.retriever.weights()), loaded


@pytest.fixture
def model(retriever, tmp_path):
    retriever.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(write_shapes, tmp_path):
    write_shapes(tmp_path / "shapes", {"train": 24})
    return str(tmp_path / "shapes")


def assert_same_run(found, expected):
    for mine, plain in zip(found, expected, strict=True):
        assert mine == pytest.approx(plain, rel=2e-4)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_ranks(model, data, tmp_path):
    alone, _, _, _ = run(World(), model, data, str(tmp_path / "alone"), "ddp")
    straight = start_training(
        Retriever.from_pretrained(model, device="cpu"), TrainSettings.model_validate(SETTINGS)
    )
    whole_run = [
        (r.loss, r.gradient_norm, r.candidates)
        for r in train(straight, load_dataset(data, "train"))
    ]
    assert_same_run(alone, whole_run[:2])

    arguments = (model, data, str(tmp_path / "sharded"), "fsdp2")
    first, second = run_in_ranks(run, 2, tmp_path / "a", *arguments)
    assert first[0] == second[0]
    assert_same_run(first[0], whole_run[:2])

    # two ranks with a part each -> one
    reports, _, _, (weights, moments) = run(
        World(), model, data, str(tmp_path / "rest"), "ddp", resumed=first[1]
    )
    assert_same_run(reports, whole_run[2:])
    for name, tensor in first[2].items():
        assert torch.equal(weights[name], tensor), name

    # one -> two with the whole model each
    again, _ = run_in_ranks(
        run, 2, tmp_path / "b", model, data, str(tmp_path / "more"), "ddp", first[1]
    )
    assert_same_run(again[0], whole_run[2:])
    flat = dict(torch.utils._pytree.tree_flatten_with_path(again[3][1])[0])
    plain = dict(torch.utils._pytree.tree_flatten_with_path(moments)[0])
    for name, value in plain.items():
        same = torch.equal(flat[name], value) if torch.is_tensor(value) else flat[name] == value
        assert same, name
