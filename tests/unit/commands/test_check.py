"""`colfolio check` tells what would go wrong; `train` begins no run that fails its first checks."""

from io import StringIO

import pytest
from rich.console import Console

from colfolio.commands import check as check_module
from colfolio.commands.export import export_command
from colfolio.commands.train import resume_command, train_command
from colfolio.diagnosis.preflight import Check
from colfolio.errors import ColfolioError, RecipeError
from colfolio.models import Retriever, projected

ENOUGH = ("train.batch.rows=8",)  # candidates


def detach_images(monkeypatch):
    own = projected.run_vision
    monkeypatch.setattr(projected, "run_vision", lambda *given: own(*given).detach())


def test_a_recipe_is_checked_line_by_line_and_no_folder_is_made(write_recipe, tmp_path, colfolio):
    recipe = write_recipe()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, out, errors = colfolio("check", recipe, *ENOUGH, "train.steps=3", "--device", "cpu")
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    assert all(line.startswith("passed  ") for line in lines[:-1])
    assert lines[-1].startswith(f"{len(lines) - 1} passed, 0 failed")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_failed_check_exits_with_1_and_names_its_cause(write_recipe, colfolio):
    code, out, _ = colfolio("check", write_recipe(), *ENOUGH, "train.loss.temperature=0.001")
    assert code == 1
    (line,) = (line for line in out.splitlines() if line.startswith("failed"))
    assert "loss at the start" in line
    assert line.endswith("[temperature_too_low]")
    assert "1 failed" in out.splitlines()[-1]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_break_at_the_width_of_a_terminal_and_nowhere_else(is_terminal, monkeypatch):
    out = Console(
        width=40, force_terminal=is_terminal, no_color=True, file=StringIO(), soft_wrap=True
    )
    monkeypatch.setattr(check_module, "console", lambda: out)
    checks = [Check("positions", False, "many words " * 9 + "end", "positions_flattened")]
    check_module.say_checks(checks)
    check_module.say_first([Check("a name of many words " * 4, True, "1")])
    lines = out.file.getvalue().splitlines()
    assert (max(map(len, lines)) <= 40) == is_terminal
    assert len(lines) > 6 if is_terminal else len(lines) == 3
    assert lines[0].startswith("failed  positions: many words")
    assert lines[1].startswith(" " * 8 + "many") == is_terminal


def test_a_recipe_that_passes_is_measured_if_asked(write_recipe, colfolio, refused, tmp_path):
    code, out, _ = colfolio("check", write_recipe(), *ENOUGH, "--measure")
    assert code == 0
    measured = [line for line in out.splitlines() if line.startswith("measured  ")]
    assert [line.split(": ")[0][10:] for line in measured] == ["gradient", "batch", "rates"]
    code, out, _ = colfolio("check", write_recipe(), "--measure", "train.loss.temperature=0.001")
    assert code == 1
    assert "measured" not in out
    code, _, errors = colfolio("check", "--model", tmp_path, "--measure")
    assert code == 2
    assert "--measure" in errors


def test_a_model_is_checked_and_exits_with_1_where_it_fails(make_retriever, tmp_path, colfolio):
    make_retriever(dim=128).save_pretrained(tmp_path / "base")
    code, out, _ = colfolio("check", "--model", tmp_path / "base")
    assert code == 0, out
    export_command(str(tmp_path / "base"), "transformers", tmp_path / "theirs")
    code, out, _ = colfolio("check", "--model", tmp_path / "theirs")
    assert code == 1
    assert "[positions_flattened]" in out


def test_a_recipe_of_text_is_refused_with_the_reason(write_recipe, refused):
    train = {"steps": 2, "objective": "generation"}
    assert "train.objective is generation" in refused("check", write_recipe(train=train))


def test_a_folder_that_is_not_there_is_a_users_error(tmp_path, refused):
    assert "nowhere" in refused("check", "--model", tmp_path / "nowhere")


def test_a_run_says_what_was_checked_first(write_recipe, tmp_path, capsys):
    train_command(write_recipe(), ["train.steps=1"])
    assert (
        "checked     weights are those of the files, tokens of a row, positions"
        in capsys.readouterr().out
    )


def test_first_checks_change_no_bit_of_a_run(write_recipe, tmp_path, monkeypatch):
    train_command(write_recipe(out=str(tmp_path / "checked")))
    monkeypatch.setattr(check_module, "check_first", lambda *_: iter(()))
    train_command(write_recipe(out=str(tmp_path / "bare")))
    checked, bare = (
        Retriever.from_pretrained(tmp_path / name / "model") for name in ("checked", "bare")
    )
    assert checked.fingerprint() == bare.fingerprint()


def test_a_run_that_fails_its_first_checks_is_not_begun(write_recipe, tmp_path, monkeypatch):
    detach_images(monkeypatch)
    with pytest.raises(ColfolioError, match=r"none comes to vision.*--unchecked"):
        train_command(write_recipe())
    assert not (tmp_path / "run").exists()


def test_unchecked_goes_on_and_says_with_what(write_recipe, tmp_path, monkeypatch, colfolio):
    detach_images(monkeypatch)
    code, out, _ = colfolio("train", write_recipe(), "train.steps=1", "--unchecked")
    assert code == 0
    assert "unchecked   goes on although this failed: gradient reaches what trains" in out
    assert (tmp_path / "run" / "model").exists()


def test_checks_that_could_not_be_made_are_said(write_recipe, monkeypatch, capsys):
    def breaking_off(*_):
        yield Check("positions", True, "right for 12 tokens")
        raise RecipeError("no room for a chunk")

    monkeypatch.setattr(check_module, "check_first", breaking_off)
    train_command(write_recipe(), ["train.steps=1"])
    told = capsys.readouterr().out
    assert "after 1 checks, the others could not be made: no room for a chunk" in told
    assert "checked     positions, in" in told


def test_a_run_that_goes_on_is_not_checked_again(write_recipe, tmp_path, monkeypatch):
    train_command(write_recipe(), ["train.steps=2"])
    monkeypatch.setattr(check_module, "check_first", _never)
    resume_command(tmp_path / "run")


def _never(*_):
    raise AssertionError("checked")


def test_unchecked_is_wrong_usage_of_a_run_that_goes_on(tmp_path, colfolio):
    assert colfolio("train", "--resume", tmp_path, "--unchecked")[0] == 2


@pytest.mark.parametrize("arguments", [["check"], ["check", "a.yaml", "--model", "b"]])
def test_a_check_is_of_a_recipe_or_of_a_model(arguments, colfolio):
    assert colfolio(*arguments)[0] == 2
