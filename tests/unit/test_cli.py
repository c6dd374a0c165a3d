import errno
import subprocess
import sys

import pytest
import typer

from colfolio import cli
from colfolio.errors import ColfolioError

# Scripts of users depend on these: add with thought, change nothing.
COMMANDS = {
    "check": {"recipe", "overrides", "--model", "--measure", "--device"},
    "demo": {"--out", "--seed", "--steps"},
    "diagnose": {"source", "--loss", "--batch", "--temperature", "--json"},
    "evaluate": {
        "model",
        "dataset",
        "--split",
        "--json",
        "--page-score",
        "--model",
        "--precision",
    },
    "export": {
        *("model", "--to", "--out", "--adapter", "--merge", "--base"),
        *("--push", "--private", "--revision"),
    },
    "index": {
        "model",
        "documents",
        "--out",
        "--views",
        "--split",
        "--dpi",
        "--dtype",
        "--store-pages",
        "--max-bad-share",
        "--precision",
    },
    "init": {
        *("base", "--out", "--dim", "--seed", "--dataset", "--revision"),
        *("--vision", "--vision-revision", "--scheme", "--generator"),
    },
    "parts": {"model", "recipe", "overrides"},
    "plan": {"recipe", "overrides", "--gpu", "--ranks"},
    "positions": {"model", "--image", "--video", "--revision", "--scheme"},
    "prepare": {"documents", "overrides", "--out", "--view", "--split"},
    "search": {"index", "query", "--top-k", "--images", "--model", "--page-score"},
    "train": {"recipe", "overrides", "--resume", "--device", "--ranks", "--unchecked"},
}


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["colfolio", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def failing(monkeypatch, run, tmp_path):
    """Runs a command inside which an error is raised."""

    def failing(error):
        import colfolio.commands.init

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(colfolio.commands.init, "init_command", fail)
        return run("init", "base", "--out", tmp_path / "out")

    return failing


def test_commands_and_options_are_frozen():
    group = typer.main.get_command(cli.app)
    found = {
        name: {
            max(parameter.opts, key=len)
            if parameter.param_type_name == "option"
            else parameter.name
            for parameter in command.params
        }
        for name, command in group.commands.items()
    }
    assert found == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    for option in COMMANDS[command]:
        assert option in out.lower()


def test_help_answers_without_importing_torch():
    program = "import sys, colfolio.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "a.yaml", "--resume", "run"],
        ["train", "a.yaml", "--nonsense"],
        ["train", "--resume"],
        ["train", "train.memory.chunk_tokens=8", "again", "--resume", "run"],
        ["init", "base"],
        ["init", "base", "--out", "x", "--dim", "many"],
        ["search", "index"],
        ["search", "index", "query", "--top-k", "many"],
        ["demo", "--seed", "x"],
        ["diagnose", "log.csv", "--loss", "pairwise"],
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    code, _, errors = run(*arguments)
    assert code == 2
    assert "Traceback" not in errors
    assert errors


def test_a_users_mistake_exits_with_1_and_its_message_alone(failing):
    code, out, errors = failing(ColfolioError("page [/3]: no such thing"))
    assert (code, out, errors) == (1, "", "error: page [/3]: no such thing\n")


@pytest.mark.parametrize(
    "number",
    [
        *("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EACCES", "EPERM", "EROFS", "EEXIST", "ENOTDIR"),
        *("EISDIR", "ENOENT", "ENAMETOOLONG", "ELOOP"),
    ],
)
def test_a_file_system_that_refuses_exits_with_1_and_names_the_file(failing, number):
    code, _, errors = failing(OSError(getattr(errno, number), "the reason", "/there/file"))
    assert code == 1
    assert errors.startswith("error: /there/file: the reason")


def test_a_training_that_diverged_exits_with_1(failing):
    code, _, errors = failing(FloatingPointError("step 3: loss nan, gradient norm nan"))
    assert code == 1
    assert errors.startswith("error: step 3: loss nan")


def test_ctrl_c_exits_with_130(failing):
    assert failing(KeyboardInterrupt())[0] == 130


def test_a_fault_of_ours_is_not_hidden(failing):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())
    with pytest.raises(OSError, match="Bad file descriptor"):
        failing(OSError(errno.EBADF, "Bad file descriptor"))


def test_an_unknown_key_of_a_recipe_exits_with_1(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: a\ndataset: b\nout: c\ntrain: {stebs: 3}\n")
    code, out, errors = run("train", tmp_path / "recipe.yaml")
    assert code == 1
    assert "unknown key 'train.stebs'" in errors
    assert "Traceback" not in out + errors


def test_a_recipe_that_is_not_there_exits_with_1(run, tmp_path):
    code, _, errors = run("train", tmp_path / "none.yaml")
    assert code == 1
    assert "none.yaml" in errors


def test_a_folder_without_a_run_cannot_be_resumed(run, tmp_path):
    code, _, errors = run("train", "--resume", tmp_path)
    assert code == 1
    assert str(tmp_path) in errors.replace("\n", "")
