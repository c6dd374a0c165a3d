import io

import pytest
from rich.console import Console

from colfolio.commands.live import LiveTraining
from colfolio.training import StepReport


def report(step, **changed):
    values = {
        "loss": 2.0,
        "chance": 4.852,
        "margin": 0.5,
        "spread": 1.0,
        "candidates": 128.0,
        "accuracy": 0.25,
        "gradient_norm": 1.0,
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
    assert "00:07 left" in lines[0]


def test_an_evaluation_is_printed_with_its_step(screen):
    with LiveTraining(Console(file=screen), steps=9) as live:
        live.step(report(4))
        live.evaluation(4, 0.1234)
    assert "step 4: validation ndcg@5 0.123" in screen.getvalue()


def test_a_terminal_shows_loss_beside_chance_and_the_last_evaluation(screen):
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    with LiveTraining(console, steps=10) as live:
        live.evaluation(2, 0.5)
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
