"""The demo's commands, and how an interrupted demo goes on."""

import sys
from pathlib import Path

import pytest
import typer.main

from colfolio.cli import app
from colfolio.demo import plan
from colfolio.demo.plan import Command, DemoFolder, Progress, commands, run_commands
from colfolio.errors import ColfolioError


@pytest.fixture
def folder(tmp_path):
    return DemoFolder(tmp_path / "demo")


def test_every_command_of_the_plan_is_one_that_the_command_line_takes(folder):
    known = typer.main.get_command(app).commands
    for command in commands(folder, seed=3, steps=7):
        name, *arguments = command.arguments
        assert known[name].make_context(name, list(arguments)).params


def test_seed_and_steps_reach_the_training(folder):
    line = next(c.line for c in commands(folder, seed=3, steps=7) if c.key == "train")
    assert "train.seed=3" in line
    assert "train.steps=7" in line


def test_another_seed_in_the_same_folder_is_refused(folder):
    Progress(folder, 0, None)
    with pytest.raises(ColfolioError, match="choose another --out"):
        Progress(folder, 1, None)


def test_a_finished_command_is_not_run_again(folder, monkeypatch):
    runs = []
    monkeypatch.setattr(plan.subprocess, "call", lambda line: runs.append(line) or 0)
    steps = [Command(key, (key,), "why") for key in ("init", "search")]
    Progress(folder, 0, None).spend("init", 1.0, done=True)
    told = list(run_commands(folder, steps, Progress(folder, 0, None)))
    assert [done for _, done in told] == [True, False]
    assert runs == [[sys.executable, "-m", "colfolio.cli", "search"]]
    assert set(Progress(folder, 0, None).seconds) == {"init", "search"}


def test_a_failed_command_stops_the_demo_and_is_not_done(folder, monkeypatch):
    monkeypatch.setattr(plan.subprocess, "call", lambda _: 1)
    progress = Progress(folder, 0, None)
    with pytest.raises(ColfolioError, match="exit code 1"):
        list(run_commands(folder, [Command("init", ("init",), "why")], progress))
    assert not progress.is_done("init")


def test_every_attempt_at_a_command_counts(folder):
    Progress(folder, 0, None).spend("train", 200.0, done=False)
    Progress(folder, 0, None).spend("train", 30.0, done=True)
    assert Progress(folder, 0, None).seconds == {"train": 230.0}


def test_a_demo_of_another_recipe_is_not_passed_off_as_this_one(folder, monkeypatch):
    Progress(folder, 0, None)
    monkeypatch.setattr(plan, "_made_of", lambda: "other")
    with pytest.raises(ColfolioError, match="version"):
        Progress(folder, 0, None)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_damaged_file_of_progress_is_named(folder, text):
    folder.path.mkdir()
    (folder / "commands.json").write_text(text)
    with pytest.raises(ColfolioError, match=r"commands\.json: damaged"):
        Progress(folder, 0, None)


def test_ctrl_c_in_a_command_ends_the_demo_as_one(folder, monkeypatch):
    monkeypatch.setattr(plan.subprocess, "call", lambda _: 130)
    with pytest.raises(KeyboardInterrupt):
        list(run_commands(folder, [Command("x", ("x",), "why")], Progress(folder, 0, None)))


def test_an_interrupted_training_is_resumed(folder, monkeypatch):
    runs = []
    monkeypatch.setattr(plan.subprocess, "call", lambda line: runs.append(line[3:]) or 0)
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "recipe.yaml").touch()
    training = next(c for c in commands(folder, 0, None) if c.key == "train")
    list(run_commands(folder, [training], Progress(folder, 0, None)))
    assert runs == [["train", "--resume", str(folder / "run")]]


def test_what_ships_with_the_demo_is_there():
    assert all(plan.bundled(name).exists() for name in ("recipe.yaml", "shape.yaml", "documents"))
    listed = (plan.bundled("documents") / "SOURCES.md").read_text(encoding="utf-8")
    root = plan.bundled("documents")
    files = [path.relative_to(root).as_posix() for path in Path(root).rglob("*.pdf")]
    assert len(files) > 150
    assert [name for name in files if f"| {name} |" not in listed] == []
