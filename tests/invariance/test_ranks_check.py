"""Ranks make the first checks of a run together, see the same, and refuse alike."""

import pytest
from ranks import run_in_ranks

from colfolio.commands.check import first_checks
from colfolio.commands.run_ledger import ledger_of
from colfolio.commands.splits import Splits
from colfolio.data.dataset import load_dataset
from colfolio.data.prompts import Prompter
from colfolio.errors import ColfolioError
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings, start_training

SETTINGS = {
    "steps": 4,
    "seed": 3,
    "batch": {"rows": 5},
    "memory": {"chunk_tokens": 40},
    "precision": "fp32",
    "threads": 1,
}


def told_first(world, model, data, parallel, broken):
    """What the first checks tell this rank, of which one may read other strings."""
    if world.rank == broken:
        own = Prompter.query_ids
        Prompter.query_ids = lambda self, queries: [ids[:-1] for ids in own(self, queries)]
    settings = TrainSettings.model_validate(SETTINGS | {"parallel": parallel})
    state = start_training(Retriever.from_pretrained(model, device="cpu"), settings, world)
    splits = Splits(load_dataset(data, "train"), None)
    ledger = ledger_of(state, splits)
    try:
        checks = first_checks(state, splits, ledger, model, unchecked=False)
    except ColfolioError as error:
        return str(error)
    return [(check.name, check.passed) for check in checks]


@pytest.fixture
def model(retriever, tmp_path):
    retriever.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(write_shapes, tmp_path):
    write_shapes(tmp_path / "shapes", {"train": 24})
    return str(tmp_path / "shapes")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_all_ranks_pass_the_first_checks(parallel, model, data, tmp_path):
    first, second = run_in_ranks(told_first, 2, tmp_path / "ranks", model, data, parallel, None)
    assert first == second
    assert len(first) > 4
    assert all(passed for _, passed in first)


@pytest.mark.slow
def test_all_ranks_refuse_what_one_of_them_finds(model, data, tmp_path):
    first, second = run_in_ranks(told_first, 2, tmp_path / "ranks", model, data, "ddp", 1)
    assert first == second
    assert first.startswith("rank 1: not begun")
    assert "templates" in first
