import copy
import json
from pathlib import Path

import pytest
import torch

from colfolio.errors import CheckpointError
from colfolio.training import checkpoint as checkpoint_module
from colfolio.training import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    start_training,
    train,
)
from colfolio.training.thaw_signals import Watch

DATA = "fingerprint of the data"


def run(state, shapes, steps):
    for _, _ in zip(range(steps), train(state, shapes), strict=False):
        pass


def optimiser_tensors(state):
    tensors = {}
    for number, values in state.optimiser.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": value for name, value in values.items()}
    return tensors


@pytest.fixture
def saved(make_retriever, shapes, settings, tmp_path):
    """A checkpoint after three of six steps."""
    state = start_training(make_retriever(), settings)
    run(state, shapes, 3)
    assert state.step == 3
    return save_checkpoint(state, tmp_path / "checkpoints", DATA, keep=2)


@pytest.mark.parametrize("gradient_checkpointing", ["none", "all", 2])
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
def test_three_steps_saved_and_three_more_equal_six_to_the_bit(
    trained, make_retriever, shapes, settings, tmp_path, gradient_checkpointing, drops, with_dropout
):
    settings = settings.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
    if drops:
        with_dropout()
    straight, _ = trained(settings)
    state = start_training(make_retriever(), settings)
    run(state, shapes, 3)
    path = save_checkpoint(state, tmp_path, DATA, keep=1)
    del state
    torch.rand(7)  # what else happens in the process must not matter
    resumed = load_checkpoint(path, settings, DATA)
    assert resumed.step == 3
    run(resumed, shapes, 6)
    assert resumed.step == straight.step
    assert resumed.position == straight.position
    weights = straight.retriever.weights()
    for name, tensor in resumed.retriever.weights().items():
        assert torch.equal(tensor, weights[name]), name
    moments = optimiser_tensors(straight)
    for name, tensor in optimiser_tensors(resumed).items():
        assert torch.equal(tensor, moments.pop(name)), name
    assert not moments


def test_resuming_without_the_optimisers_state_would_be_caught(trained, shapes, settings, saved):
    straight, _ = trained(settings)
    resumed = load_checkpoint(saved, settings, DATA)
    resumed.optimiser.state.clear()
    run(resumed, shapes, 6)
    assert resumed.retriever.fingerprint() != straight.retriever.fingerprint()


def test_saving_in_between_never_changes_the_run(
    trained, make_retriever, shapes, settings, tmp_path
):
    straight, _ = trained(settings)
    state = start_training(make_retriever(), settings)
    for _ in train(state, shapes):
        save_checkpoint(state, tmp_path, DATA, keep=1)
    assert state.retriever.fingerprint() == straight.retriever.fingerprint()


def test_the_newest_checkpoints_stay_by_number_of_steps(make_retriever, settings, tmp_path):
    state = start_training(make_retriever(), settings)
    for step in (5, 999_999, 1_000_000, 1_000_001):
        state.step = step
        save_checkpoint(state, tmp_path, DATA, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    assert newest_checkpoint(tmp_path).name == "step-1000001"


def test_a_checkpoint_of_fewer_steps_than_the_others_is_not_deleted_at_once(
    make_retriever, settings, tmp_path
):
    state = start_training(make_retriever(), settings)
    for step in (7, 8, 2):
        state.step = step
        path = save_checkpoint(state, tmp_path, DATA, keep=1)
        assert path.exists()


def test_what_is_half_written_is_no_checkpoint(saved):
    folder = saved.parent
    (folder / ".step-000009").mkdir()
    (folder / "step-9").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert newest_checkpoint(folder) == saved
    assert newest_checkpoint(folder / "nothing") is None


def test_left_overs_of_a_killed_save_do_not_disturb_the_next(saved, settings):
    state = load_checkpoint(saved, settings, DATA)
    state.step = 4
    aside = saved.parent / ".step-000004"
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "model.safetensors").write_bytes(b"half")
    path = save_checkpoint(state, saved.parent, DATA, keep=2)
    assert load_checkpoint(path, settings, DATA).step == 4
    assert sorted(each.name for each in saved.parent.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("name", ["optimiser.pt", "state.json", "model/model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_file_cut_short_is_refused(saved, settings, name, share):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="step-000003"):
        load_checkpoint(saved, settings, DATA)


@pytest.mark.parametrize(
    "name", ["optimiser.pt", "state.json", "model/model.safetensors", "model/colfolio.json"]
)
def test_a_missing_file_is_refused(saved, settings, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match="step-000003"):
        load_checkpoint(saved, settings, DATA)


@pytest.mark.parametrize("values", [{}, {"step": 3}, {"position": {"epoch": 0}}, {"step": "x"}])
def test_a_state_without_its_parts_is_refused(saved, settings, values):
    before = json.loads((saved / "state.json").read_text())
    kept = {key: value for key, value in before.items() if key != "step"}
    (saved / "state.json").write_text(json.dumps(values if not values else kept | values))
    if values == {"step": 3}:
        assert load_checkpoint(saved, settings, DATA).step == 3
        return
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        load_checkpoint(saved, settings, DATA)


def test_windows_that_an_earlier_rule_judged_are_begun_anew(saved, settings):
    state = json.loads((saved / "state.json").read_text())
    state["watch"] = {"margins": [1.0], "mean": 0.5, "error": 0.1, "flat": 2, "at_chance": 3}
    (saved / "state.json").write_text(json.dumps(state))
    assert load_checkpoint(saved, settings, DATA).watch == Watch(at_chance=3)


def test_an_optimiser_of_another_model_is_refused(saved, settings, make_retriever, tmp_path):
    other = start_training(make_retriever(vision={"depth": 1}), settings)
    torch.save(other.optimiser.state_dict(), saved / "optimiser.pt")
    with pytest.raises(CheckpointError, match="step-000003"):
        load_checkpoint(saved, settings, DATA)


def test_other_settings_are_refused_each_by_name(saved, settings):
    changed = settings.model_copy(
        update={"seed": 9, "loss": settings.loss.model_copy(update={"temperature": 2.0})}
    )
    with pytest.raises(CheckpointError, match=r"seed: 3 then, 9 now.*temperature"):
        load_checkpoint(saved, changed, DATA)


def test_other_data_are_refused(saved, settings):
    with pytest.raises(CheckpointError, match="trained on other data"):
        load_checkpoint(saved, settings, "other")


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_while_a_checkpoint_is_replaced_leaves_one(saved, settings, monkeypatch, at):
    state = load_checkpoint(saved, settings, DATA)
    rename, calls = Path.rename, []

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == at:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(state, saved.parent, DATA, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == ["step-000003"]
    assert load_checkpoint(saved, settings, DATA).step == 3


def test_a_checkpoint_of_the_same_step_is_replaced(saved, settings):
    state = load_checkpoint(saved, settings, DATA)
    with torch.no_grad():
        state.retriever.projection.weight += 1
    save_checkpoint(state, saved.parent, DATA, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == ["step-000003"]
    again = load_checkpoint(saved, settings, DATA).retriever
    assert again.fingerprint() == state.retriever.fingerprint()


def test_a_failed_save_leaves_what_was_there(saved, settings, monkeypatch):
    state = load_checkpoint(saved, settings, DATA)
    weights = copy.deepcopy(state.retriever.weights())
    state.step = 4

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 576 vs 534")

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    with pytest.raises(CheckpointError, match="disk full"):
        save_checkpoint(state, saved.parent, DATA, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == ["step-000003"]
    monkeypatch.undo()
    again = load_checkpoint(saved, settings, DATA).retriever.weights()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
