"""`colfolio diagnose` reads any run folder and other trainers' logs, for people and machines."""

import json
import math

import pytest

from colfolio.commands.train import train_command

LN2 = math.log(2)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def table(tmp_path):
    def write(losses):
        path = tmp_path / "log.csv"
        lines = [f"{number},{loss}\n" for number, loss in enumerate(losses, start=1)]
        path.write_text("step,loss\n" + "".join(lines))
        return path

    return write


def write_log(run, losses, end=""):
    run.mkdir()
    chance = math.log(64)
    rows = [
        {"kind": "step", "step": number, "loss": loss, "chance": chance, "floor": 0.0}
        for number, loss in enumerate(losses, start=1)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_a_healthy_run_exits_with_0_and_names_what_was_ruled_out(colfolio, run):
    write_log(run, [0.4 + 3.7 * math.exp(-n / 60) for n in range(300)])
    code, out, errors = colfolio("diagnose", run)
    assert (code, errors) == (0, "")
    assert "The run learns" in out
    assert "ruled out\n" in out
    assert "not_finite" in out
    assert "not known from this log: fresh tensors" in out


def test_a_cause_exits_with_1_and_is_told_in_one_paragraph(colfolio, table):
    path = table([LN2 + 1e-4 * math.sin(n) for n in range(300)])
    code, out, _ = colfolio("diagnose", path, "--loss", "pairwise", "--batch", 32)
    assert code == 1
    (told,) = [line for line in out.splitlines() if line.startswith("The model has collapsed")]
    assert "0.6931" in told
    assert "train." not in told  # another trainer has no such settings


def test_machines_get_the_same_as_json(colfolio, table):
    path = table([math.log(16) + 1e-4 * math.sin(n) for n in range(300)])
    code, out, _ = colfolio("diagnose", path, "--loss", "infonce", "--batch", 64, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["cause"] == found["findings"][0]["cause"] == "collapsed"
    assert found["findings"][0]["told"].startswith("The model has collapsed")
    assert found["steps"] == 300
    assert {each["cause"] for each in found["ruled_out"]} >= {"not_finite"}
    assert "fresh_tensors" in found["unasked"]
    assert "16 documents, not 64" in found["notes"][0]


def test_a_checkpoint_of_another_trainer_is_read_by_its_folder(colfolio, tmp_path):
    history = [{"step": n, "loss": 3.0 * math.exp(-n / 60)} for n in range(1, 300)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    code, out, _ = colfolio("diagnose", tmp_path, "--loss", "infonce", "--batch", 32)
    assert code == 0
    assert "step 299" in out


@pytest.mark.parametrize(
    ("losses", "end"),
    [([], ""), ([4.1], ""), ([4.1, 4.0], '{"kind": "step", "st'), ([4.1] * 30, '{"kind": "fau')],
)
def test_a_run_that_died_at_any_point_is_read(colfolio, run, losses, end):
    write_log(run, losses, end=end)
    code, out, errors = colfolio("diagnose", run)
    assert code in (0, 1)
    assert errors == ""
    assert ("no step yet" in out) == (not losses)


def test_a_run_that_left_its_recipe_alone_is_read(colfolio, run, write_recipe):
    run.mkdir()
    (run / "recipe.yaml").write_text(write_recipe().read_text())
    code, out, _ = colfolio("diagnose", run)
    assert code == 1
    assert "There are no steps to judge by" in out


def test_a_finished_run_is_diagnosed_by_its_log_or_its_folder(colfolio, run, write_recipe):
    train_command(write_recipe())
    _, whole, _ = colfolio("diagnose", run, "--json")
    _, by_log, _ = colfolio("diagnose", run / "log.jsonl", "--json")
    found = json.loads(whole)
    assert found["findings"] == json.loads(by_log)["findings"]
    # facts and probes of a run leave little that cannot be asked
    assert set(found["unasked"]) <= {"adapter", "over_fitting", "wrong_labels"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["log.csv", "--loss", "pairwise"],
        ["log.csv", "--batch", 8],
        ["log.csv", "--temperature", 1],
        ["log.csv", "--loss", "cosine", "--batch", 8],
        ["log.csv", "--loss", "pairwise", "--batch", 0],
        ["log.csv", "--loss", "pairwise", "--batch", 8, "--temperature", 0],
        [],
    ],
)
def test_wrong_usage_exits_with_2(colfolio, arguments):
    assert colfolio("diagnose", *arguments)[0] == 2


def test_what_is_neither_run_nor_log_is_refused(refused, tmp_path, table):
    options = ["--loss", "pairwise", "--batch", 8]
    assert "no such run folder or log" in refused("diagnose", tmp_path / "nothing")
    assert "holds no run" in refused("diagnose", tmp_path)
    assert "holds no trainer_state.json" in refused("diagnose", tmp_path, *options)
    assert "say --loss and --batch" in refused("diagnose", table([0.5]))
