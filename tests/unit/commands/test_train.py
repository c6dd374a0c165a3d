import errno
import json
import math
import os
import resource
import shutil
import signal

import pytest
import torch

from colfolio.commands import run_steps, splits
from colfolio.commands import train as train_module
from colfolio.commands.run_folder import RunFolder, recipe_of
from colfolio.commands.train import resume_command, train_command
from colfolio.data.dataset import load_dataset
from colfolio.errors import CheckpointError, ColfolioError, DatasetError, RecipeError
from colfolio.models import Retriever
from colfolio.training import newest_checkpoint
from colfolio.training.feature_cache import FeatureCache, FeatureCacheSettings


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps_in(log):
    return [row["step"] for row in log if row["kind"] == "step"]


def weights_of(run):
    return Retriever.from_pretrained(run / "model").fingerprint()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def unbroken(write_recipe, tmp_path):
    """The log and the final weights of a run that nothing interrupted."""
    recipe = write_recipe(out=str(tmp_path / "unbroken"))
    train_command(recipe)
    return log_of(tmp_path / "unbroken"), weights_of(tmp_path / "unbroken")


def without_times(log):
    times = {"seconds", "rows_per_second"}
    return [{key: row[key] for key in row if key not in times} for row in log]


def test_a_run_leaves_its_recipe_log_checkpoints_and_model(write_recipe, run):
    train_command(write_recipe())
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "log.jsonl",
        "probe.safetensors",
        "checkpoints",
        "model",
        "report.html",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000004", "step-000006"}
    log = log_of(run)
    assert steps_in(log) == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in log if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [4, 6]
    for row in evaluations:
        assert 0 <= row["ndcg@5"] <= 1
        assert (row["negatives"], row["chance"]) == (11, pytest.approx(math.log(12)))
        assert row["loss"] > 0
    last = Retriever.from_pretrained(run / "checkpoints" / "step-000006" / "model")
    assert weights_of(run) == last.fingerprint()


def test_the_model_tells_its_recipe_its_data_and_what_it_reached(
    write_recipe, run, tmp_path, shapes_folder
):
    train_command(write_recipe())
    told = Retriever.from_pretrained(run / "model").contract
    assert told.recipe["train"]["steps"] == 6
    assert (told.recipe["model"], told.recipe["dataset"]) == ("base", "shapes")
    assert str(tmp_path) not in told.model_dump_json()
    assert told.data == {"shapes train": load_dataset(str(shapes_folder), "train").fingerprint}
    last = [row for row in log_of(run) if row["kind"] == "evaluation"][-1]
    assert (last["step"], told.metrics) == (6, {"validation ndcg@5": last["ndcg@5"]})


def test_a_model_that_was_not_evaluated_tells_no_metrics(write_recipe, run):
    train_command(write_recipe(validation={"split": None}))
    assert Retriever.from_pretrained(run / "model").contract.metrics == {}


def test_the_trained_model_keeps_the_contract_of_its_base(write_recipe, run, base_folder):
    train_command(write_recipe())
    base, trained = (Retriever.from_pretrained(p) for p in (base_folder, run / "model"))
    assert trained.contract.deciding() == base.contract.deciding()
    assert trained.contract.base_hash == base.contract.base_hash
    assert trained.fingerprint() != base.fingerprint()


def test_overrides_reach_the_run_and_its_recipe(write_recipe, run):
    train_command(write_recipe(), ["train.steps=3", "train.optimiser.lr=3e-4"])
    assert steps_in(log_of(run)) == [1, 2, 3]
    assert recipe_of(run).train.optimiser.lr == 3e-4


def test_validation_never_changes_the_weights(write_recipe, unbroken, run):
    train_command(write_recipe(validation={"split": None}))
    assert weights_of(run) == unbroken[1]
    assert not any(row["kind"] == "evaluation" for row in log_of(run))


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_run_that_broke_off_goes_on_to_the_same_bits(
    write_recipe, unbroken, run, monkeypatch, step
):
    append = RunFolder.append

    def break_off(self, kind, values):
        append(self, kind, values)
        if values["step"] == step:
            raise MemoryError

    monkeypatch.setattr(RunFolder, "append", break_off)
    with pytest.raises(MemoryError):
        train_command(write_recipe())
    monkeypatch.undo()
    assert not (run / "model").exists()
    resume_command(run)
    log, weights = unbroken
    assert weights_of(run) == weights
    assert without_times(log_of(run)) == without_times(log)


