import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from colfolio.commands.live import LiveTraining
from colfolio.training import GenerationReport, PartReport, StepReport


def report(step, **changed):
    values = {
        "loss": 2.0,
        "chance": 4.852,
        "floor": 0.0,
        "margin": 0.5,
        "spread": 1.0,
        "candidates": 128.0,
        "masked": 0.0,
        "accuracy": 0.25,
        "gradient_norm": 1.0,
        "skipped": False,
        "lr": 1e-3,
        "seconds": 0.5,
        "rows_per_second": 256.0,
    }
    return StepReport(step=step, **(values | changed))


@pytest.fixture
def screen():
    return io.StringIO()


def test_without_a_terminal_a_line_is_printed_now_and_then_and_at_the_end(screen):
    with LiveTraining(Console(file=screen, width=200), steps=25, plain_every=10) as live:
        for step in range(1, 26):
            live.step(report(step))
    lines = screen.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    assert "loss 2.000 (chance 4.852)" in lines[0]
    assert "margin +0.50" in lines[0]
    assert "256 rows/s" in lines[0]
    assert "128 candidates, " in lines[0]
    assert "00:07 left" in lines[0]


def test_floor_masks_and_skipped_steps_are_shown_where_there_are_any(screen):
    with LiveTraining(Console(file=screen, width=200), steps=4, plain_every=1) as live:
        live.step(report(1))
        live.step(report(2, floor=0.25, candidates=120.0, masked=8.0, skipped=True))
        live.step(report(3, skipped=True))
    first, second, third = screen.getvalue().splitlines()
    for word in ("floor", "masked", "skipped"):
        assert word not in first
    assert "(chance 4.852), floor 0.250" in second
    assert "124 candidates, 4.0 masked" in second
    assert second.endswith("1 skipped (overflow)")
    assert third.endswith("2 skipped (overflow)")


def test_a_terminal_shows_them_likewise(screen):
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    with LiveTraining(console, steps=10) as live:
        for step in range(1, 6):
            live.step(report(step, floor=0.25, masked=8.0, skipped=step == 2))
    for part in ("floor", "0.250", "candidates", "masked", "8.0", "skipped"):
        assert part in screen.getvalue()


LONG = {"floor": 0.031, "margin": -0.52, "candidates": 127.0, "masked": 0.7, "seconds": 8.0}


@pytest.mark.parametrize("changed", [{}, LONG, LONG | {"skipped": True, "candidates": 4096.0}])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_80_columns_cut_no_number_and_no_heading(screen, is_terminal, changed):
    console = Console(file=screen, force_terminal=is_terminal, width=80, color_system=None)
    with LiveTraining(console, steps=1700, plain_every=1) as live:
        live.evaluation(850, {"ndcg@5": 0.812, "loss": 1.25, "chance": 4.174, "negatives": 64.0})
        live.step(report(1230, **changed))
    shown = re.sub(r"\x1b\[\??\d+[A-Za-z]", "", screen.getvalue())
    assert max(map(len, re.split(r"[\r\n]", shown))) <= 80
    assert "…" not in shown
    for part in ("1230/1700", "2.000", "4.852", f"{changed.get('margin', 0.5):+.2f}"):
        assert part in shown
    if is_terminal:
        left = "01:02:40" if changed else "03:55"
        for part in ("chance", "margin", "candidates", "val ndcg@5", "0.812", left):
            assert part in shown


def test_a_very_narrow_terminal_still_shows_the_loss_whole(screen):
    console = Console(file=screen, force_terminal=True, width=34, color_system=None)
    with LiveTraining(console, steps=1700) as live:
        live.step(report(1230, **LONG))
    assert "2.000" in screen.getvalue()
    assert "…" not in screen.getvalue()


def test_an_evaluation_is_printed_with_its_step(screen):
    with LiveTraining(Console(file=screen), steps=9) as live:
        live.step(report(4))
        live.evaluation(4, {"ndcg@5": 0.1234, "loss": 2.0, "chance": 4.174, "negatives": 64.0})
    line = "step 4: validation ndcg@5 0.123, loss 2.000 (chance 4.174)"
    assert line in screen.getvalue().splitlines()


def test_a_terminal_shows_loss_beside_chance_and_the_last_evaluation(screen):
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    with LiveTraining(console, steps=10) as live:
        live.evaluation(2, {"ndcg@5": 0.5})
        for step in range(1, 6):
            live.step(report(step))
    shown = screen.getvalue()
    for part in ("5/10", "2.000", "4.852", "+0.50", "25%", "0.500", "256", "00:02"):
        assert part in shown


