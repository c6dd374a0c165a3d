"""A mend is printed as a command only where the run's recipe takes it."""

import json
from io import StringIO

import pytest
import yaml
from rich.console import Console

from colfolio.commands.findings import print_diagnosis
from colfolio.diagnosis.causes import Diagnosis, Finding

STEPS = {"train.steps": "20"}
FOUND = Diagnosis((Finding("over_fitting", "by heart", (), "likely", "Begin again", STEPS),))


@pytest.fixture
def printed(tmp_path):
    def run(train):
        recipe = {"model": "M", "dataset": "D", "out": "O", "train": train}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        told = StringIO()
        print_diagnosis(Console(file=told, soft_wrap=True), FOUND, tmp_path)
        return told.getvalue()

    return run


def policy(opens):
    stage = {"step": opens, "open": ["vision"], "lr": 1e-3}
    return {"steps": 80, "frozen": ["vision"], "thaw": [stage]}


def test_a_command_that_a_stage_of_the_recipe_refuses_is_not_printed(printed):
    told = printed(policy(opens=40))
    assert "Begin again (train.steps=20)." in told
    assert "does not take that as it is" in told
    assert "it opens at step 40" in told
    assert "train.steps=20 out=" not in told
    assert "train.steps=20 out=" in printed(policy(opens=10))


def test_a_recipe_that_is_wrong_by_itself_does_not_hide_the_command(printed):
    assert "train.steps=20 out=" in printed({"stepps": 80})


def test_the_command_of_a_run_of_several_ranks_asks_for_as_many(printed, tmp_path):
    settled = {"loss": "info_nce", "ranks": 4}
    line = json.dumps({"kind": "facts", "step": 0, "settled": settled})
    (tmp_path / "log.jsonl").write_text(f"{line}\n")
    assert "--ranks 4" in printed(policy(opens=10))
