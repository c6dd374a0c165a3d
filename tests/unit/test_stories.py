"""The stories' quick forms, each by its one command: what they claim must show again."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def told_by(script, out):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, env=environment, cwd=out, timeout=600)


@pytest.mark.slow
def test_a_larger_batch_alone_does_not_lift_the_pairwise_loss_from_ln_2(tmp_path):
    told_by("story_069.py", tmp_path)
    record = json.loads((tmp_path / "story_069.json").read_text())
    ended = {
        (run["arm"]["kind"], run["arm"]["rows"]): (run["curve"][-1], run["ndcg"])
        for run in record["runs"]
    }
    last, ndcg = ended["pairwise", 64]
    assert math.isclose(last["loss"], math.log(2), rel_tol=0.03)
    assert last["spread"] < 0.1  # collapsed: every document scores alike
    assert ndcg < 0.1
    last, ndcg = ended["info_nce", 64]
    assert last["loss"] < 0.5 * last["chance"]
    assert ndcg > 0.8
    assert (tmp_path / "loss_069.png").stat().st_size > 10_000
