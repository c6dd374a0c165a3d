"""A run says what keeps it from learning while it goes on, wherever it tells of itself."""

import io
import json
import math

import pytest
from rich.console import Console

from colfolio.commands.run_folder import RunFolder, TrainRecipe
from colfolio.commands.run_log import RunLog
from colfolio.commands.train import resume_command, train_command
from colfolio.config import load_settings
from colfolio.training import StepReport

CHANCE = math.log(64)


@pytest.fixture
def recipe(write_recipe):
    return load_settings(write_recipe(), TrainRecipe, ["train.steps=1000"])


@pytest.fixture
def run(recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(recipe)
    return folder


def report(step, loss):
    return StepReport(
        step=step,
        loss=loss,
        chance=CHANCE,
        floor=0.0,
        margin=0.0,
        spread=0.0,
        candidates=64.0,
        masked=0.0,
        accuracy=0.0,
        gradient_norm=0.1,
        skipped=False,
        lr=1e-3,
        seconds=0.1,
        rows_per_second=640.0,
    )


def told(run, recipe, steps, *, is_terminal=False):
    """What the screen shows of steps whose loss soon stands still at chance."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=100, color_system=None)
    with RunLog(run, recipe, console, steps[0] - 1) as log:
        for step in steps:
            log.step(report(step, CHANCE + (0.2 if step <= 10 else 1e-4) * math.sin(step)))
            log.look(step)
    return screen.getvalue()


def named(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["cause"], row["told"]) for row in rows if row["kind"] == "diagnosis"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_plateau_is_told_once_while_it_lasts(run, recipe, is_terminal):
    screen = told(run, recipe, range(1, 400), is_terminal=is_terminal)
    ((step, cause, paragraph),) = named(run.path)
    assert cause == "collapsed"
    assert 100 <= step <= 250
    assert "\n" not in paragraph
    assert screen.count("The model has collapsed") == 1


def test_a_run_that_goes_on_does_not_say_it_again(run, recipe):
    told(run, recipe, range(1, 300))
    assert "collapsed" not in told(run, recipe, range(300, 600))
    assert len(named(run.path)) == 1


def test_tensorboard_gets_the_paragraph_as_text(run, recipe):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with_events = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"tensorboard": True})}
    )
    told(run, with_events, range(1, 300))
    events = accumulator.EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert "diagnosis/text_summary" in events.Tags()["tensors"]


def test_what_is_certain_before_the_first_step_is_told_before_it(write_recipe, tmp_path, capsys):
    recipe = write_recipe(validation={"split": "train", "every": 100})
    train_command(recipe, ["train.steps=2"])
    out = capsys.readouterr().out
    ((step, cause, paragraph),) = named(tmp_path / "run")
    assert (step, cause) == (0, "leaked_split")
    assert "100% of the validation split" in paragraph
    assert out.count("What validation measures was trained on") == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>A</b> What validation measures was trained on (said after step 0)" in page
    resume_command(tmp_path / "run")
    assert len(named(tmp_path / "run")) == 1


def test_a_healthy_short_run_is_told_nothing_and_shows_its_hits_and_misses(write_recipe, tmp_path):
    train_command(write_recipe())
    assert named(tmp_path / "run") == []
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("Where scores come from", "right answer at rank", "Rank of the answer among"):
        assert words in page
