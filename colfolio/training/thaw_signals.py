"""What a run's own reports say of when to open more of the model: a flat margin, a loss at chance.

The margin is looked at in windows of w steps behind one another, of which each has a mean m and, of
the spread s of its steps, a standard error e = s / sqrt(w). A window has grown beyond its noise if

    m > m' + 2 sqrt(e^2 + e'^2),

m' and e' being those of the last window that had grown, the first one at the beginning. So slow
growth adds up, and a single lucky window raises the mark. A drift inside of a window widens its
spread, but less than it moves the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from colfolio.training.step_report import StepReport

_DEVIATIONS = 2.0
_NEAR_CHANCE = 0.02  # of the chance level


@dataclass(slots=True)
class Watch:
    """What was seen since the last stage opened; plain numbers, so that a checkpoint keeps all.

    Args:
        margins: of the steps of the window that is not full yet.
        mean, error: of the last window that had grown; None before the first is full.
        flat: windows since then.
        at_chance: steps in a row, up to the last one, whose loss was within 2 % of chance.
    """

    margins: list[float] = field(default_factory=list)
    mean: float | None = None
    error: float = 0.0
    flat: int = 0
    at_chance: int = 0

    def see(self, report: StepReport, window: int) -> None:
        """Take in a step.

        Args:
            window: steps of a window, at least 2.
        """
        is_near = abs(report.loss - report.chance) <= _NEAR_CHANCE * report.chance
        self.at_chance = self.at_chance + 1 if is_near else 0
        self.margins.append(report.margin)
        if len(self.margins) == window:
            self._close_window()

    def _close_window(self) -> None:
        size = len(self.margins)
        mean = math.fsum(self.margins) / size
        spread = math.fsum((margin - mean) ** 2 for margin in self.margins) / (size - 1)
        error = math.sqrt(spread / size)
        self.margins = []
        if self.mean is None or mean > self.mean + _DEVIATIONS * math.hypot(error, self.error):
            self.mean, self.error, self.flat = mean, error, 0
        else:
            self.flat += 1
