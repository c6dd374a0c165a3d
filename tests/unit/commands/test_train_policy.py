"""Policies of a recipe from the command line: refused with their line, told, resumed, saved."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from running import log_of

from colfolio.commands import policy
from colfolio.commands.train import resume_command, train_command
from colfolio.errors import RecipeError
from colfolio.models import Retriever
from colfolio.models.adapters import has_adapter
from colfolio.models.outline import outline_of
from colfolio.training import newest_checkpoint

TRAIN = {
    "steps": 6,
    "batch": {"rows": 6},
    "optimiser": {"lr": 0.01, "warmup_steps": 2},
    "precision": "fp32",
}
LORA = {"rank": 2, "dropout": 0.0, "projection": "full"}


@pytest.fixture
def no_weights(monkeypatch):
    """Lets no weight be read."""

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Retriever, "from_pretrained", refuse)


NORM = {"open": ["norm"], "step": 1, "lr": 1e-3}


def stages(*changed):
    """Settings with `norm` frozen and such stages, each a change of one that opens it at step 1."""
    both = [NORM | {"step": None} | each if "step" not in each else NORM | each for each in changed]
    return {"frozen": ["norm", "merger"], "thaw": both}


@pytest.mark.parametrize(
    ("values", "key", "told"),
    [
        ({"frozen": ["vision[9]"]}, "frozen", r"'vision\[9\]' reaches beyond .* This model has"),
        ({"frozen": ["adapters"]}, "frozen", "there are no adapters"),
        ({"frozen": ["norm", "head"]}, "frozen.1", "'head' is no selector"),
        ({"frozen": ["all"]}, "frozen", "no parameter of the model trains in the first step"),
        ({"lora": {"text": ["q_prj"]}}, "lora.text", r"no linear layer 'q_prj'; it has .*q_proj"),
        ({"lora": {"vision": ["q_proj"]}}, "lora.vision", "visual has no linear layer 'q_proj'"),
        ({"lora": {"rank": 2}, "frozen": ["vision"]}, "frozen", "'vision' freezes nothing"),
        ({"thaw_window": 7}, "thaw_window", "is 7, and no stage of `thaw` has margin_flat"),
        ({"thaw": [NORM]}, "thaw", "everything trains from the beginning"),
        (
            stages({"open": ["layers[9]"], "step": 1}),
            "thaw.0.open",
            r"'layers\[9\]' reaches beyond",
        ),
        (stages({"open": ["layers"], "step": 1}), "thaw.0.open", "layers trains by then already"),
        (stages({"step": 1}, {"step": 2}), "thaw.1.open", "norm trains by then already"),
        (
            stages({"open": ["norm", "merger"], "step": 1}, {"open": ["merger"], "step": 3}),
            "thaw.1.open",
            "merger trains by then already",
        ),
        (stages({"step": 1}, {"open": ["merger"], "step": 0}), "thaw.1.step", "step 0 is past"),
        (stages({"step": -1}), "thaw.0.step", "greater than or equal to 0, not -1"),
        (stages({"step": 600}), "thaw.0.step", "opens at step 600 at the earliest, and the run"),
        (
            stages({"epoch": 1.0}, {"open": ["merger"], "epoch": 0.5}),
            "thaw.1.epoch",
            "0.5 is past",
        ),
        (stages({"margin_flat": 3}), "thaw.0.margin_flat", "opens at step 200 at the earliest"),
        (stages({"at_chance": 6}), "thaw.0.at_chance", "opens at step 6 at the earliest"),
        (
            stages({"step": 3}, {"open": ["merger"], "at_chance": 3}),
            "thaw.1.at_chance",
            "opens at step 6 at the earliest",
        ),
        (stages({"step": 1, "lr": 0}), "thaw.0.lr", "greater than 0, not 0"),
        (stages({"step": 1, "lr": True}), "thaw.0.lr", "received True"),
        (stages({"step": 1, "open": []}), "thaw.0.open", "at least 1 item"),
        (stages({"step": 1, "open": ["head"]}), "thaw.0.open.0", "'head' is no selector"),
        ({"frozen": ["norm"], "optimiser": {"lr": 0}}, "optimiser.lr", "greater than 0, not 0"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_with_its_line_and_before_weights_are_read(
    write_recipe, no_weights, refused, values, key, told
):
    recipe = write_recipe(train=TRAIN | values)
    message = " ".join(refused("train", recipe).split())
    found = re.fullmatch(rf"error: {re.escape(str(recipe))}:(\d+): train\.(\S+): (.*)", message)
    assert found, message
    assert found[2] == key
    assert re.search(told, found[3]), message
    assert "recipe.yaml" not in found[3]  # one fault
    line = recipe.read_text().splitlines()[int(found[1]) - 1]
    last = key.split(".")[-1]
    assert line.lstrip("- ").startswith("head" if last.isdigit() else f"{last}:"), line


def test_a_list_in_brackets_with_brackets_inside_says_to_quote_it(write_recipe, refused):
    recipe = write_recipe(train=TRAIN)
    told = " ".join(refused("train", recipe, "train.frozen=[vision, layers[0:1]]").split())
    assert 'it stands in quotes, "layers[0:1]"' in told
    text = recipe.read_text().replace("train:\n", "train:\n  frozen: [vision, layers[0:1]]\n")
    recipe.write_text(text)
    line = 1 + text.splitlines().index("  frozen: [vision, layers[0:1]]")
    told = " ".join(refused("train", recipe).split())
    assert f"recipe.yaml:{line}: layers[0:1] has brackets" in told


def test_a_model_that_only_its_weights_tell_is_checked_once_it_is_loaded(write_recipe, monkeypatch):
    def unknown(*_):
        raise policy.CheckpointError("only its weights say what it is")

    monkeypatch.setattr(policy, "model_outline_of", unknown)
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


def trained_of(model):
    parameters = dict(model.named_parameters())
    return sorted(name for name in parameters if parameters[name].requires_grad)


def test_an_adapter_folder_trains_on_as_an_adapter_until_a_stage_opens_its_base(
    write_recipe, tmp_path, colfolio
):
    def recipe(**train):
        values = {"model": str(adapter), "out": str(tmp_path / "run"), "train": TRAIN | train}
        return write_recipe(**values)

    first, adapter = tmp_path / "first", tmp_path / "first" / "model"
    train_command(write_recipe(train=TRAIN | {"lora": LORA}, out=str(first)))
    expected = trained_of(Retriever.from_pretrained(adapter))
    assert expected == trained_of(outline_of(adapter).retriever)
    assert all("lora_" in name or name.startswith("projection.") for name in expected)

    assert colfolio("train", recipe())[0] == 0
    came = "projection, adapters (%s), for the model came with an adapter, and the weights of its"
    begun, ended = (
        Retriever.from_pretrained(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "model")
        for step in (4, 6)
    )
    told = log_of(tmp_path / "run")[0]["trains"]
    assert re.match(re.escape(came).replace("%s", ".*"), told), told
    moved = {
        name
        for name, weight in begun.weights().items()
        if not torch.equal(weight, ended.weights()[name])
    }
    assert moved <= {"custom_text_proj.weight", "custom_text_proj.bias"}

    shutil.rmtree(tmp_path / "run")
    stage = {"open": ["layers"], "step": 3, "lr": 1e-3}
    assert colfolio("train", recipe(thaw=[stage]))[0] == 0
    opened = [row["opened"] for row in log_of(tmp_path / "run") if row.get("opened")]
    assert opened == [["layers"]]
    assert not has_adapter(Retriever.from_pretrained(tmp_path / "run" / "model"))


def test_what_an_adapter_folder_cannot_do_is_refused_before_its_weights_are_read(
    write_recipe, tmp_path, refused, monkeypatch
):
    adapter = tmp_path / "first" / "model"
    train_command(write_recipe(train=TRAIN | {"lora": LORA}, out=str(tmp_path / "first")))

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Retriever, "from_pretrained", refuse)
    for values, told in (
        ({"lora": LORA}, r"train\.lora: the model has an adapter already, which trains without"),
        ({"frozen": ["vision"]}, r"train\.frozen: 'vision' freezes nothing: beside adapters"),
        (
            {"thaw": [{"open": ["projection"], "step": 1, "lr": 1e-3}]},
            r"train\.thaw\.0\.open: projection trains by then already",
        ),
    ):
        path = write_recipe(model=str(adapter), train=TRAIN | values)
        assert re.search(rf"recipe\.yaml:\d+: {told}", " ".join(refused("train", path).split()))


def test_an_epoch_out_of_reach_is_refused_before_weights_are_read(
    write_recipe, no_weights, refused
):
    stage = {"open": ["norm"], "epoch": 1.5, "lr": 1e-3}  # four batches an epoch
    path = write_recipe(train=TRAIN | {"frozen": ["norm"], "thaw": [stage]})
    message = " ".join(refused("train", path).split())
    assert re.search(r"recipe\.yaml:\d+: train\.thaw\.0\.epoch: it opens at step 6 ", message)


def test_features_that_a_stage_dropped_are_told_with_it(write_recipe, colfolio):
    stages = [{"open": ["norm"], "step": 1, "lr": 1e-3}, {"open": ["all"], "step": 5, "lr": 1e-3}]
    values = {"frozen": ["vision", "merger", "norm"], "features": {"ram_mb": 20.0}}
    path = write_recipe(train=TRAIN | values | {"thaw": stages})
    _, printed, _ = colfolio("train", path)
    told = r"features read (\d+) times, dropped when vision, merger opened at step 5"
    found = re.search(told, " ".join(printed.split()))
    assert found, printed
    assert int(found[1]) > 0
    _, printed, _ = colfolio("train", path, f"out={path.parent / 'kept'}", "train.thaw=[]")
    assert re.search(r"features [1-9]\d* kept, read [1-9]\d* times", " ".join(printed.split()))


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


def test_training_goes_on_from_an_adapter_on_a_base_that_was_trained(write_recipe, tmp_path):
    whole, adapted, further = (str(tmp_path / name) for name in ("whole", "adapted", "further"))
    train_command(write_recipe(train=TRAIN, out=whole))
    lora = TRAIN | {"lora": {"rank": 2}}
    train_command(write_recipe(train=lora, model=f"{whole}/model", out=adapted))
    train_command(write_recipe(train=TRAIN, model=f"{adapted}/model", out=further))
    newest = newest_checkpoint(tmp_path / "further" / "checkpoints")
    shutil.rmtree(newest)  # killed before it was written
    shutil.rmtree(tmp_path / "further" / "model")
    resume_command(Path(further))
    assert Retriever.from_pretrained(f"{further}/model").fingerprint()
