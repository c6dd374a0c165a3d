"""`colfolio diagnose` reads any run folder and other trainers' logs, for people and machines."""

import json
import math
import re
import shlex

import pytest
from rich.console import Console

from colfolio.commands import console as terminal
from colfolio.commands.console import program
from colfolio.commands.findings import command_again, print_diagnosis
from colfolio.commands.train import train_command
from colfolio.diagnosis.causes import Diagnosis, Finding, RuledOut

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
    assert "Nothing is to be mended" in out
    (ruled_out,) = [line for line in out.splitlines() if line.startswith("ruled out")]
    assert "not_finite" in ruled_out
    assert "not known from this log: fresh_tensors" in out


def test_a_cause_exits_with_1_and_is_told_with_its_evidence_and_mend(colfolio, table):
    path = table([LN2 + 1e-4 * math.sin(n) for n in range(300)])
    code, out, _ = colfolio("diagnose", path, "--loss", "pairwise", "--batch", 32)
    assert code == 1
    headline, evidence, mend = out.partition("\n\n")[2].splitlines()[:3]
    assert headline.endswith("(collapsed, likely)")
    assert "0.6931" in evidence
    assert "InfoNCE" in mend
    assert "train." not in out  # another trainer has no such settings
    assert "\nruled out: not_finite" in out


def test_machines_get_the_same_as_json(colfolio, table):
    path = table([math.log(16) + 1e-4 * math.sin(n) for n in range(300)])
    code, out, _ = colfolio("diagnose", path, "--loss", "infonce", "--batch", 64, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["cause"] == found["findings"][0]["cause"] == "collapsed"
    assert found["findings"][0]["told"].startswith("The loss has stood still all along")
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
    rare = {"adapter_not_loaded", "over_fitting", "pairwise_loss", "wrong_labels", "padding_side"}
    assert set(found["unasked"]) <= rare


HIGH = Finding(
    "rate_too_high",
    "the learning rate is too high",
    ("The largest steps change the vision tower by 46% of its weights.",),
    "certain",
    "Begin again from the base at a tenth of the rate",
    {"train.optimiser.lr": "0.001"},
)
COLLAPSED = Finding(
    "collapsed",
    "scores are gone",
    ("0.",),
    "likely",
    "Lower it",
    {"train.steps": "4"},
)
FOUND = Diagnosis((HIGH, COLLAPSED), (RuledOut("not_finite", "all steps were " + "finite " * 20),))


def printed(diagnosis, run, width=None):
    out = Console(width=width, force_terminal=width is not None, soft_wrap=True, no_color=True)
    with out.capture() as captured:
        print_diagnosis(out, diagnosis, run)
    return re.sub(r"\x1b\[\d*m", "", captured.get())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_breaks_paragraphs_between_words(run, width):
    lines = printed(FOUND, run, width).splitlines()
    words = " ".join(lines).split()
    assert max(map(len, lines)) <= width
    assert set(printed(FOUND, run).split()) <= set(words)
    assert all("train" not in line or line.startswith("  ") for line in lines)


def test_a_mend_is_a_command_that_trains_the_recipe_again(run):
    run.mkdir()
    (run / "recipe.yaml").write_text("model: base")
    told = printed(FOUND, run)
    assert f"train {run}/recipe.yaml train.optimiser.lr=0.001 out={run}-2\n" in told
    assert f"train {run}/recipe.yaml train.steps=4 out={run}-2\n" in told
    assert "(train.optimiser.lr=0.001)" in printed(FOUND, None)


def test_the_folder_of_a_mend_is_free(run, tmp_path):
    for name, free in (("run", "run-2"), ("run-2", "run-3"), ("lr-7", "lr-7-2")):
        folder = tmp_path / name
        folder.mkdir()
        assert command_again(folder, {}).endswith(f" out={tmp_path / free}")
    assert command_again(run, {"train.frozen": "[]"}).endswith(f"'train.frozen=[]' out={run}-3")


def test_the_command_of_a_mend_trains_from_a_run_folder(colfolio, run, write_recipe, tmp_path):
    train_command(write_recipe())
    _, *arguments = shlex.split(command_again(run, {"train.steps": "2"}))
    code, _, errors = colfolio(*arguments)
    assert (code, errors) == (0, "")
    assert (tmp_path / "run-2" / "model").is_dir()


def test_the_program_is_named_as_a_shell_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal.sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(terminal.shutil, "which", {}.get)
    monkeypatch.chdir(tmp_path)
    assert program() == "colfolio"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "colfolio").touch()
    assert program() == ".venv/bin/colfolio"
    monkeypatch.setattr(terminal.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert program() == "colfolio"


def test_a_run_that_ends_says_what_is_the_matter_and_where_more_stands(
    colfolio, write_recipe, run, monkeypatch
):
    code, out, _ = colfolio("train", write_recipe(), "train.optimiser.lr=1e-12", "train.steps=60")
    *_, told, pointer = out.splitlines()
    assert code == 0
    assert told.endswith(")")
    assert f"report {run}/report.html; " in pointer
    assert pointer.endswith(f"diagnose {run}")
    headlines = colfolio("diagnose", run)[1].splitlines()
    assert told in headlines


@pytest.mark.parametrize("damage", ["log", "recipe", "both"])
def test_what_could_not_be_read_is_said(colfolio, run, write_recipe, damage):
    run.mkdir()
    (run / "recipe.yaml").write_text(write_recipe().read_text())
    if damage in ("log", "both"):
        (run / "log.jsonl").write_bytes(bytes(range(256)) * 9)
    if damage in ("recipe", "both"):
        (run / "recipe.yaml").write_text("train: [1\n")
    _, out, errors = colfolio("diagnose", run)
    assert errors == ""
    assert ("log.jsonl: " in out) == (damage != "recipe")
    assert ("recipe.yaml: the recipe cannot be read" in out) == (damage != "log")


def test_a_log_that_is_a_folder_is_said_to_be_unreadable(colfolio, run):
    (run / "log.jsonl").mkdir(parents=True)
    assert "log.jsonl: the training log cannot be read" in colfolio("diagnose", run)[1]


def test_the_newest_checkpoint_of_a_trainers_folder_is_read(colfolio, refused, tmp_path):
    for number in (20, 100, 3):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        rows = [{"step": n, "loss": 3.0 * math.exp(-n / 60)} for n in range(1, number + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    (tmp_path / "checkpoint-500").mkdir()
    code, out, _ = colfolio("diagnose", tmp_path, "--loss", "info_nce", "--batch", 32)
    assert code == 0
    assert "checkpoint-100/trainer_state.json" in out
    assert "step 100" in out
    assert "say --loss and --batch" in refused("diagnose", tmp_path)


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
