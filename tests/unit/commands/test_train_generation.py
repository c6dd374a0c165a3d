"""`colfolio train` with the objective `generation`, from a recipe to a model that answers."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from conversing import QUESTION, generator_of, moving_square, write_moving
from html_page import Page

from colfolio.data.video import Clip
from colfolio.models.generator import Generator

LORA = {"rank": 2, "dropout": 0.2, "projection": "frozen"}


@pytest.fixture(scope="module")
def moving_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_moving(folder, "train", 20, seed=1)
    write_moving(folder, "validation", 6, seed=2)
    return folder


@pytest.fixture
def write_generation(tmp_path, tiny_shape_of, moving_folder):
    """Writes a recipe of six steps and its base; its run goes to `tmp_path/run`."""

    def write(out="run", train=(), **changed):
        base = tmp_path / "base"
        if not base.exists():
            generator_of(tiny_shape_of("colfolio_grafted"), tied=True).save_pretrained(base)
        values = {
            "model": str(base),
            "dataset": str(moving_folder),
            "out": str(tmp_path / out),
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
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(values | changed))
        return path

    return write


def log_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "rows_per_second", "tokens_per_second")
    return [{key: row[key] for key in row if key not in times} for row in rows]


def test_negatives_are_refused_where_there_are_none(write_generation, colfolio):
    path = write_generation(validation={"every": 3, "pool": 5})
    code, _, errors = colfolio("train", path)
    told = " ".join(errors.split())
    line = path.read_text().splitlines().index("  pool: 5") + 1
    assert code == 1
    assert f"{path}:{line}: validation.pool: is 5, and objective generation has no neg" in told


def test_a_run_leaves_a_model_that_answers_its_log_and_a_report(
    colfolio, write_generation, tmp_path
):
    code, printed, errors = colfolio("train", write_generation())
    assert code == 0, errors
    assert "every answer token of a step weighs the same" in printed
    log = log_of(tmp_path / "run")
    assert [row["step"] for row in log if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    generator = Generator.from_pretrained(tmp_path / "run" / "model", device="cpu")
    chance = math.log(generator.vocabulary)
    assert f"next token of answers: chance {chance:.3f}" in printed
    for row in log:
        if row["kind"] == "step":
            assert row["chance"] == pytest.approx(chance, rel=1e-6)
            assert {"loss", "accuracy", "answer_tokens", "tokens", "parts"} <= row.keys()
    held_out = [row for row in log if row["kind"] == "evaluation"]
    assert [row["step"] for row in held_out] == [3, 6]
    assert held_out[1]["loss"] < held_out[0]["loss"] < chance
    clip = Clip(moving_square("left", np.random.default_rng(0)), 0.5)
    assert isinstance(generator.generate(clip, QUESTION, 4), str)
    assert generator.contract.recipe["train"]["objective"] == "generation"
    page = Page((tmp_path / "run" / "report.html").read_text())
    for told in (
        "Token accuracy on validation",
        "every answer token of a step weighs the same",
        f"next token of answers: chance {chance:.3f}, ln of the vocabulary",
        "every token of the vocabulary is as likely",
        "trains",
    ):
        assert told in page.words, told
    for other in ("scores without information", "the floor the least", "compared with"):
        assert other not in page.words, other


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"frozen": ["vision[9]"]}, r"train\.frozen: 'vision\[9\]' reaches beyond"),
        ({"lora": LORA | {"text": ["q_prj"]}}, r"train\.lora\.text: .*no linear layer 'q_prj'"),
        (
            {"frozen": ["norm"], "thaw": [{"open": ["layers"], "step": 1, "lr": 1e-3}]},
            r"train\.thaw\.0\.open: layers trains by then already",
        ),
    ],
)
def test_a_policy_that_cannot_be_is_refused_before_weights_are_read(
    refused, write_generation, monkeypatch, policy, told
):
    path = write_generation(train=policy.items())
    monkeypatch.setattr(Generator, "from_pretrained", None)
    assert re.search(told, " ".join(refused("train", path).split()))


@pytest.mark.parametrize("policy", [{}, {"lora": LORA}], ids=["full", "lora with dropout"])
def test_a_run_that_stopped_goes_on_to_the_same_bits(
    colfolio, write_generation, tmp_path, monkeypatch, policy
):
    assert colfolio("train", write_generation(out="unbroken", train=policy.items()))[0] == 0
    path = write_generation(train=policy.items())
    from colfolio.commands import run_steps

    real, calls = run_steps.validate, []

    def stop(*arguments):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_steps, "validate", stop)
    assert colfolio("train", path)[0] == 130
    monkeypatch.setattr(run_steps, "validate", real)
    code, printed, errors = colfolio("train", "--resume", tmp_path / "run")
    assert code == 0, errors
    assert "goes on after step 2" in printed
    assert len(calls) == 1
    for name in ("model.safetensors", "config.json", "colfolio_chat.json"):
        ours, theirs = (tmp_path / run / "model" / name for run in ("run", "unbroken"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert log_of(tmp_path / "run") == log_of(tmp_path / "unbroken")


def test_what_is_of_the_other_objective_is_refused(
    refused, write_generation, moving_folder, shapes_folder, base_folder, write_recipe, tmp_path
):
    recipe = write_generation(dataset=str(shapes_folder))
    assert "is a dataset for retrieval" in refused("train", recipe)
    assert "is a retriever" in refused("train", write_generation(model=str(base_folder)))
    assert "holds conversations" in refused("train", write_recipe(dataset=str(moving_folder)))
    loss = write_generation(train={"loss": {"temperature": 0.1}}.items())
    assert "which are of retrieval" in refused("train", loss)
    assert not (tmp_path / "run").exists()


def test_adapters_of_a_generator_are_merged_into_what_is_saved(
    colfolio, write_generation, tmp_path
):
    code, printed, errors = colfolio("train", write_generation(train={"lora": LORA}.items()))
    assert code == 0, errors
    assert "adapters" in printed
    base = Generator.from_pretrained(tmp_path / "base", device="cpu").weights()
    trained = Generator.from_pretrained(tmp_path / "run" / "model", device="cpu").weights()
    changed = {name for name in base if not base[name].equal(trained[name])}
    assert changed == {name for name in base if "layers." in name and "_proj.weight" in name}
