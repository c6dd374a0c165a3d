import sys

import pytest

from colfolio.commands.tensorboard import TensorBoardLog, check_tensorboard
from colfolio.commands.train import resume_command, train_command
from colfolio.errors import ColfolioError
from colfolio.training import PartReport, StepReport


def report(step, loss=2.0, **changed):
    levels = (4.852, 0.0, 0.5, 1.0, 128.0, 0.0, 0.25, 1.5)
    parts = {"vision": PartReport(1e-5, 0.25, 1e-4, 1000, 2e-6, 0.0)}
    values = {"skipped": False, "lr": 1e-3, "seconds": 0.5, "rows_per_second": 256.0}
    return StepReport(step, loss, *levels, **values, parts=parts, **changed)


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def events_in(folder):
    """Tag -> {step: value}."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_without_the_package_a_run_is_refused_before_its_folder_is_made(
    write_recipe, tmp_path, refused, no_tensorboard
):
    message = refused("train", write_recipe(), "train.tensorboard=true")
    assert "pip install 'colfolio[tensorboard]'" in message
    assert not (tmp_path / "run").exists()


def test_without_the_package_a_run_does_not_go_on_with_it(write_recipe, tmp_path, no_tensorboard):
    train_command(write_recipe(), ["train.steps=1"])
    with pytest.raises(ColfolioError, match=r"train\.tensorboard is true"):
        resume_command(tmp_path / "run", ["train.tensorboard=true"])


def test_every_number_of_a_step_has_its_tag(tmp_path):
    pytest.importorskip("tensorboard")
    check_tensorboard()
    with TensorBoardLog(tmp_path, 0) as log:
        log.step(report(1))
        log.step(report(2, loss=1.5, opened=["layers[14:28]"]))
        log.evaluation(2, "validation", {"ndcg@5": 0.5, "loss": 1.0, "chance": 4.0})
    found = events_in(tmp_path)
    assert found["train/loss"] == {1: 2.0, 2: 1.5}
    assert found["train/chance"][1] == pytest.approx(4.852)
    assert found["parts/vision/gradient_norm"] == {1: 0.25, 2: 0.25}
    assert found["parts/vision/update_ratio"][2] == pytest.approx(1e-4)
    assert found["parts/vision/lr_least"][2] == pytest.approx(2e-6)
    assert found["validation/ndcg_at_5"] == {2: 0.5}
    assert {"validation/loss", "validation/chance", "train/floor", "train/lr"} <= found.keys()
    assert "train/step" not in found


@pytest.mark.parametrize("checkpoint", [0, 3])
def test_a_run_that_goes_on_voids_what_was_written_after_its_checkpoint(tmp_path, checkpoint):
    pytest.importorskip("tensorboard")
    with TensorBoardLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.step(report(step))
    with TensorBoardLog(tmp_path, checkpoint) as log:
        log.step(report(checkpoint + 1, loss=0.5))
    kept = dict.fromkeys(range(1, checkpoint + 1), 2.0)
    assert events_in(tmp_path)["train/loss"] == kept | {checkpoint + 1: 0.5}


def test_a_run_writes_event_files_beside_its_log(write_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    train_command(write_recipe(), ["train.tensorboard=true", "train.steps=4"])
    found = events_in(tmp_path / "run" / "tensorboard")
    assert set(found["train/loss"]) == {1, 2, 3, 4}
    assert set(found["validation/loss"]) == {4}
    assert "parts/projection/update_ratio" in found
