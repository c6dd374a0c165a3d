"""What tests of interrupted runs share: a process that trains, and what its folder says of it."""

import json
import os
import subprocess
import sys
import time

import yaml

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COMMAND = ("-m", "colfolio.cli")


def start(recipe, run, code=COMMAND):
    """A process that trains into a folder, or goes on with what is there.

    Args:
        code: what Python is given to run, in place of the command line.
    """
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
    """The exit code, and what was printed."""
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def finish(process):
    """Wait for the end of a run, which must come by itself."""
    code, printed = ended(process)
    assert code == 0, printed


def wait_for_step(process, run, step):
    """Wait until the log has a step, which may be some steps ago then; False if the run ends."""
    while process.poll() is None:
        if steps_logged(run) >= step:
            return True
        time.sleep(0.002)
    return False


def steps_logged(run):
    log = run / "log.jsonl"
    return log.read_bytes().count(b'"step", "step"') if log.exists() else 0


def log_of(run):
    """The rows of the log without times, and without facts, which a run that goes on finds anew."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "rows_per_second")
    told = [row for row in rows if row["kind"] != "facts"]
    return [{key: row[key] for key in row if key not in times} for row in told]