def test_a_run_that_was_renamed_goes_on(write_recipe, run, tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        interrupted(write_recipe(), at=3)
    run.rename(tmp_path / "moved")
    resume_command(tmp_path / "moved")
    assert weights_of(tmp_path / "moved") == unbroken[1]


def test_resuming_a_finished_run_changes_nothing(write_recipe, run):
    train_command(write_recipe())
    log, weights = log_of(run), weights_of(run)
    resume_command(run)
    assert (log_of(run), weights_of(run)) == (log, weights)


def test_a_run_whose_last_step_is_done_only_lacks_its_model(write_recipe, run):
    train_command(write_recipe())
    log, weights = log_of(run), weights_of(run)
    shutil.rmtree(run / "model")
    resume_command(run)
    assert (log_of(run), weights_of(run)) == (log, weights)


def interrupted(recipe, at):
    """Train, with Ctrl-C pressed during a step."""
    append = RunFolder.append

    def press(self, kind, values):
        append(self, kind, values)
        if values["step"] == at and kind == "step":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", press)
        train_command(recipe)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_ctrl_c_saves_the_step_and_the_run_goes_on_to_the_same_bits(
    write_recipe, unbroken, run, at, capsys
):
    with pytest.raises(KeyboardInterrupt):
        interrupted(write_recipe(), at)
    assert newest_checkpoint(run / "checkpoints").name == f"step-{at:06d}"
    assert f"colfolio train --resume {run}" in capsys.readouterr().out
    resume_command(run)
    assert weights_of(run) == unbroken[1]
    assert without_times(log_of(run)) == without_times(unbroken[0])


def test_ctrl_c_is_as_before_once_training_is_over(write_recipe):
    before = signal.getsignal(signal.SIGINT)
    train_command(write_recipe())
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RecipeError):
        train_command(write_recipe())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once():
    with run_steps._stop_after_step() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(
    write_recipe, run, monkeypatch
):
    train_command(write_recipe())
    weights = weights_of(run)
    monkeypatch.setattr(splits, "load_dataset", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(RecipeError, match="already holds a run"):
        train_command(write_recipe())
    assert weights_of(run) == weights


@pytest.mark.parametrize(
    ("changed", "culprit"),
    [
        ({"model": "no/such/model/here"}, "no/such/model"),
        ({"dataset": "/no/such/set"}, "/no/such/set"),
        ({"split": "nosplit"}, "nosplit"),
        ({"validation": {"split": "nosplit"}}, "nosplit"),
        ({"validation": {"split": "validation", "pool": 12}}, "validation.pool is 12.*only 11"),
        ({"train": {"steps": 2, "batch": {"rows": 999}}}, "batch has 999"),
        ({"train": {"steps": 2, "batch": {"kind_weights": {"word": 2}}}}, "'word'"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_folder(write_recipe, run, changed, culprit):
    with pytest.raises(ColfolioError, match=culprit):
        train_command(write_recipe(**changed))
    assert not run.exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(write_recipe, run, device):
    with pytest.raises(ColfolioError, match=f"device {device!r}"):
        train_command(write_recipe(), device=device)
    assert not run.exists()


def test_other_data_than_before_are_refused(write_recipe, run, tmp_path, write_shapes):
    write_shapes(tmp_path / "set", {"train": 24, "validation": 12})
    recipe = write_recipe(dataset=str(tmp_path / "set"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(recipe, at=3)
    write_shapes(tmp_path / "set", {"train": 25, "validation": 12})
    with pytest.raises(CheckpointError, match="other data"):
        resume_command(run)


def test_a_recipe_changed_in_the_run_folder_is_refused(write_recipe, run):
    with pytest.raises(KeyboardInterrupt):
        interrupted(write_recipe(), at=3)
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(CheckpointError, match="optimiser"):
        resume_command(run)


def test_a_disk_that_fills_up_loses_no_finished_checkpoint(
    write_recipe, unbroken, run, monkeypatch
):
    write = run_steps.save_checkpoint

    def fill(state, *arguments):
        if state.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(state, *arguments)

    monkeypatch.setattr(run_steps, "save_checkpoint", fill)
    with pytest.raises(OSError, match="No space left"):
        train_command(write_recipe())
    monkeypatch.undo()
    assert newest_checkpoint(run / "checkpoints").name == "step-000002"
    resume_command(run)
    assert weights_of(run) == unbroken[1]
    assert without_times(log_of(run)) == without_times(unbroken[0])


@pytest.mark.parametrize("room", [4_000, 30_000, 250_000])
def test_files_that_may_not_grow_end_in_a_message_and_the_run_goes_on(
    write_recipe, unbroken, run, refused, room
):
    # a limit on the size of files meets every writer as a full disk does: safetensors, torch, ours
    recipe = write_recipe()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        errors = refused("train", recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in errors or "disk full" in errors
    assert [path for path in (run / "checkpoints").iterdir() if path.suffix != ""] == []
    resume_command(run)
    assert weights_of(run) == unbroken[1]


@pytest.mark.parametrize("name", ["run [/b]", "run [red]x", "ru[n]: é"])
def test_a_folder_of_any_name_is_printed_as_it_is(write_recipe, tmp_path, capsys, name):
    train_command(write_recipe(out=str(tmp_path / name)), ["train.steps=1"])
    assert f"{name}/model: trained for 1 steps" in capsys.readouterr().out


def test_gradient_checkpointing_trains_to_nearly_the_same_weights(write_recipe, run, tmp_path):
    train_command(write_recipe(out=str(tmp_path / "plain")), ["train.steps=2"])
    train_command(write_recipe(), ["train.steps=2", "train.gradient_checkpointing=all"])
    mine, plain = (
        Retriever.from_pretrained(p / "model").weights() for p in (run, tmp_path / "plain")
    )
    for name in plain:
        torch.testing.assert_close(mine[name], plain[name], rtol=0, atol=1e-4)


def test_a_run_killed_before_its_first_step_keeps_its_base(
    write_recipe, run, unbroken, base_folder, tmp_path, make_retriever, monkeypatch
):
    base = tmp_path / "base-of-the-day"
    shutil.copytree(base_folder, base)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "run_steps", lambda *_: None)
        train_command(write_recipe(model=str(base)))
    make_retriever(seed=9).save_pretrained(base)
    resume_command(run)
    assert weights_of(run) == unbroken[1]


def test_an_error_in_the_middle_of_a_run_saves_what_was_trained(write_recipe, run, monkeypatch):
    trained = train_module.train

    def broken(state, dataset):
        reports = trained(state, dataset)
        yield from (next(reports) for _ in range(3))
        raise DatasetError("an image went bad")

    monkeypatch.setattr(train_module, "train", broken)
    with pytest.raises(DatasetError, match="went bad"):
        train_command(write_recipe())
    assert newest_checkpoint(run / "checkpoints").name == "step-000003"


def test_a_full_device_is_told_with_what_to_do(write_recipe, run, monkeypatch, refused):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Retriever, "forward", fill)
    message = refused("train", write_recipe(), "train.memory.chunk_tokens=900")
    assert "chunk_tokens 900" in message
    assert "2.00 GiB" in message
    assert "colfolio plan" in message
    assert newest_checkpoint(run / "checkpoints").name == "step-000000"


def test_a_run_that_was_too_large_goes_on_in_smaller_pieces(write_recipe, run, refused, colfolio):
    message = refused("train", write_recipe(), "train.memory.activation_mb=0.001")
    assert "activation_mb" in message
    assert newest_checkpoint(run / "checkpoints").name == "step-000000"
    changes = ["train.memory.activation_mb=50", "train.memory.chunk_tokens=60"]
    code, _, errors = colfolio("train", *changes, "--resume", run)
    assert code == 0, errors
    assert recipe_of(run).train.memory.chunk_tokens == 60
    assert (run / "model").exists()


@pytest.mark.parametrize("name", ["train.steps=9", "model=x", "train=1", "out=y"])
def test_only_what_changes_no_gradient_may_change_while_a_run_goes_on(
    write_recipe, run, refused, name
):
    train_command(write_recipe(), ["train.steps=2"])
    message = refused("train", name, "--resume", run)
    assert name.partition("=")[0] in message
    assert recipe_of(run).train.steps == 2


def ledgers_of(run):
    return [row for row in log_of(run) if row["kind"] == "ledger"]


def test_another_kernel_is_noted_in_the_log_of_a_run_that_goes_on(write_recipe, run, capsys):
    with pytest.raises(KeyboardInterrupt):
        interrupted(write_recipe(), at=3)
    resume_command(run, ["train.attention=eager"])
    first, second = ledgers_of(run)
    assert (first["step"], second["step"]) == (0, 3)
    assert first["computed_with"]["attention"] != second["computed_with"]["attention"]
    capsys.readouterr()
    resume_command(run)
    assert len(ledgers_of(run)) == 2
    assert "an answer among them" not in capsys.readouterr().out


def test_a_disk_that_takes_no_features_is_told(capsys, tmp_path):
    assert not run_steps._say_fault(None)
    cache = FeatureCache(FeatureCacheSettings(disk_mb=1.0), tmp_path / "features")
    assert not run_steps._say_fault(cache)
    cache._files.fault = "/there: no room"
    assert run_steps._say_fault(cache)
    assert capsys.readouterr().out.count("no room") == 1


def test_a_finished_run_has_a_report_of_its_curves(write_recipe, run):
    train_command(write_recipe())
    text = (run / "report.html").read_text(encoding="utf-8")
    for words in ("Training run: run", "Gradient norm, by part", "Validation loss, 11 negatives"):
        assert words in text


def test_validation_loss_is_over_one_pool_whatever_the_batch_and_the_seed(
    write_recipe, tmp_path, monkeypatch
):
    pools = []
    draw = splits.draw_pool
    monkeypatch.setattr(splits, "draw_pool", lambda *given: pools.append(draw(*given)) or pools[-1])
    for name, changed in (("a", "train.batch.rows=6"), ("b", "train.batch.rows=4")):
        recipe = write_recipe(out=str(tmp_path / name))
        train_command(
            recipe, ["train.steps=1", "validation.pool=5", changed, f"train.seed={len(pools)}"]
        )
    first, second = pools
    assert first.size == 5
    assert torch.equal(first.negatives, second.negatives)
    ledger = next(row for row in log_of(tmp_path / "b") if row["kind"] == "ledger")
    assert "the same 5 negatives" in ledger["validation"]
