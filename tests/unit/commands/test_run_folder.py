import json
import math
from pathlib import Path

import pytest

from colfolio.commands.run_folder import RunFolder, TrainRecipe, recipe_of
from colfolio.errors import ColfolioError, RecipeError


@pytest.fixture
def recipe(tmp_path):
    return TrainRecipe.model_validate(
        {"model": "base", "dataset": "set", "out": str(tmp_path / "run"), "train": {"steps": 3}}
    )


@pytest.fixture
def run(tmp_path, recipe):
    run = RunFolder(tmp_path / "run")
    run.begin(recipe)
    return run


def rows(run):
    return [json.loads(line) for line in run.log.read_text().splitlines()]


def test_a_run_keeps_its_recipe(run, recipe):
    assert recipe_of(run.path) == recipe
    assert [path.name for path in run.path.iterdir()] == ["recipe.yaml"]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run, recipe):
    run.append("step", {"step": 1})
    with pytest.raises(RecipeError, match=r"already holds a run.*--resume"):
        run.begin(recipe.model_copy(update={"model": "other"}))
    assert recipe_of(run.path) == recipe
    assert rows(run) == [{"kind": "step", "step": 1}]


def test_a_folder_with_other_things_in_it_can_hold_a_run(tmp_path, recipe):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    RunFolder(tmp_path / "run").begin(recipe)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_rewinding_keeps_the_log_up_to_a_step(run):
    for step in (1, 2, 3, 4):
        run.append("step", {"step": step, "loss": 0.5})
    run.append("evaluation", {"step": 4, "split": "validation"})
    run.append("step", {"step": 5})
    run.rewind(4)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 4]
    run.rewind(0)
    assert rows(run) == []


@pytest.mark.parametrize(
    "rest",
    ['{"kind": "st', "{", "\0\0\0\0", "5", '"step"', "null", "{}", '{"kind": "step", "step": "x"}'],
)
def test_what_a_kill_left_of_a_line_is_dropped(run, rest):
    run.append("step", {"step": 1})
    with run.log.open("a") as file:
        file.write(rest)
    run.rewind(9)
    assert rows(run) == [{"kind": "step", "step": 1}]
    run.append("step", {"step": 2})
    assert [row["step"] for row in rows(run)] == [1, 2]


def test_a_last_line_without_its_end_is_kept_whole(run):
    run.append("step", {"step": 1})
    run.log.write_text(run.log.read_text().rstrip("\n"))
    run.rewind(1)
    run.append("step", {"step": 2})
    assert [row["step"] for row in rows(run)] == [1, 2]


def test_rewinding_forgets_what_ended_the_run(run):
    run.append("step", {"step": 4})
    run.append("fault", {"step": 4, "what": "loss", "module": ""})
    run.rewind(4)
    assert [row["kind"] for row in rows(run)] == ["step"]


def test_a_kill_while_a_run_begins_leaves_no_folder_or_one_with_a_recipe(
    tmp_path, recipe, monkeypatch
):
    path = tmp_path / "deep" / "run"
    replace = Path.replace

    def killed(aside, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(path).begin(recipe)
    assert not path.exists()
    monkeypatch.setattr(Path, "replace", replace)
    RunFolder(path).begin(recipe)
    assert [each.name for each in path.iterdir()] == ["recipe.yaml"]
    assert [each.name for each in path.parent.iterdir()] == ["run"]


def test_what_is_not_finite_is_null_in_the_log(run):
    part = {"gradient_norm": math.inf, "lr": 1e-3}
    values = {"step": 2, "loss": math.nan, "parts": {"vision": part}, "edges": (-math.inf, 1.0)}
    run.append("step", values)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    row = json.loads(run.log.read_text(), parse_constant=refuse)
    assert (row["loss"], row["step"], row["edges"]) == (None, 2, [None, 1.0])
    assert row["parts"] == {"vision": {"gradient_norm": None, "lr": 1e-3}}


def test_a_folder_without_a_run_cannot_be_rewound_or_resumed(tmp_path):
    with pytest.raises(ColfolioError, match="holds no run"):
        RunFolder(tmp_path).rewind(0)
    with pytest.raises(ColfolioError, match=r"recipe\.yaml"):
        recipe_of(tmp_path)


def test_a_run_without_a_log_yet_can_be_rewound(run):
    run.rewind(0)
    assert not run.log.exists()
