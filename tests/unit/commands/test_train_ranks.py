"""`colfolio train` in several processes: started by itself, by torchrun or by accelerate."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_BIN = Path(sys.executable).parent
_TIMEOUT = 240
LAUNCHERS = {
    "colfolio": ["colfolio.cli", "train", "{recipe}", "--ranks", "2", "--device", "cpu"],
    "torchrun": [
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "colfolio.cli", "train", "{recipe}", "--device", "cpu"),
    ],
    "accelerate": [
        *("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("-m", "colfolio.cli", "train", "{recipe}", "--device", "cpu"),
    ],
}


def run(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        env=environment,
        check=False,
        **options,
    )


def steps_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


@pytest.fixture
def alone(write_recipe, tmp_path):
    """The log of the same recipe in one process."""
    done = run("colfolio.cli", "train", write_recipe(out=str(tmp_path / "alone")))
    assert done.returncode == 0, done.stderr
    return steps_of(tmp_path / "alone")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_the_same_batch(write_recipe, tmp_path, alone, launcher):
    recipe = write_recipe()
    done = run(*(part.format(recipe=recipe) for part in LAUNCHERS[launcher]))
    assert done.returncode == 0, done.stderr
    together = steps_of(tmp_path / "run")
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for mine, expected in zip(together, alone, strict=True):
        for key in ("candidates", "loss", "gradient_norm"):
            assert mine[key] == pytest.approx(expected[key], rel=1e-3), key
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert done.stdout.count("trained for 6 steps") == 1


def test_a_users_mistake_is_told_once_with_its_exit_code(write_recipe, tmp_path):
    recipe = write_recipe(dataset=str(tmp_path / "nowhere"))
    done = run("colfolio.cli", "train", recipe, "--ranks", "2", "--device", "cpu")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_the_step_of_all_ranks_and_the_run_goes_on(write_recipe, tmp_path):
    recipe = write_recipe()
    folder = tmp_path / "run"
    command = ["colfolio.cli", "train", recipe, "train.steps=4000", "--ranks", "2"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", *map(str, command), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + _TIMEOUT
    while not (folder / "log.jsonl").exists() or len(steps_of(folder)) < 3:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(2)
    out, errors = process.communicate(timeout=_TIMEOUT)
    assert process.returncode == 130, errors
    last = steps_of(folder)[-1]["step"]
    assert f"stopped after step {last}" in out
    assert (folder / "checkpoints" / f"step-{last:06d}").exists()


def test_more_ranks_under_a_launcher_are_refused(write_recipe, monkeypatch, refused):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "--ranks 2" in refused("train", write_recipe(), "--ranks", "2")
