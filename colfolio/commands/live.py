"""What a terminal shows while a model trains: one line that moves, or a line now and then."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from colfolio.training import StepReport

_SMOOTH = 50
_FLOOR_SHOWN = 0.001
_BAR, _GAP = 12, 2
# what a narrow terminal goes without, the first of them first; "" is the bar
_GIVEN_UP = ("", "rows/s", "masked", "first", "floor", "candidates", "evaluated", "left", "margin")


class LiveTraining:
    """Loss beside its chance level and floor, margin, candidates, nDCG, pace and time left.

    What says nothing is left out: a floor of nearly 0, skipped steps where there are none. A narrow
    terminal shows fewer numbers, but those whole.

    Args:
        console: where to draw; if it is no terminal, a plain line is printed every `plain_every`.
        steps: of the whole run.
        metric: name of the number that evaluations bring.
    """

    def __init__(
        self, console: Console, steps: int, metric: str = "ndcg@5", plain_every: int = 100
    ) -> None:
        self._console = console
        self._steps = steps
        self._metric = metric
        self._plain_every = plain_every
        self._recent: deque[StepReport] = deque(maxlen=_SMOOTH)
        self._evaluated: list[tuple[int, float]] = []
        self._skipped = 0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveTraining:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def step(self, report: StepReport) -> None:
        """Show a step."""
        self._recent.append(report)
        self._skipped += report.skipped
        if self._console.is_terminal:
            self._live.update(self._table(report), refresh=report.step % 5 == 0)
        elif report.step % self._plain_every == 0 or report.step == self._steps:
            self._console.print(self._line(report), soft_wrap=True)

    def evaluation(self, step: int, value: float) -> None:
        """Show an evaluation."""
        self._evaluated.append((step, value))
        if self._console.is_terminal:
            self._live.console.print(f"  step {step:>6}   validation {self._metric} {value:.3f}")
        else:
            self._console.print(f"step {step}: validation {self._metric} {value:.3f}")

    def _table(self, report: StepReport) -> Table:
        floor = f"{report.floor:.3f}" if report.floor >= _FLOOR_SHOWN else ""
        cells = {
            "step": f"{report.step}/{self._steps}",
            "loss": f"{self._mean('loss'):.3f}",
            "chance": f"{report.chance:.3f}",
            "floor": floor,
            "margin": f"{self._mean('margin'):+.2f}",
            "first": f"{self._mean('accuracy'):.0%}",
            "candidates": f"{self._mean('candidates'):.0f}",
            "masked": f"{self._mean('masked'):.1f}" if self._mean("masked") else "",
            "evaluated": f"{self._evaluated[-1][1]:.3f}" if self._evaluated else "–",
            "rows/s": f"{self._rows_per_second():.0f}",
            "left": _clock(self._seconds_left(report.step)),
            "skipped": f"{self._skipped}" if self._skipped else "",
        }
        headings = dict(zip(cells, cells, strict=True)) | {"evaluated": f"val {self._metric}"}
        widths = {
            name: max(len(headings[name]), len(cell)) + _GAP for name, cell in cells.items() if cell
        }
        shown = _fitting({"": _BAR + _GAP} | widths, self._console.width + _GAP)
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
        for name in shown:
            table.add_column(headings.get(name, ""), justify="right", no_wrap=True)
        bar = ProgressBar(total=self._steps, completed=report.step, width=_BAR)
        table.add_row(*(cells[name] if name else bar for name in shown))
        return table

    def _line(self, report: StepReport) -> str:
        parts = {
            "loss": f"loss {self._mean('loss'):.3f} (chance {report.chance:.3f})",
            "floor": f"floor {report.floor:.3f}" if report.floor >= _FLOOR_SHOWN else "",
            "margin": f"margin {self._mean('margin'):+.2f}",
            "candidates": f"{self._mean('candidates'):.0f} candidates",
            "masked": f"{self._mean('masked'):.1f} masked" if self._mean("masked") else "",
            "rows/s": f"{self._rows_per_second():.0f} rows/s",
            "left": f"{_clock(self._seconds_left(report.step))} left",
            "skipped": f"{self._skipped} skipped (overflow)" if self._skipped else "",
        }
        begin = f"step {report.step}/{self._steps}: "
        widths = {name: len(part) + _GAP for name, part in parts.items() if part}
        shown = _fitting(widths, self._console.width + _GAP - len(begin))
        return begin + ", ".join(parts[name] for name in shown)

    def _mean(self, name: str) -> float:
        return sum(getattr(report, name) for report in self._recent) / len(self._recent)

    def _rows_per_second(self) -> float:
        rows = sum(report.rows_per_second * report.seconds for report in self._recent)
        return rows / sum(report.seconds for report in self._recent)

    def _seconds_left(self, step: int) -> float:
        return self._mean("seconds") * (self._steps - step)


def _fitting(widths: dict[str, int], width: int) -> list[str]:
    """The names of parts that stand beside each other in a width, without those named first."""
    shown = dict(widths)
    for name in _GIVEN_UP:
        if sum(shown.values()) > width:
            shown.pop(name, None)
    return list(shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
