import sys

import pytest
import yaml

from colfolio.cli import main


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory, write_shapes):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    write_shapes(folder, {"train": 24, "validation": 12})
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, shared_retriever):
    folder = tmp_path_factory.mktemp("base") / "base"
    shared_retriever.save_pretrained(folder)
    return folder


@pytest.fixture
def write_recipe(tmp_path, shapes_folder, base_folder):
    """Writes a recipe of six steps; its run goes to `tmp_path/run`."""

    def write(**changed):
        values = {
            "model": str(base_folder),
            "dataset": str(shapes_folder),
            "out": str(tmp_path / "run"),
            "train": {
                "steps": 6,
                "batch": {"rows": 6},
                "optimiser": {"lr": 0.01, "warmup_steps": 2},
                "precision": "fp32",
            },
            "validation": {"split": "validation", "every": 4},
            "checkpoint": {"every": 2, "keep": 2},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | changed))
        return path

    return write


@pytest.fixture
def shape_file(tmp_path, tiny_shape):
    path = tmp_path / "shape.yaml"
    path.write_text(yaml.safe_dump(tiny_shape.model_dump(mode="json")))
    return path


@pytest.fixture
def colfolio(monkeypatch, capsys):
    """Runs the command line in this process: its exit code, what it printed, and its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["colfolio", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def refused(colfolio):
    """Runs a command that must fail for a user's mistake; gives its message."""

    def run(*arguments):
        code, _, errors = colfolio(*arguments)
        assert code == 1, errors
        assert errors.startswith("error: ")
        assert "Traceback" not in errors
        return errors

    return run
