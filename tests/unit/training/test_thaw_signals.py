import math
from dataclasses import asdict

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


def watch_margins(margins, window):
    watch, flat = Watch(), []
    for step, margin in enumerate(margins, start=1):
        watch.see(report(step, margin), window)
        flat.append(watch.flat)
    return watch, flat


def plain_flat(margins, window):
    """The rule of the module's first lines, over whole windows."""
    windows = torch.tensor(margins, dtype=torch.float64).unfold(0, window, window)
    means, errors = windows.mean(1), windows.std(1) / math.sqrt(window)
    best, flat = 0, []
    for number in range(len(windows)):
        noise = 2 * torch.sqrt(errors[number] ** 2 + errors[best] ** 2)
        if number == 0 or means[number] > means[best] + noise:
            best = number
        flat.append(number - best)
    return flat


@pytest.mark.parametrize("slope", [0.0, 0.002, 0.05])
@pytest.mark.parametrize("window", [2, 5, 20])
def test_windows_are_counted_by_the_rule(slope, window):
    generator = torch.Generator().manual_seed(window)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    margins = (noise + slope * torch.arange(200)).tolist()
    _, flat = watch_margins(margins, window)
    assert flat[window - 1 :: window] == plain_flat(margins, window)


def test_noise_alone_is_flat_and_growth_is_not():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=generator, dtype=torch.float64)
    assert watch_margins(noise.tolist(), 50)[1][-1] >= 30
    growing = noise + torch.arange(2000) * 0.03
    assert watch_margins(growing.tolist(), 50)[1][-1] == 0


def test_slow_growth_adds_up_against_the_last_window_that_grew():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=generator, dtype=torch.float64)
    slow = (noise + torch.arange(2000) * 0.002).tolist()
    flat = watch_margins(slow, 50)[1]
    assert 1 < max(flat) < 10


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
    watch.see(report(1, loss=loss, chance=chance), 50)
    assert watch.at_chance == int(is_near)


def test_steps_at_chance_are_counted_in_a_row():
    watch, counts = Watch(), []
    for step, loss in enumerate([1.0, 1.01, 0.99, 1.5, 1.0], start=1):
        watch.see(report(step, loss=loss), 50)
        counts.append(watch.at_chance)
    assert counts == [1, 2, 3, 0, 1]


@pytest.mark.parametrize("cut", [1, 49, 50, 51, 130])
def test_a_watch_that_is_saved_goes_on_to_the_bit(cut):
    generator = torch.Generator().manual_seed(1)
    margins = torch.randn(200, generator=generator).tolist()
    whole, _ = watch_margins(margins, 50)
    resumed = Watch(**asdict(watch_margins(margins[:cut], 50)[0]))
    for step, margin in enumerate(margins[cut:], start=cut + 1):
        resumed.see(report(step, margin), 50)
    assert resumed == whole
