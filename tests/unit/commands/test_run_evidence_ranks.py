"""Evidence of a run in several ranks: written once, and the same as that of one."""

import os
import subprocess
import sys

import pytest

from colfolio.diagnosis.run_evidence import read_evidence

pytestmark = pytest.mark.slow

_TIMEOUT = 240


def trained(recipe, *arguments):
    command = [sys.executable, "-P", "-m", "colfolio.cli", "train", recipe, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_ranks_measure_what_one_process_does(write_recipe, tmp_path, parallel):
    trained(write_recipe(out=str(tmp_path / "alone")))
    trained(write_recipe(), f"train.parallel={parallel}", "--ranks", "2")
    alone, together = (read_evidence(tmp_path / name) for name in ("alone", "run"))
    assert together.settled.ranks == 2
    assert together.data == alone.data
    for name in ("positions", "template_faults", "trains", "frozen", "drawn"):
        assert getattr(together.model, name) == getattr(alone.model, name)
    # weights that are spread over ranks are not read a second time
    assert (alone.model.fresh, together.model.fresh) == ((), () if parallel == "ddp" else None)
    assert [probe.step for probe in together.probes] == [0, 6]
    for mine, expected in zip(together.probes, alone.probes, strict=True):
        for name in ("loss", "margin", "spread", "document_rank", "document_distance"):
            expected_value = getattr(expected, name)
            assert getattr(mine, name) == pytest.approx(expected_value, rel=1e-3, abs=1e-5), name
