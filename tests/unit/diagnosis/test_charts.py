import math
from xml.etree import ElementTree

import pytest

from colfolio.diagnosis.charts import training_charts
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep, TrainingLog

SVG = "{http://www.w3.org/2000/svg}"


def run(num_steps: int, num_evaluations: int = 0, chance: float | None = math.log(128)):
    steps = [LoggedStep(n, 5 / n, chance, 0.01 * n, 1e-3, 900.0) for n in range(1, num_steps + 1)]
    evaluations = [
        LoggedEvaluation(100 * n, "validation", {"ndcg@5": 0.1 * n})
        for n in range(1, num_evaluations + 1)
    ]
    return TrainingLog(tuple(steps), tuple(evaluations))


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_curve_with_numbers_is_drawn():
    titles = [title for title, _ in training_charts(run(300, 3))]
    assert titles == ["Loss", "Margin", "nDCG@5 on validation", "Rows a second"]


def test_the_loss_stands_beside_its_labelled_chance_level():
    charts = dict(training_charts(run(300)))
    assert "chance 4.85" in texts(charts["Loss"])


def test_validation_stands_beside_its_chance_level():
    charts = dict(training_charts(run(300, 3), chance_ndcg=0.0061))
    found = texts(charts["nDCG@5 on validation"])
    assert "chance 0.0061" in found
    assert "0.3" in found


def test_a_loss_without_a_known_chance_level_is_drawn_alone():
    charts = dict(training_charts(run(300, chance=None)))
    assert not any("chance" in text for text in texts(charts["Loss"]))


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_run_without_a_second_step_has_no_curves(num_steps):
    assert training_charts(run(num_steps)) == []


@pytest.mark.parametrize("num_steps", [2, 3, 20_000])
def test_a_curve_is_small_however_long_the_run(num_steps):
    for _, svg in training_charts(run(num_steps, 3)):
        assert len(svg) < 60_000


def test_a_loss_that_is_not_finite_leaves_a_gap():
    log = run(200)
    steps = [
        LoggedStep(row.step, math.nan if 50 < row.step < 90 else row.loss, None, None, None, None)
        for row in log.steps
    ]
    charts = dict(training_charts(TrainingLog(tuple(steps), ())))
    assert list(charts) == ["Loss"]
    assert "nan" not in charts["Loss"].lower()


def test_a_run_that_never_had_a_finite_loss_has_no_loss_curve():
    steps = tuple(LoggedStep(n, math.nan, None, None, None, None) for n in range(1, 9))
    assert training_charts(TrainingLog(steps, ())) == []


def test_drawings_follow_the_page_and_name_nothing_outside_it():
    for _, svg in training_charts(run(300, 3), 0.01):
        assert svg.startswith("<svg")
        assert "var(--accent)" in svg
        assert "#00000" not in svg
        assert "<metadata" not in svg
        assert "href" not in svg.replace("xmlns:xlink", "").replace('xlink:href="#', "")


def test_the_same_log_gives_the_same_drawing():
    assert training_charts(run(300, 3)) == training_charts(run(300, 3))
