"""Each number at the top of a run's report stands beside what it means."""

import math

import pytest

from colfolio.commands.run_report import _highlights
from colfolio.diagnosis import LoggedEvaluation, LoggedStep, TrainingLog

CHANCE = math.log(64)


def told(losses, values=None, chance=CHANCE, chance_ndcg=0.023):
    steps = tuple(
        LoggedStep(n, loss, chance, None, None, None) for n, loss in enumerate(losses, start=1)
    )
    rows = () if values is None else (LoggedEvaluation(len(losses), "validation", values),)
    log = TrainingLog(steps, rows)
    return {each.label: (each.value, each.note) for each in _highlights(log, chance_ndcg)}


def test_the_last_loss_is_set_against_the_mean_that_ends_its_curve():
    losses = [1.0] * 295 + [0.5, 0.5, 0.5, 0.5, 1.0]
    note = "chance 4.159; mean of the last 5, the end of its curve: 0.600"
    assert told(losses)["loss, last step"] == ("1.000", note)


@pytest.mark.parametrize("losses", [[2.0, 1.0], [1.0] * 300])
def test_a_curve_that_ends_in_the_last_loss_needs_no_word(losses):
    assert told(losses)["loss, last step"] == ("1.000", "chance 4.159")
    assert told(losses, chance=None)["loss, last step"] == ("1.000", "")


def test_every_number_of_the_validation_split_stands_beside_chance():
    found = told([1.0], {"ndcg@5": 0.5, "loss": 3.0, "chance": math.log(65), "negatives": 64.0})
    assert found["ndcg@5, validation"] == ("0.500", "chance 0.023")
    assert found["loss, validation"] == ("3.000", "chance 4.174")
    assert len(found) == 3


def test_the_chance_of_a_token_is_one_in_the_vocabulary():
    values = {"loss": 3.0, "chance": math.log(50_000), "token_accuracy": 0.25}
    found = told([1.0], values, chance_ndcg=None)
    assert found["token_accuracy, validation"] == ("0.250", "chance 2.0e-05")


def test_a_number_that_is_none_is_told_so():
    assert told([1.0, math.nan])["loss, last step"] == ("–", "not finite")
    found = told([1.0], {"ndcg@5": 0.0, "chance": 4.0})
    assert found["loss, validation"] == ("–", "not finite")


def test_only_numbers_of_the_validation_split_are_open_to_its_doubts():
    log = TrainingLog(
        (LoggedStep(1, 1.0, None, None, None, None),),
        (LoggedEvaluation(1, "validation", {"ndcg@5": 0.5}),),
    )
    assert [each.is_validation for each in _highlights(log, None)] == [False, True]


def test_a_run_without_numbers_has_none_at_the_top():
    assert told([]) == {}
