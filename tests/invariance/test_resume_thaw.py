"""A run with stages that is killed from the command line ends on the bits of the unbroken one."""

import signal

import pytest
import torch
from running import ended, finish, log_of, start, steps_logged, wait_for_step
from thawing import assert_same

STEPS, OPENING = 20, 9
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


def optimiser_of(run):
    """The state at the end; files of equal states may differ in what pickle shares."""
    path = run / "checkpoints" / f"step-{STEPS:06d}" / "optimiser.pt"
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_killed_as_a_stage_opens_and_within_it_a_run_ends_on_the_bits_of_the_unbroken_one(
    recipe, tmp_path
):
    plain, run = tmp_path / "plain", tmp_path / "run"
    unbroken = start(recipe, plain)

    code, printed = ended(start(recipe, run, ("-c", DIES_OPENING)))
    assert code == -signal.SIGKILL, printed
    assert steps_logged(run) == OPENING  # it died between that step and the next
    again = start(recipe, run)
    wait_for_step(again, run, OPENING + 2)
    again.kill()
    assert ended(again)[0] == -signal.SIGKILL
    assert OPENING + 2 <= steps_logged(run) < STEPS
    finish(start(recipe, run))
    finish(unbroken)
    assert log_of(run) == log_of(plain)
    opened = [row["step"] for row in log_of(run) if row.get("opened")]
    assert opened == [OPENING + 1]
    for name in ("model.safetensors", "colfolio.json"):
        assert (run / "model" / name).read_bytes() == (plain / "model" / name).read_bytes(), name
    assert_same(optimiser_of(run), optimiser_of(plain))
