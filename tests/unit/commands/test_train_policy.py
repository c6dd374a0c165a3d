"""Policies of a recipe from the command line: refused with their line, told, resumed, saved."""

import json
import shutil

import pytest

from colfolio.commands import policy
from colfolio.commands.train import resume_command, train_command
from colfolio.errors import RecipeError
from colfolio.models import Retriever
from colfolio.models.adapters import has_adapter

TRAIN = {
    "steps": 6,
    "batch": {"rows": 6},
    "optimiser": {"lr": 0.01, "warmup_steps": 2},
    "precision": "fp32",
}
LORA = {"rank": 2, "dropout": 0.0, "projection": "full"}


def log_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "rows_per_second")
    return [{key: row[key] for key in row if key not in times} for row in rows]


@pytest.fixture
def no_weights(monkeypatch):
    """Lets no weight be read."""

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Retriever, "from_pretrained", refuse)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"frozen": ["vision[9]"]}, r"train\.frozen: 'vision\[9\]' reaches beyond"),
        ({"thaw": [{"open": ["norm"], "step": 1, "lr": 1e-3}]}, r"train\.thaw: everything trains"),
        (
            {"frozen": ["norm"], "thaw": [{"open": ["merger"], "step": 1, "lr": 1e-3}]},
            r"train\.thaw\.0\.open: merger trains by then already",
        ),
        (
            {"frozen": ["norm"], "thaw": [{"open": ["norm"], "step": 600, "lr": 1e-3}]},
            r"train\.thaw\.0\.step: it opens at step 600",
        ),
        (
            {"frozen": ["norm"], "thaw": [{"open": ["norm"], "step": 1, "lr": 0}]},
            r"train\.thaw\.0\.lr: .*greater than 0",
        ),
        ({"frozen": ["all"]}, r"train\.frozen: no parameter"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_with_its_line_and_before_weights_are_read(
    write_recipe, no_weights, values, told
):
    recipe = write_recipe(train=TRAIN | values)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:\d+: {told}") as caught:
        train_command(recipe)
    line = int(str(caught.value).split(":")[1])
    key = str(caught.value).split(": ")[1].split(".")[-1]
    assert key in recipe.read_text().splitlines()[line - 1]


def test_a_model_that_only_its_weights_tell_is_checked_once_it_is_loaded(write_recipe, monkeypatch):
    def unknown(*_):
        raise policy.CheckpointError("only its weights say what it is")

    monkeypatch.setattr(policy, "outline_of", unknown)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: train\.frozen: 'vision\[9\]'"):
        train_command(write_recipe(train=TRAIN | {"frozen": ["vision[9]"]}))


def test_a_run_of_adapters_ends_with_an_adapter_that_opens_by_itself(write_recipe, tmp_path):
    train_command(write_recipe(train=TRAIN | {"lora": LORA}, out=str(tmp_path / "run")))
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert has_adapter(Retriever.from_pretrained(tmp_path / "run" / "model"))
    ledger = log_of(tmp_path / "run")[0]
    assert ledger["trains"].startswith("projection, adapters (")


def test_a_run_with_stages_goes_on_to_the_bit(write_recipe, tmp_path, capsys):
    run, stages = tmp_path / "run", [{"open": ["all"], "step": 3, "lr": 1e-3, "depth_decay": 0.9}]
    values = {"lora": LORA, "thaw": stages}
    train_command(
        write_recipe(train=TRAIN | values, out=str(run), checkpoint={"every": 1, "keep": 9})
    )
    assert "at step 3 also vision" in " ".join(capsys.readouterr().out.split())
    log, weights = log_of(run), Retriever.from_pretrained(run / "model").fingerprint()
    for begun in (2, 3, 4):
        shutil.rmtree(run / "model")
        for step in range(begun + 1, 7):
            shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
        resume_command(run)
        assert log_of(run) == log
        assert Retriever.from_pretrained(run / "model").fingerprint() == weights
