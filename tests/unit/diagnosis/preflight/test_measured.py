"""What gradients ask for is told beside what the recipe has, and leaves no trace."""

import math
from dataclasses import replace

import pytest
import torch

from colfolio.data.dataset import load_dataset
from colfolio.diagnosis.preflight import measure_run
from colfolio.diagnosis.preflight.measured import told_rates
from colfolio.diagnosis.signals.rate_range import RateRange
from colfolio.training import TrainSettings


@pytest.fixture(scope="session")
def shapes(tmp_path_factory, write_shapes):
    folder = tmp_path_factory.mktemp("measured") / "shapes"
    write_shapes(folder, {"train": 24})
    return load_dataset(folder, "train")


def settings_of(**changed):
    given = {
        "steps": 3,
        "batch": {"rows": 6},
        "optimiser": {"lr": 1e-2, "warmup_steps": 1},
        "precision": "fp32",
    }
    return TrainSettings.model_validate(given | changed)


def test_a_run_is_measured_on_copies(make_retriever, shapes):
    retriever = make_retriever()
    weights, generator = retriever.fingerprint(), torch.get_rng_state()
    found = {each.name: each.told for each in measure_run(retriever, settings_of(), shapes)}
    assert list(found) == ["gradient", "batch", "rates"]
    for part in ("vision", "merger", "embedding", "layers", "norm", "projection"):
        assert f"{part} " in found["gradient"]
    assert "the recipe has 1.0e-02" in found["rates"]
    assert retriever.fingerprint() == weights
    assert torch.equal(torch.get_rng_state(), generator)


def test_only_what_trains_first_is_measured(make_retriever, shapes):
    thaw = [
        {"open": ["layers"], "lr": 1e-2, "step": 0},
        {"open": ["vision"], "lr": 1e-2, "step": 2},
    ]
    settings = settings_of(frozen=["all"], thaw=thaw)
    told = next(measure_run(make_retriever(), settings, shapes)).told
    assert "layers " in told
    assert "vision" not in told


FALLING = RateRange((1e-5, 1e-3, 1e-1), (3.0, 2.0, 9.0), 1e-2)


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        (1e-1, "set train.optimiser.lr to 3.3e-03"),
        (1e-6, "hardly moves"),
        (5e-3, "2 times"),
    ],
)
def test_the_recipes_rate_stands_beside_the_highest_that_falls(lr, said):
    settings = settings_of(optimiser={"lr": lr})
    assert said in told_rates(FALLING, settings)


def test_a_loss_that_no_rate_lowers_is_told():
    rising = replace(FALLING, losses=(1.0, 2.0, math.nan), highest=None)
    assert "no step lowered it" in told_rates(rising, settings_of())
