"""A run that is killed again and again, or interrupted, ends on the bits of the unbroken one."""

import random
import signal
import time

import pytest
from running import finish, log_of, start, steps_logged, wait_for_step

STEPS, EVERY, VALIDATE = 120, 6, 40


def assert_same(run, unbroken):
    for name in ("model.safetensors", "tokenizer.json", "config.json", "colfolio.json"):
        assert (run / "model" / name).read_bytes() == (unbroken / "model" / name).read_bytes(), name
    assert log_of(run) == log_of(unbroken)
    steps = [row["step"] for row in log_of(run) if row["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    last = f"checkpoints/step-{STEPS:06d}/optimiser.pt"
    assert (run / last).read_bytes() == (unbroken / last).read_bytes()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_shapes, shared_retriever):
    folder = tmp_path_factory.mktemp("resume")
    write_shapes(folder / "set", {"train": 40, "validation": 12})
    shared_retriever.save_pretrained(folder / "base")
    return {
        "model": str(folder / "base"),
        "dataset": str(folder / "set"),
        "train": {
            "steps": STEPS,
            "batch": {"rows": 8},
            "optimiser": {"lr": 0.01, "warmup_steps": 5},
            "threads": 1,
        },
        "validation": {"every": VALIDATE},
        "checkpoint": {"every": EVERY, "keep": 1},
    }


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory):
    """An unbroken run, with the seconds to its first step and to its end."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    begin = time.monotonic()
    process = start(recipe, run)
    assert wait_for_step(process, run, 1)
    first = time.monotonic() - begin
    finish(process)
    return run, first, time.monotonic() - begin


@pytest.mark.slow
def test_killed_at_five_random_moments_it_ends_on_the_bits_of_the_unbroken_run(
    recipe, unbroken, tmp_path
):
    plain, first, length = unbroken
    chance = random.Random(0)
    run = tmp_path / "run"
    killed = 0
    # one moment anywhere in the start, four anywhere in a quarter of the training: in a step, an
    # evaluation, or the writing of a checkpoint, which is every sixth step
    for number in range(5):
        process = start(recipe, run)
        if number == 0:
            time.sleep(chance.uniform(0.3, first))
        else:
            wait_for_step(process, run, steps_logged(run) + 1)
            time.sleep(chance.uniform(0, (length - first) / 4))
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
        killed += process.returncode != 0
    assert killed >= 3
    finish(start(recipe, run))
    assert_same(run, plain)


@pytest.mark.slow
def test_ctrl_c_saves_exits_with_130_and_the_run_goes_on(recipe, unbroken, tmp_path):
    plain, _, _ = unbroken
    run = tmp_path / "run"
    process = start(recipe, run)
    assert wait_for_step(process, run, 10)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert f"colfolio train --resume {run}" in printed.replace("\n", "")
    assert (run / "checkpoints" / f"step-{steps_logged(run):06d}").is_dir()
    finish(start(recipe, run))
    assert_same(run, plain)
