import json
import math

import pytest

from colfolio.diagnosis.training_log import LoggedPart, read_log
from colfolio.errors import ColfolioError


def step(number: int, **values) -> str:
    row = {"kind": "step", "step": number, "loss": 4.0, "chance": 4.85, "margin": 0.1, "lr": 1e-3}
    return json.dumps(row | {"rows_per_second": 900.0} | values)


def evaluation(number: int, value: float, split: str = "validation") -> str:
    return json.dumps({"kind": "evaluation", "step": number, "split": split, "ndcg@5": value})


def write(path, *lines: str, end: str = "\n"):
    path.write_text("\n".join(lines) + end)
    return path


def test_steps_and_evaluations_are_read_in_order(tmp_path):
    log = read_log(write(tmp_path / "log.jsonl", step(2), evaluation(2, 0.3), step(1)))
    assert [row.step for row in log.steps] == [1, 2]
    assert (log.steps[0].loss, log.steps[0].chance, log.steps[0].lr) == (4.0, 4.85, 1e-3)
    assert log.evaluations[0].values == {"ndcg@5": 0.3}
    assert log.evaluations[0].split == "validation"
    assert log.num_unreadable == 0


@pytest.mark.parametrize("keep", range(1, len(step(2))))
def test_the_last_line_of_a_killed_run_is_left_out(tmp_path, keep):
    path = write(tmp_path / "log.jsonl", step(1), step(2)[:keep], end="")
    log = read_log(path)
    assert [row.step for row in log.steps] == [1]
    assert log.num_unreadable == 1


def test_a_line_cut_inside_a_character_is_left_out(tmp_path):
    path = write(tmp_path / "log.jsonl", step(1))
    path.write_bytes(path.read_bytes() + '{"kind": "step", "note": "é'.encode()[:-1])
    assert read_log(path).num_unreadable == 1


def test_a_line_glued_to_a_cut_one_is_counted(tmp_path):
    log = read_log(write(tmp_path / "log.jsonl", step(1), step(2)[:20] + step(2), step(3)))
    assert [row.step for row in log.steps] == [1, 3]
    assert log.num_unreadable == 1


def test_of_a_repeated_step_the_later_line_stands(tmp_path):
    lines = [step(1, loss=3.0), step(2, loss=2.5), step(2, loss=2.0), evaluation(2, 0.1)]
    log = read_log(write(tmp_path / "log.jsonl", *lines, evaluation(2, 0.2)))
    assert [row.loss for row in log.steps] == [3.0, 2.0]
    assert [row.values["ndcg@5"] for row in log.evaluations] == [0.2]


def test_what_queries_were_compared_with_is_read_where_it_stands(tmp_path):
    lines = [step(1), step(2, candidates=31.5, masked=0.5, skipped=True)]
    before, after = read_log(write(tmp_path / "log.jsonl", *lines)).steps
    assert (before.candidates, before.masked, before.is_skipped) == (None, None, False)
    assert (after.candidates, after.masked, after.is_skipped) == (31.5, 0.5, True)


def test_other_kinds_and_blank_lines_are_passed_over(tmp_path):
    start = json.dumps({"kind": "start", "seed": 0})
    log = read_log(write(tmp_path / "log.jsonl", start, "", step(1)))
    assert len(log.steps) == 1
    assert log.num_unreadable == 0


def test_values_that_are_missing_or_no_numbers_are_none(tmp_path):
    short = json.dumps(
        {"kind": "step", "step": 1, "loss": 1.0, "chance": None, "margin": float("nan")}
    )
    (row,) = read_log(write(tmp_path / "log.jsonl", short)).steps
    assert (row.chance, row.margin, row.lr, row.rows_per_second) == (None, None, None, None)


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "3", '"text"', '{"kind": "step", "step": 1}', "{}", "[" * 100_000),
        '{"kind": "step", "step": Infinity, "loss": 1.0}',
        '{"kind": "step", "step": 1, "loss": 1' + "0" * 400 + "}",
        '{"kind": "step", "step": 1, "loss": 1.0, "chance": 1' + "0" * 400 + "}",
    ],
    ids=range(9),
)
def test_a_line_that_is_no_row_is_counted(tmp_path, line):
    assert read_log(write(tmp_path / "log.jsonl", line)).num_unreadable == 1


def test_a_missing_log_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ColfolioError, match=r"log.jsonl: the training log cannot be read"):
        read_log(tmp_path / "log.jsonl")


def test_parts_and_what_opened_are_read_where_they_stand(tmp_path):
    part = {"lr": 1e-4, "gradient_norm": math.inf, "update_ratio": 0.01, "trains": 12}
    lines = [step(1), step(2, parts={"vision": part}, opened=["vision[0:4]", "merger"], floor=0.5)]
    before, after = read_log(write(tmp_path / "log.jsonl", *lines)).steps
    assert (before.parts, before.opened, before.floor) == ({}, (), None)
    assert after.parts == {"vision": LoggedPart(1e-4, math.inf, 0.01)}
    assert (after.opened, after.floor) == (("vision[0:4]", "merger"), 0.5)


def test_what_was_not_finite_is_read_as_no_number(tmp_path):
    part = {"lr": 1e-4, "lr_least": 1e-5, "gradient_norm": None, "update_ratio": 0.0}
    log = read_log(write(tmp_path / "log.jsonl", step(1, loss=None, parts={"vision": part})))
    assert log.num_unreadable == 0
    found = log.steps[0].parts["vision"]
    assert math.isnan(log.steps[0].loss)
    assert math.isnan(found.gradient_norm)
    assert (found.lr, found.lr_least, found.update_ratio) == (1e-4, 1e-5, 0.0)


@pytest.mark.parametrize("parts", [3, [1], {"vision": {"lr": 1}}, {"vision": 1}, {"vision": []}])
def test_parts_that_are_none_make_an_unreadable_line(tmp_path, parts):
    assert read_log(write(tmp_path / "log.jsonl", step(1, parts=parts))).num_unreadable == 1


def test_a_fault_is_over_once_a_step_follows_it(tmp_path):
    fault = json.dumps({"kind": "fault", "step": 2, "what": "loss", "module": ""})
    assert read_log(write(tmp_path / "dead.jsonl", step(1), step(2), fault)).fault["step"] == 2
    log = read_log(write(tmp_path / "log.jsonl", step(1), step(2), fault, step(2), step(3)))
    assert log.fault is None
