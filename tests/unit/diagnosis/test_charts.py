import math
import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from colfolio.diagnosis.reporting.charts import run_course, training_charts
from colfolio.diagnosis.reporting.drawing import Course, Mark, binned, drawing, spread
from colfolio.diagnosis.reporting.part_charts import part_charts, part_rows, zero_gradients
from colfolio.diagnosis.training_log import (
    LoggedEvaluation,
    LoggedPart,
    LoggedStep,
    TrainingLog,
)

SVG = "{http://www.w3.org/2000/svg}"


def run(num_steps: int, num_evaluations: int = 0, chance: float | None = math.log(128)):
    steps = [LoggedStep(n, 5 / n, chance, 0.01 * n, 1e-3, 900.0) for n in range(1, num_steps + 1)]
    evaluations = [
        LoggedEvaluation(100 * n, "validation", {"ndcg@5": 0.1 * n})
        for n in range(1, num_evaluations + 1)
    ]
    return TrainingLog(tuple(steps), tuple(evaluations))


def charts_of(log: TrainingLog, chance_ndcg: float | None = None) -> dict[str, str]:
    """The SVG of each curve by its title."""
    charts = [*training_charts(log, chance_ndcg), *part_charts(log.steps, run_course(log))]
    return {chart.title: chart.svg for chart in charts}


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_curve_with_numbers_is_drawn():
    titles = list(charts_of(run(300, 3)))
    assert titles == ["Loss", "nDCG@5 on validation", "Margin", "Rows a second"]


def test_the_loss_stands_beside_its_labelled_chance_level():
    charts = charts_of(run(300))
    assert "chance 4.85" in texts(charts["Loss"])


def test_validation_stands_beside_its_chance_level():
    charts = charts_of(run(300, 3), chance_ndcg=0.0061)
    found = texts(charts["nDCG@5 on validation"])
    assert "chance 0.0061" in found
    assert "0.3" in found


def test_a_loss_without_a_known_chance_level_is_drawn_alone():
    charts = charts_of(run(300, chance=None))
    assert not any("chance" in text for text in texts(charts["Loss"]))


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_run_without_a_second_step_has_no_curves(num_steps):
    assert training_charts(run(num_steps)) == []


@pytest.mark.parametrize("num_steps", [2, 3, 20_000])
def test_a_curve_is_small_however_long_the_run(num_steps):
    for svg in charts_of(run(num_steps, 3)).values():
        assert len(svg) < 60_000


def test_a_loss_that_is_not_finite_leaves_a_gap():
    log = run(200)
    steps = [
        LoggedStep(row.step, math.nan if 50 < row.step < 90 else row.loss, None, None, None, None)
        for row in log.steps
    ]
    charts = charts_of(TrainingLog(tuple(steps), ()))
    assert list(charts) == ["Loss"]
    assert "nan" not in charts["Loss"].lower()


def test_a_run_that_never_had_a_finite_loss_has_no_loss_curve():
    steps = tuple(LoggedStep(n, math.nan, None, None, None, None) for n in range(1, 9))
    assert training_charts(TrainingLog(steps, ())) == []


def test_drawings_follow_the_page_and_name_nothing_outside_it():
    for svg in charts_of(run(300, 3), 0.01).values():
        assert svg.startswith("<svg")
        assert "var(--accent)" in svg
        assert "#00000" not in svg
        assert "<metadata" not in svg
        assert "href" not in svg.replace("xmlns:xlink", "").replace('xlink:href="#', "")


def test_the_same_log_gives_the_same_drawing():
    assert charts_of(thawed()) == charts_of(thawed())


PART_TITLES = ["Gradient norm, by part", "Update over weights, by part", "Learning rate, by part"]


