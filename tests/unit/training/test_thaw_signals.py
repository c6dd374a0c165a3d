import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from colfolio.training.step_report import StepReport
from colfolio.training.thaw_signals import Watch


def report(step, margin=0.0, loss=2.0, chance=1.0):
    numbers = {"floor": 0.0, "spread": 1.0, "candidates": 4.0, "masked": 0.0, "accuracy": 0.0}
    return StepReport(
        step=step,
        loss=loss,
        chance=chance,
        margin=margin,
        gradient_norm=1.0,
        skipped=False,
        lr=1e-3,
        seconds=1.0,
        rows_per_second=1.0,
        **numbers,
    )


def first_flat(margins, window, count):
    """The step before which a stage opens; None if the margin never is flat."""
    watch = Watch()
    for step, margin in enumerate(margins, start=1):
        watch.see(report(step, margin), window, count)
        if watch.is_flat(count):
            return step
    return None


def noisy(growth, steps, seed):
    """Margins that scatter by 1 around steady growth."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, generator=generator, dtype=torch.float64)
    return (noise + growth * torch.arange(steps)).tolist()


@pytest.mark.parametrize("growth", [0.0, 0.002, 0.05])
@pytest.mark.parametrize(("window", "count"), [(1, 4), (2, 1), (5, 3), (20, 8)])
def test_a_margin_is_flat_where_least_squares_through_its_windows_do_not_rise(
    growth, window, count
):
    watch, margins = Watch(), noisy(growth, 300, window)
    for step, margin in enumerate(margins, start=1):
        watch.see(report(step, margin), window, count)
        seen = np.array(margins[: step // window * window]).reshape(-1, window).mean(1)
        last = seen[-count - 1 :]
        is_flat = len(last) == count + 1 and np.polyfit(range(count + 1), last, 1)[0] <= 0
        assert watch.is_flat(count) == is_flat, step


def test_no_margin_is_flat_before_the_first_window_and_those_behind_it_are_full():
    assert first_flat([3.0] * 20, 4, 3) == 16
    assert first_flat([-float(step) for step in range(20)], 4, 3) == 16
    assert first_flat([3.0] * 15, 4, 3) is None


def plain_error(window, count):
    """The standard error of the slope through means of windows of steps that scatter by 1."""
    place = torch.arange(count + 1, dtype=torch.float64) * window
    return 1 / math.sqrt(window * (place - place.mean()).square().sum().item())


@pytest.mark.parametrize(("count", "growth"), [(3, 0.0038), (5, 0.0020), (10, 0.0008)])
def test_the_growth_that_is_seen_is_what_the_documentation_tells(count, growth):
    assert 3 * plain_error(50, count) == pytest.approx(growth, abs=5e-5)


@pytest.mark.parametrize(("window", "count"), [(5, 3), (5, 5), (10, 5)])
def test_growth_is_told_from_noise_by_the_formula(window, count):
    """Of 40 runs over 17 windows growth of three standard errors is mistaken in few."""
    error = math.sqrt(12 / (window**3 * count * (count + 1) * (count + 2)))
    assert error == pytest.approx(plain_error(window, count))
    steps = 20 * window
    growing = [first_flat(noisy(3 * error, steps, seed), window, count) for seed in range(40)]
    steeper = [first_flat(noisy(4 * error, steps, seed), window, count) for seed in range(40)]
    level = [first_flat(noisy(0.0, steps, seed), window, count) for seed in range(40)]
    assert sum(step is not None for step in growing) <= 3
    assert steeper == [None] * 40
    opened = sorted(step or math.inf for step in level)
    assert opened[20] <= window * (count + 4)  # three windows after the first that can be


def test_a_margin_that_grew_is_flat_soon_after_it_has_stopped():
    for seed in range(10):
        stopped = noisy(0.1, 100, seed) + [each + 10 for each in noisy(0.0, 200, seed + 100)]
        opened = first_flat(stopped, 10, 5)
        assert opened is not None
        assert 100 < opened <= 220


@pytest.mark.parametrize(
    ("loss", "chance", "is_near"),
    [
        (1.0199, 1.0, True),
        (0.9801, 1.0, True),
        (1.0201, 1.0, False),
        (0.9799, 1.0, False),
        (1.0199 * math.log(64), math.log(64), True),
    ],
)
def test_a_loss_is_at_chance_within_two_per_cent(loss, chance, is_near):
    watch = Watch()
    watch.see(report(1, loss=loss, chance=chance), 50, 0)
    assert watch.at_chance == int(is_near)


def test_steps_at_chance_are_counted_in_a_row():
    watch, counts = Watch(), []
    for step, loss in enumerate([1.0, 1.01, 0.99, 1.5, 1.0], start=1):
        watch.see(report(step, loss=loss), 50, 0)
        counts.append(watch.at_chance)
    assert counts == [1, 2, 3, 0, 1]


@pytest.mark.parametrize("cut", [1, 9, 10, 11, 95])
def test_a_watch_that_is_saved_goes_on_to_the_bit(cut):
    whole, resumed = Watch(), Watch()
    for step, margin in enumerate(noisy(0.0, 200, 1), start=1):
        whole.see(report(step, margin), 10, 3)
        resumed.see(report(step, margin), 10, 3)
        if step == cut:
            resumed = Watch(**json.loads(json.dumps(asdict(resumed))))
        assert resumed == whole


def test_a_watch_keeps_no_more_than_stages_ask_for():
    watch = Watch()
    for step in range(1, 200):
        watch.see(report(step, 1.0), 10, 3)
    assert (len(watch.margins), len(watch.means)) == (9, 4)
    watch.see(report(1, 1.0), 10, 0)
    assert len(watch.margins) == 9
