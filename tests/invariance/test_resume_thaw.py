"""A run with stages that is killed from the command line ends on the bits of the unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from thawing import assert_same

STEPS, OPENING = 20, 9
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# dies by SIGKILL as a stage opens: adapters are merged, what they leave does not train yet
DIES_OPENING = """
import os, signal, sys
from colfolio.cli import main
from colfolio.training import opening

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

opening.stage_groups = die
sys.argv[0] = "colfolio"
main()
"""
COMMAND = ["-m", "colfolio.cli"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_shapes, shared_retriever):
    """Adapters at first, and beside them the projection; then all is merged and trains in full."""
    folder = tmp_path_factory.mktemp("thaw")
    write_shapes(folder / "set", {"train": 40, "validation": 12})
    shared_retriever.save_pretrained(folder / "base")
    full = {"open": ["all"], "step": OPENING, "lr": 2e-3, "warmup": 3, "depth_decay": 0.7}
    return {
        "model": str(folder / "base"),
        "dataset": str(folder / "set"),
        "train": {
            "steps": STEPS,
            "batch": {"rows": 8},
            "optimiser": {"lr": 0.01, "warmup_steps": 5},
            "threads": 1,
            "lora": {"rank": 3, "dropout": 0.1, "projection": "full", "vision": ["attn.qkv"]},
            "thaw": [full],
        },
        "validation": {"every": 12},
        "checkpoint": {"every": 4, "keep": 2},
    }


def begin(recipe, run, code):
    """A process that trains into a folder, or goes on with what is there."""
    if (run / "recipe.yaml").exists():
        arguments = ["--resume", str(run)]
    else:
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe | {"out": str(run)}))
        arguments = [str(path)]
    return subprocess.Popen(
        [sys.executable, *code, "train", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def log_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "rows_per_second")
    return [{key: row[key] for key in row if key not in times} for row in rows]


def steps_logged(run):
    log = run / "log.jsonl"
    return log.read_bytes().count(b'"step", "step"') if log.exists() else 0


def optimiser_of(run):
    """The state at the end; files of equal states may differ in what pickle shares."""
    path = run / "checkpoints" / f"step-{STEPS:06d}" / "optimiser.pt"
    return torch.load(path, weights_only=True)


def kill_after_step(process, run, step):
    """Send SIGKILL once the log has a step; the run may be a few further by then."""
    while process.poll() is None and steps_logged(run) < step:
        time.sleep(0.002)
    process.kill()
    return ended(process)[0]


@pytest.mark.slow
def test_killed_as_a_stage_opens_and_within_it_a_run_ends_on_the_bits_of_the_unbroken_one(
    recipe, tmp_path
):
    plain, run = tmp_path / "plain", tmp_path / "run"
    unbroken = begin(recipe, plain, COMMAND)

    code, printed = ended(begin(recipe, run, ["-c", DIES_OPENING]))
    assert code == -signal.SIGKILL, printed
    assert steps_logged(run) == OPENING  # it died between that step and the next
    assert kill_after_step(begin(recipe, run, COMMAND), run, OPENING + 2) == -signal.SIGKILL
    assert OPENING + 2 <= steps_logged(run) < STEPS
    code, printed = ended(begin(recipe, run, COMMAND))
    assert code == 0, printed

    code, printed = ended(unbroken)
    assert code == 0, printed
    assert log_of(run) == log_of(plain)
    opened = [row["step"] for row in log_of(run) if row.get("opened")]
    assert opened == [OPENING + 1]
    for name in ("model.safetensors", "colfolio.json"):
        assert (run / "model" / name).read_bytes() == (plain / "model" / name).read_bytes(), name
    assert_same(optimiser_of(run), optimiser_of(plain))