def thawed(num_steps: int = 200, opens: int = 100, share: float = 0.1) -> TrainingLog:
    """A run whose projection trains from the start, its vision tower from a step on."""
    steps = []
    for row in run(num_steps).steps:
        rate = 1e-3 * (1 - row.step / num_steps)
        parts = {"projection": LoggedPart(rate, 0.5, rate * 2)}
        if row.step >= opens:
            parts = {"vision": LoggedPart(rate * share, 0.1, rate), **parts}
        opened = ("vision", "merger") if row.step == opens else ()
        steps.append(replace(row, parts=parts, opened=opened))
    evaluations = tuple(
        LoggedEvaluation(n, "validation", {"loss": 3.0, "chance": math.log(65), "negatives": 64.0})
        for n in (100, 200)
    )
    return TrainingLog(tuple(steps), evaluations)


def paths(svg: str, variable: str) -> list[list[tuple[float, float]]]:
    """The points of each line in a colour, in the drawing's own units."""
    lines = re.findall(rf'<path d="([^"]*)"[^>]*var\({variable}\)', svg)
    numbers = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", line) for line in lines]
    return [[(float(x), float(y)) for x, y in line] for line in numbers]


def test_each_part_has_a_curve_with_its_name():
    charts = charts_of(thawed())
    assert [title for title in charts if "by part" in title] == PART_TITLES
    for title in PART_TITLES:
        assert {"vision", "projection"} <= set(texts(charts[title]))
        assert "merger" not in texts(charts[title])


def test_a_part_that_opened_later_begins_at_its_step():
    svg = charts_of(thawed())["Gradient norm, by part"]
    (vision,), (projection,) = paths(svg, "--part-0"), paths(svg, "--part-5")
    left, right = projection[0][0], projection[-1][0]
    assert vision[0][0] == pytest.approx((left + right) / 2, abs=0.02 * (right - left))
    assert vision[-1][0] == pytest.approx(right, abs=0.02 * (right - left))


def test_every_curve_is_marked_where_a_part_opened():
    dots = "stroke-dasharray: 0.8,1.6"
    for title, svg in charts_of(thawed()).items():
        assert (svg.count(dots), "1" in texts(svg)) == (1, True), title
    for title, svg in charts_of(run(200, 2)).items():
        assert dots not in svg, title


def test_parts_of_one_rate_are_one_curve():
    svg = charts_of(thawed(opens=1, share=1.0))["Learning rate, by part"]
    assert "all" in texts(svg)
    assert not {"vision", "projection"} & set(texts(svg))


def test_the_rates_of_a_part_are_a_band():
    """Half of vision opens again at a tenth of the rate: its curve gets a lower edge there."""
    steps = []
    for row in thawed(opens=1).steps:
        vision = row.parts["vision"]
        least = vision.lr / 10 if row.step >= 100 else vision.lr
        parts = {"vision": replace(vision, lr_least=least), "projection": row.parts["projection"]}
        steps.append(replace(row, parts=parts))
    charts = charts_of(TrainingLog(tuple(steps), ()))
    upper, lower = paths(charts["Learning rate, by part"], "--part-0")[:2]
    middle = (upper[0][0] + upper[-1][0]) / 2
    below = [(x, y - top) for (x, y), (_, top) in zip(lower, upper, strict=True) if y < 1e9]
    assert all(gap == pytest.approx(0, abs=1e-3) for x, gap in below if x < middle - 3)
    assert all(gap > 5 for x, gap in below if x > middle + 3)
    assert "fill-opacity: 0.15" in charts["Learning rate, by part"]
    for title in PART_TITLES[:2]:
        assert len(paths(charts[title], "--part-0")) == 1