def test_loss_is_smoothed_over_the_last_steps_alone(screen):
    with LiveTraining(Console(file=screen, width=200), steps=60, plain_every=60) as live:
        for step in range(1, 61):
            live.step(report(step, loss=100.0 if step <= 10 else 1.0))
    assert "loss 1.000" in screen.getvalue()


def test_a_failure_inside_leaves_the_terminal_usable(screen):
    console = Console(file=screen, force_terminal=True)
    with pytest.raises(ZeroDivisionError), LiveTraining(console, steps=3):
        raise ZeroDivisionError
    console.print("after")
    assert "after" in screen.getvalue()
    with LiveTraining(console, steps=3):  # the display of the first is gone
        pass


@pytest.mark.parametrize(
    ("steps", "left"), [(61, "01:00"), (10_000, "02:46:39"), (100_000, "27:46:39")]
)
def test_time_left_is_shown_in_hours_and_never_begins_anew(screen, steps, left):
    with LiveTraining(Console(file=screen, width=200), steps=steps, plain_every=1) as live:
        live.step(report(1, seconds=1.0))
    assert f", {left} left" in screen.getvalue()


PARTS = {
    "vision": PartReport(1e-5, 0.25, 1e-4, 665_600_000, 1e-5, 0.0),
    "projection": PartReport(5e-4, 1.5, 2e-3, 196_608, 5e-4, 0.0),
}


def test_what_opens_is_printed_with_the_step_after_which_it_does(screen):
    with LiveTraining(Console(file=screen, width=80), steps=9) as live:
        live.step(report(4, opened=["vision[0:4], merger"]))
    assert "step 3: opens vision[0:4], merger" in screen.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "height", "is_shown"), [(80, 24, True), (60, 24, False), (80, 9, False)]
)
def test_a_terminal_with_room_shows_a_line_for_each_part(screen, width, height, is_shown):
    console = Console(
        file=screen, force_terminal=True, width=width, height=height, color_system=None
    )
    with LiveTraining(console, steps=10) as live:
        for step in range(1, 6):
            live.step(
                report(step, parts=PARTS | {"merger": PARTS["vision"]} if step > 2 else PARTS)
            )
    shown = screen.getvalue()
    assert max(map(len, re.split(r"[\r\n]", re.sub(r"\x1b\[\??\d+[A-Za-z]", "", shown)))) <= width
    for text in ("vision", "merger", "665,600,000", "1.00e-05", "2.50e-01", "2.00e-03"):
        assert (text in shown) == is_shown


@pytest.mark.parametrize("others", [3, 0])
def test_a_skipped_step_is_in_no_mean_of_a_part(screen, others):
    console = Console(file=screen, force_terminal=True, width=80, height=24, color_system=None)
    overflow = {"vision": replace(PARTS["vision"], gradient_norm=math.inf, update_ratio=0.0)}
    with LiveTraining(console, steps=5) as live:
        for step in range(1, 6):
            is_skipped = step > others
            live.step(report(step, skipped=is_skipped, parts=overflow if is_skipped else PARTS))
    row = re.findall(r"vision +665,600,000.*", screen.getvalue())[-1]
    assert row.split()[3:] == (["2.50e-01", "1.00e-04"] if others else ["–", "–"])


def test_a_part_of_several_rates_shows_the_lowest_and_the_highest(screen):
    console = Console(file=screen, force_terminal=True, width=80, height=24, color_system=None)
    with LiveTraining(console, steps=5) as live:
        parts = {"vision": replace(PARTS["vision"], lr_least=2.5e-6), "norm": PARTS["projection"]}
        for step in range(1, 6):
            live.step(report(step, parts=parts))
    assert "2.5e-06–1.0e-05  " in screen.getvalue()
    assert " 5.00e-04  " in screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_answers_show_their_tokens(screen, is_terminal):
    values = {"gradient_norm": 1.0, "skipped": False, "lr": 1e-3}
    width = 80 if is_terminal else 100
    console = Console(file=screen, force_terminal=is_terminal, width=width, color_system=None)
    with LiveTraining(console, steps=1700, metric="loss", plain_every=1) as live:
        live.evaluation(850, {"loss": 1.25, "chance": 11.93, "accuracy": 0.5})
        live.step(
            GenerationReport(
                *(900, 2.0, 11.93, 0.375, 640.0, 52_000.0),
                **values,
                seconds=2.0,
                rows_per_second=32.0,
            )
        )
    shown = re.sub(r"\x1b\[\??\d+[A-Za-z]", "", screen.getvalue())
    assert max(map(len, re.split(r"[\r\n]", shown))) <= width
    assert "loss 1.250 (chance 11.930), accuracy 0.500" in shown
    for part in ("2.000", "11.930", "38%", "26,000"):
        assert part in shown
