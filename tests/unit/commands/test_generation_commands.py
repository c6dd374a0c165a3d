"""`init`, `parts`, `plan` and `train` with the objective `generation`, one after another."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conversing import generator_of, write_lines, write_moving

from colfolio.commands.init import init_command
from colfolio.errors import RecipeError
from colfolio.models import Retriever
from colfolio.models.generator import Generator


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_moving(folder, "train", 20, seed=1)
    write_moving(folder, "validation", 6, seed=2)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_shape):
    folder = tmp_path_factory.mktemp("generator") / "base"
    generator_of(tiny_shape).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, clips, base):
    """Writes a recipe of six steps with validation; its run goes to `tmp_path/run`."""

    def write(train=(), **changed):
        values = {
            "model": str(base),
            "dataset": str(clips),
            "out": str(tmp_path / "run"),
            "train": {
                "objective": "generation",
                "steps": 6,
                "batch": {"rows": 8},
                "optimiser": {"lr": 0.004, "warmup_steps": 2},
                "precision": "fp32",
                "threads": 1,
                **dict(train),
            },
            "validation": {"every": 3},
            "checkpoint": {"every": 2},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | changed))
        return path

    return write


def evaluations(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "evaluation"]


def test_from_a_shape_to_a_report_past_a_kill(colfolio, shape_file, clips, recipe, tmp_path):
    made = tmp_path / "made"
    code, printed, errors = colfolio(
        *("init", shape_file, "--out", made, "--generator", "--dataset", clips)
    )
    assert code == 0, errors
    assert "a generator, which chooses among" in printed
    whole = recipe(model=str(made), out=str(tmp_path / "whole"))
    assert colfolio("train", whole)[0] == 0
    path = recipe(train={"tensorboard": True}.items(), model=str(made))
    _kill_after_a_checkpoint(path, tmp_path / "run")
    assert colfolio("train", "--resume", tmp_path / "run")[0] == 0
    found, expected = (evaluations(tmp_path / name) for name in ("run", "whole"))
    assert found == expected
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        assert row["split"] == "validation"
        assert 0 < row["loss"] < row["chance"]
        assert 0 <= row["token_accuracy"] <= 1
    report = (tmp_path / "run" / "report.html").read_text()
    for title in ("Loss", "Validation loss", "token_accuracy, validation"):
        assert title in report
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")
    ]
    assert weights[0] == weights[1]
    assert _tags(tmp_path / "run" / "tensorboard") >= {
        *("train/loss", "validation/loss", "validation/chance", "validation/token_accuracy"),
    }


def _kill_after_a_checkpoint(recipe, run):
    command = [sys.executable, "-m", "colfolio.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not any((run / "checkpoints").glob("*2")):
        time.sleep(0.01)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (run / "recipe.yaml").exists()


def _tags(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = set()
    for file in folder.iterdir():
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        found |= set(events.Tags()["scalars"])
    return found


def test_validation_draws_nothing_and_does_not_depend_on_how_it_is_cut(colfolio, recipe, tmp_path):
    """The same weights, measured with dropout of adapters and in chunks of one row."""
    lora = {"rank": 2, "dropout": 0.5, "projection": "frozen"}
    losses = []
    for name, memory in (("a", {}), ("b", {"chunk_tokens": 40})):
        train = {"lora": lora, "memory": memory, "optimiser": {"lr": 1e-9, "warmup_steps": 0}}
        path = recipe(train=train.items(), out=str(tmp_path / name))
        assert colfolio("train", path)[0] == 0
        losses += [row["loss"] for row in evaluations(tmp_path / name)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_parts_of_a_generator_are_told(colfolio, base, recipe):
    code, out, errors = colfolio("parts", base)
    assert (code, errors) == (0, "")
    assert "a generator whose head is the projection" in out
    assert re.search(r"^projection .* yes ", out, re.M)
    frozen = recipe(train={"frozen": ["vision", "projection"]}.items())
    code, out, _ = colfolio("parts", base, frozen)
    assert re.search(r"^projection .* no ", out, re.M)
    assert re.search(r"^layers .* yes ", out, re.M)


def test_a_head_that_is_the_embedding_is_no_part(colfolio, tiny_shape, tmp_path):
    generator_of(tiny_shape, tied=True).save_pretrained(tmp_path / "tied")
    out = colfolio("parts", tmp_path / "tied")[1]
    assert "a generator whose head is its embedding" in out
    assert not re.search("^projection ", out, re.M)


def test_a_plan_tells_what_a_batch_of_conversations_takes(colfolio, recipe, base, tmp_path):
    code, out, errors = colfolio("plan", recipe())
    assert (code, errors) == (0, "")
    for words in (
        "a batch: 8 conversations of ",
        ", 2 to predict",
        "20 of 20 conversations measured",
        "a chunk at work, its logits included",
        "1 of conversations; one pass",
        "steps (3.0 epochs)",
    ):
        assert words in out
    assert "MaxSim" not in out
    assert max(map(len, out.split("\n")[1:])) <= 80
    memory = {"chunk_tokens": 100, "activation_mb": 0.05}
    code, out, _ = colfolio("plan", recipe(train={"memory": memory}.items()))
    assert code == 1
    assert "8 of conversations" in out
    line = re.search(r"memory: \{.*\}", out)
    assert colfolio("plan", recipe(train=yaml.safe_load(line[0]).items()))[0] == 0
    code, out, _ = colfolio("plan", recipe(dataset="not/here"), "--gpu", "t4-16gb", "--ranks", "2")
    assert code == 0
    assert "an image of the most pixels" in out
    assert max(map(len, out.split("\n")[2:])) <= 80


def test_a_plan_reads_no_weights(colfolio, recipe, base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.glob("*.json"):
        (bare / file.name).write_bytes(file.read_bytes())
    assert colfolio("plan", recipe(model=str(bare)))[0] == 0


@pytest.mark.parametrize("command", ["train", "plan", "parts"])
def test_a_model_of_the_other_objective_is_refused_by_its_name(
    refused, recipe, write_recipe, base, base_folder, command
):
    def asked(model, path):
        return (command, model, path) if command == "parts" else (command, path)

    told = refused(*asked(base_folder, recipe(model=str(base_folder))))
    assert f"{base_folder}: is a retriever" in told
    told = refused(*asked(base, write_recipe(model=str(base))))
    assert f"{base}: is a generator" in told
    assert "colfolio init" in told


@pytest.mark.parametrize("command", ["train", "plan"])
def test_bad_conversations_are_refused_by_row(refused, recipe, clips, tmp_path, command):
    told = refused(command, recipe(split="tset"))
    assert "there is no split 'tset' of conversations" in told
    assert "splits found: train, validation" in told
    rows = [{"image": "a.png", "question": "where?", "answer": answer} for answer in ("left", " ")]
    write_lines(tmp_path / "bad", "train", rows)
    told = refused(command, recipe(dataset=str(tmp_path / "bad")))
    assert "bad, split 'train': the answer is empty" in told
    assert "the first is row 2" in told
    assert not (tmp_path / "run").exists()


def test_a_validation_split_that_is_absent_is_refused_before_the_run(refused, recipe, tmp_path):
    told = refused("train", recipe(validation={"split": "valid", "every": 3}))
    assert "there is no split 'valid' of conversations" in told
    assert not (tmp_path / "run").exists()


def test_weights_of_a_generator_make_one_again_or_the_base_of_a_retriever(base, tmp_path):
    init_command(str(base), tmp_path / "again", generator=True)
    ours, theirs = (
        Generator.from_pretrained(folder, device="cpu") for folder in (tmp_path / "again", base)
    )
    assert ours.weights().keys() == theirs.weights().keys()
    assert all(ours.weights()[name].equal(tensor) for name, tensor in theirs.weights().items())
    assert ours.contract.source.name == "base"
    init_command(str(base), tmp_path / "retriever", dim=8)
    assert Retriever.from_pretrained(tmp_path / "retriever", device="cpu").dim == 8


def test_one_seed_makes_one_generator(shape_file, clips, tmp_path):
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name
        init_command(str(shape_file), out, seed=seed, dataset=str(clips), generator=True)
        prints.append(Generator.from_pretrained(out, device="cpu").fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_options_that_a_generator_has_no_use_for_are_refused(shape_file, shapes_folder, tmp_path):
    with pytest.raises(RecipeError, match="--dim is of vectors"):
        init_command("owner/name", tmp_path / "base", dim=8, generator=True)
    with pytest.raises(RecipeError, match="add --dataset"):
        init_command(str(shape_file), tmp_path / "base", generator=True)
    assert not (tmp_path / "base").exists()


def test_a_dataset_for_retrieval_teaches_no_generator(refused, shape_file, shapes_folder, tmp_path):
    told = refused(
        *("init", shape_file, "--out", tmp_path / "base", "--generator"),
        *("--dataset", shapes_folder),
    )
    assert "is a dataset for retrieval" in told