@pytest.mark.parametrize("count", [1, 2, 59, 60, 61, 80, 119, 121, 600])
@pytest.mark.parametrize("most", [60, 500])
def test_a_smooth_curve_is_equally_smooth_everywhere(count, most):
    steps, _ = binned(range(1, count + 1), [1.0] * count, most)
    assert len(steps) <= most
    assert len({round(gap, 6) for gap in np.diff(steps)[1:]}) <= 1
    assert steps[-1] + -(-count // most) / 2 == count + 0.5
    noise = np.random.default_rng(0).normal(size=count)
    assert np.isclose(np.sort(binned(range(count), list(noise), count)[1]), np.sort(noise)).all()


def test_validation_loss_stands_beside_the_chance_level_of_its_pool():
    charts = charts_of(thawed())
    assert "chance 4.17" in texts(charts["Validation loss, 64 negatives"])


def test_token_accuracy_on_validation_is_drawn_where_the_log_has_it():
    rows = [LoggedEvaluation(n, "validation", {"token_accuracy": n / 400}) for n in (100, 200)]
    charts = charts_of(TrainingLog(run(200).steps, tuple(rows)))
    assert "0.5" in texts(charts["Token accuracy on validation"])
    assert "Token accuracy on validation" not in charts_of(run(200, 2))


def test_accuracy_is_drawn_where_the_log_has_it():
    steps = tuple(replace(row, accuracy=0.5) for row in run(200).steps)
    assert "0.5" in texts(charts_of(TrainingLog(steps, ()))["Accuracy"])


def test_the_floor_is_drawn_where_there_is_one():
    steps = tuple(replace(row, floor=0.25) for row in run(200).steps)
    assert "floor 0.25" in texts(charts_of(TrainingLog(steps, ()))["Loss"])
    steps = tuple(replace(row, floor=1e-9) for row in run(200).steps)
    assert "floor" not in charts_of(TrainingLog(steps, ()))["Loss"]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_numbers_that_no_curve_can_show_are_left_out(value):
    steps = [
        replace(row, parts={"vision": LoggedPart(value, value, value)}) for row in run(50).steps
    ]
    assert not any("by part" in title for title in charts_of(TrainingLog(tuple(steps), ())))


@pytest.mark.parametrize(
    "heights",
    [[0.1], [0.5, 0.5, 0.5], [1.0, 0.9, 0.95], [0.2, -3.0], [0.98] * 7, [2.0, -1.0, 0.0, 0.01]],
)
def test_places_are_spread_within_the_axes_and_keep_their_order(heights):
    placed = spread(heights, 0.085)
    assert all(0 <= place <= 1 for place in placed)
    assert all(upper - lower >= 0.0849 for lower, upper in pairwise(sorted(placed)))
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(heights, kind="stable").tolist()
    assert spread([0.1, 0.9, 0.5], 0.085) == [0.1, 0.9, 0.5]


def boxes(svg: str) -> dict[str, tuple[float, float]]:
    """Where each text of a drawing stands, by its first line."""
    found = {}
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform", ""))
        x, y = place.groups() if place else (element.get("x"), element.get("y"))
        found[element.text] = (float(x), float(y))
    return found


@pytest.mark.parametrize("loss", [math.log(128), math.log(128) + 1e-9, math.log(128) - 0.05, 4.7])
def test_the_last_loss_and_chance_are_never_written_over_one_another(loss):
    evaluations = tuple(
        LoggedEvaluation(n, "validation", {"loss": loss, "chance": math.log(128)}) for n in (20, 40)
    )
    steps = tuple(replace(row, loss=loss) for row in run(40).steps)
    charts = charts_of(TrainingLog(steps, evaluations))
    for title in ("Loss", "Validation loss"):
        places = boxes(charts[title])
        chance, last = places["chance 4.85"], places[f"{loss:.3g}"]
        assert abs(chance[1] - last[1]) > 8, title  # the size of the letters
        assert min(chance[0], last[0]) > max(x for x, _ in paths(charts[title], "--accent")[-1])


def test_names_of_near_marks_stand_beside_one_another():
    near = tuple(Mark(step, str(number)) for number, step in enumerate((998, 999, 1000), start=1))
    with drawing(Course(0, 1000, near)) as drawn:
        drawn.axes.plot([0, 1000], [1, 2])
    places = sorted(boxes(drawn.svg)[mark.name] for mark in near)
    assert all(right[0] - left[0] > 6 for left, right in pairwise(places))


@pytest.mark.parametrize("last", [1, 2, 3, 5, 7, 11, 40, 100_000])
def test_steps_are_whole_numbers_however_short_the_run(last):
    with drawing(Course(0, last)) as drawn:
        drawn.axes.plot([0, last], [1, 2])
    ticks = [tick for tick in drawn.axes.get_xticks() if 0 <= tick <= last]
    assert 2 <= len(ticks) <= 7
    assert all(tick == round(tick) for tick in ticks)
    assert f"{ticks[-1]:,.0f}" in texts(drawn.svg)


def test_one_evaluation_stands_at_its_step_of_the_run_beside_a_line_of_chance():
    log = TrainingLog(run(200).steps, (LoggedEvaluation(200, "validation", {"ndcg@5": 0.4}),))
    svg = charts_of(log, 0.02)["nDCG@5 on validation"]
    (chance,) = [line for line in paths(svg, "--muted") if len(line) == 2]
    assert chance[1][0] - chance[0][0] > 100


def silent(from_step: int) -> TrainingLog:
    """A run in which no gradient reaches vision from a step on."""
    rows = []
    for row in thawed(opens=1).steps:
        norm = 0.0 if row.step >= from_step else 0.1
        vision = replace(row.parts["vision"], gradient_norm=norm, dead=float(norm == 0))
        rows.append(replace(row, parts={**row.parts, "vision": vision}))
    return TrainingLog(tuple(rows), ())


def test_a_gradient_of_zero_is_told_with_its_step_and_drawn_at_the_lower_edge():
    log = silent(121)
    parts = part_rows(log.steps)
    assert [(part.name, part.zero_from) for part in parts] == [
        ("vision", 121),
        ("projection", None),
    ]
    assert zero_gradients(parts) == ["The gradient of vision is 0 from step 121 on."]
    (chart,) = [
        chart
        for chart in part_charts(log.steps, run_course(log))
        if chart.title == "Gradient norm, by part"
    ]
    assert "0 is exactly 0" in chart.note
    assert {"vision 0", "projection"} <= set(texts(chart.svg))
    (vision,) = paths(chart.svg, "--part-0")
    (projection,) = paths(chart.svg, "--part-5")
    assert vision[-1][0] == pytest.approx(projection[-1][0], abs=0.5)
    assert vision[-1][1] == max(y for _, y in vision) > vision[0][1]


@pytest.mark.parametrize(("from_step", "told"), [(1, "from step 1 on"), (200, "from step 200 on")])
def test_a_gradient_that_was_always_zero_is_told_as_well(from_step, told):
    assert told in zero_gradients(part_rows(silent(from_step).steps))[0]
    assert zero_gradients(part_rows(silent(201).steps)) == []


def test_a_skipped_step_says_nothing_of_the_parts():
    steps = list(silent(121).steps)
    steps[-1] = replace(steps[-1], parts={"vision": LoggedPart(1.0, 5.0, 0.0)}, is_skipped=True)
    (vision, _) = part_rows(steps)
    assert (vision.zero_from, vision.last.gradient_norm) == (121, 0.0)


def test_a_line_that_leaves_the_axis_is_named_so():
    rows = []
    for row in thawed(opens=1).steps:
        falling = replace(row.parts["vision"], update_ratio=10.0 ** -(row.step // 10))
        rows.append(replace(row, parts={**row.parts, "vision": falling}))
    log = TrainingLog(tuple(rows), ())
    (chart,) = [
        chart for chart in part_charts(log.steps, run_course(log)) if chart.title.startswith("Upd")
    ]
    assert "vision ↓" in texts(chart.svg)
    assert "below the axis" in chart.note


def test_a_doubt_stands_below_every_curve_of_the_validation_split_alone():
    charts = training_charts(thawed(), 0.02, "Leaked: all of it.")
    doubted = {chart.title for chart in charts if chart.note}
    assert doubted == {"Validation loss, 64 negatives"}
    charts = training_charts(run(200, 3), 0.02, "Leaked: all of it.")
    assert {chart.title for chart in charts if chart.note} == {"nDCG@5 on validation"}
