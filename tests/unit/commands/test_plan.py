import re

import pytest
import yaml

TRAIN = {"steps": 6, "batch": {"rows": 6}, "precision": "fp32"}


@pytest.fixture
def plan(colfolio, write_recipe):
    """Plans the recipe with some overrides; gives the exit code and what was printed."""

    def run(*arguments, **changed):
        code, out, errors = colfolio("plan", write_recipe(**changed), *arguments)
        assert errors == ""
        return code, out

    return run


def numbers_of(out):
    """Name -> number of each line of the tables, sizes in MiB."""
    numbers = {}
    for line in out.split("\n"):
        found = re.fullmatch(r"(\S.*?) {2,}([\d.,]+)( \w+)?", line.rstrip())
        if found:
            unit = 1024 if found[3] == " GiB" else 1
            numbers[found[1]] = float(found[2].replace(",", "")) * unit
    return numbers


def test_the_parts_add_up_and_the_recipe_fits(plan):
    code, out = plan()
    numbers = numbers_of(out)
    assert code == 0
    parts = list(numbers.values())[: list(numbers).index("at the highest moment of a step")]
    assert sum(parts) == pytest.approx(numbers["at the highest moment of a step"], abs=2)
    assert "does not fit" not in out
    assert "one pass" in out
    assert "24 of 24 documents measured" in out
    assert numbers["steps (1.5 epochs)"] == 6


LORA = {"rank": 2, "vision": ["attn.qkv"]}
STAGES = [
    {"open": ["layers"], "step": 2, "lr": 1e-3},
    {"open": ["all"], "epoch": 1.0, "lr": 1e-4},
]


def test_a_plan_shows_the_stage_that_takes_most(plan):
    whole = plan()[1]
    assert "what opens when" not in whole
    code, out = plan(train=TRAIN | {"lora": LORA, "thaw": STAGES})
    assert code == 0
    rows = re.findall(r"^(the beginning|thaw\.\d) +(\d+) +[\d.]+ M +[\d.]+ MiB", out, re.M)
    assert rows == [("the beginning", "0"), ("thaw.0", "2"), ("thaw.1", "4")]
    assert "\nmemory from thaw.1 on\n" in out
    found, expected = numbers_of(out), numbers_of(whole)
    for name in list(expected)[: list(expected).index("steps (1.5 epochs)")]:
        assert found[name] == expected[name], name
    for name in ("disk: 2 + 1 checkpoints", "disk: the model in the end"):
        assert found[name] == expected[name], name
    operations = [
        float(re.search(r"operations a step and rank +(\S+)", text)[1]) for text in (out, whole)
    ]
    assert operations[0] < operations[1]
    assert max(map(len, out.split("\n")[1:])) <= 80


def test_a_stage_that_waits_for_a_signal_is_said_to_open_later(plan):
    stage = {"open": ["norm"], "at_chance": 3, "lr": 1e-3}
    out = plan("--gpu", "h100-80gb", train=TRAIN | {"frozen": ["norm"], "thaw": [stage]})[1]
    assert re.search(r"^thaw\.0 +3 or later ", out, re.M)


def test_no_line_is_wider_than_a_terminal(plan):
    for arguments in (
        [],
        ["--gpu", "t4-16gb", "--ranks", "4"],
        ["train.memory.activation_mb=0.001"],
    ):
        assert max(map(len, plan(*arguments)[1].split("\n")[1:])) <= 80


def test_no_weights_are_read(plan, base_folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in base_folder.glob("*.json"):
        (base / file.name).write_bytes(file.read_bytes())
    assert plan(model=str(base))[0] == 0


def test_what_does_not_fit_exits_with_1_and_says_what_would(plan):
    code, out = plan("--gpu", "t4-16gb", train=TRAIN | {"memory": {"activation_mb": 0.2}})
    assert code == 1
    assert re.search(
        r"does not fit: a chunk holds [\d.]+ MiB, but memory.activation_mb is 0\.2", out
    )
    line = re.search(r"memory: \{.*\}", out)
    assert line
    assert "gradient_checkpointing: all" in out
    code, out = plan("--gpu", "t4-16gb", train=TRAIN | yaml.safe_load(line[0]))
    assert code == 0


def test_overrides_are_those_of_training(plan):
    assert numbers_of(plan("train.steps=60")[1])["steps (15.0 epochs)"] == 60


def test_more_ranks_take_less_memory_each(plan):
    one, two = (
        numbers_of(plan("--gpu", "h100-80gb", "--ranks", ranks, "train.batch.rows=12")[1])
        for ranks in (1, 2)
    )
    graphs = "graphs kept from the first pass to the second"
    assert two[graphs] <= one[graphs]


def test_a_dataset_that_is_not_there_is_said_and_assumed(plan):
    code, out = plan(dataset="someone/pages")
    assert code == 0
    assert "someone/pages: not on this machine" in out
    assert "assumed: 32 tokens a query" in out
    assert "epochs" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], r"--gpu h100: is none of h100-80gb"),
        (["model=nowhere/at/all"], "no such folder"),
        (["--ranks", "8"], "8 ranks share the rows of a batch, but batch.rows is 6"),
        (["train.attention=varlen", "--gpu", "v100-32gb"], "attention varlen needs half precision"),
    ],
)
def test_what_cannot_be_planned_is_refused(refused, write_recipe, arguments, message):
    assert re.search(message, refused("plan", write_recipe(), *arguments))
