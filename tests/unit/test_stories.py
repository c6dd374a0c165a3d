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


@pytest.mark.slow
def test_directions_are_learnt_later_with_flattened_positions_or_a_frozen_decoder(tmp_path):
    told_by("story_mrope.py", tmp_path)
    record = json.loads((tmp_path / "story_mrope.json").read_text())
    ended = {run["arm"]["name"]: run for run in record["runs"]}
    positions = {name: run["positions"] for name, run in ended.items()}
    assert positions == {"full": "right", "frozen": "right", "flattened": "flattened"}
    assert len({run["answer_tokens"] for run in ended.values()}) == 1
    direction = {name: run["outcome"]["direction"] for name, run in ended.items()}
    assert direction["full"] > 0.7  # chance is a quarter
    assert direction["full"] > 0.1 + max(direction["flattened"], direction["frozen"])
    for run in ended.values():  # all learn what needs no positions
        assert run["outcome"]["accuracy"] > 0.8
    assert (tmp_path / "mrope.png").stat().st_size > 10_000
