"""A cause that is planted in a run is the first that its diagnosis names; a healthy run has none.

One seed of each that is quick; `benchmarks/diagnosis.py` counts all, with all seeds.
"""

from dataclasses import replace

import pytest
from faults.ground import COUNTED, Ground, merged
from faults.healthy import HEALTHY_RUNS
from faults.plants import PLANTS
from faults.trials import run_trial

SEED = 0
FEW_STEPS = 10  # for what shows before the first
UNSURE = {"norm-only-published"}  # of this size, one norm alone learns something all the same
QUICK_HEALTHY = {"plain", "bf16", "trained", "lora", "frozen-vision", "rows-128"}


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("ground"), COUNTED)


def shortened(trial):
    if not trial.is_early:
        return trial
    return replace(trial, train=merged(trial.train, {"steps": FEW_STEPS}), every=FEW_STEPS)


def parameters(trials):
    return [pytest.param(trial, id=trial.name) for trial in trials]


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial",
    parameters(each for each in PLANTS if not each.is_slow and each.name not in UNSURE),
)
def test_the_planted_cause_is_named_first(trial, ground, tmp_path):
    outcome = run_trial(shortened(trial), ground, SEED, tmp_path)
    found = outcome.diagnosis.first
    assert found.cause == trial.cause, found.paragraph()
    assert found.evidence
    assert found.action


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial", parameters(each for each in HEALTHY_RUNS if each.name in QUICK_HEALTHY)
)
def test_a_healthy_run_is_given_no_cause(trial, ground, tmp_path):
    found = run_trial(trial, ground, SEED, tmp_path).diagnosis.first
    assert found.cause == trial.cause, found.paragraph()


def test_enough_is_planted_and_enough_is_healthy():
    assert len({trial.cause for trial in PLANTS}) >= 24
    assert len(HEALTHY_RUNS) >= 30
    names = [trial.name for trial in (*PLANTS, *HEALTHY_RUNS)]
    assert len(set(names)) == len(names)
