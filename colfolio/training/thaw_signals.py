"""What a run's own reports say of when to open more of the model: a flat margin, a loss at chance.

The margin is looked at in windows of w steps behind one another. Through the means of a window and
of the N behind it goes the line of least squares; while that rises, the margin grows. If steps
scatter by s around a growth of r a step, the slope of the line has the standard error

    s sqrt(12 / (w^3 N (N + 1) (N + 2))),

so that growth which is k times as large is taken for flat with the chance that a normal number lies
below -k, at each window anew: 1 in 740 for k = 3. No threshold stands above zero: it would open a
stage hardly sooner on a flat margin, and far more often on one that grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from colfolio.training.step_report import StepReport

_NEAR_CHANCE = 0.02  # of the chance level


@dataclass(slots=True)
class Watch:
    """What was seen since the last stage opened; plain numbers, so that a checkpoint keeps all.

    Args:
        margins: of the steps of the window that is not full yet.
        means: of the margin in the last full windows.
        at_chance: steps in a row, up to the last one, whose loss was within 2 % of chance.
    """

    margins: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    at_chance: int = 0

    def see(self, report: StepReport, window: int, count: int) -> None:
        """Take in a step.

        Args:
            window: steps of a window.
            count: windows behind a first one that will be asked for at most; with 0, none are kept.
        """
        is_near = abs(report.loss - report.chance) <= _NEAR_CHANCE * report.chance
        self.at_chance = self.at_chance + 1 if is_near else 0
        if not count:
            return
        self.margins.append(report.margin)
        if len(self.margins) == window:
            self.means = [*self.means[-count:], math.fsum(self.margins) / window]
            self.margins = []

    def is_flat(self, count: int) -> bool:
        """Whether so many windows and the one before them are there and do not rise.

        >>> Watch(means=[1.0, 3.0, 2.0, 1.5]).is_flat(2), Watch(means=[1.0, 3.0, 2.0]).is_flat(2)
        (True, False)
        """
        means = self.means[-count - 1 :]
        # twice the distance from the middle, which is a whole number
        rise = math.fsum((2 * number - count) * mean for number, mean in enumerate(means))
        return len(means) == count + 1 and rise <= 0
