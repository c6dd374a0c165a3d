"""What a terminal shows while a model trains: one line that moves, or a line now and then."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from colfolio.commands.console import print_wrapped
from colfolio.training import AnyReport, GenerationReport, PartReport

_SMOOTH = 50
_FLOOR_SHOWN = 0.001
_BAR, _GAP = 12, 2
_PARTS_WIDTH, _PARTS_HEIGHT = 72, 16
# what a narrow terminal goes without, the first of them first; "" is the bar
_GIVEN_UP = (
    "",
    "rows/s",
    "masked",
    "first",
    "floor",
    "tokens/s",
    "candidates",
    "evaluated",
    "left",
    "margin",
)


class LiveTraining:
    """Loss beside its chance level and floor, margin, candidates, nDCG, pace and time left.

    What says nothing is left out: a floor of nearly 0, skipped steps where there are none. A narrow
    terminal shows fewer numbers, but those whole. A large one shows a line for each part of the
    model as well: its rate, the norm of its gradient, and how far a step moves its weights.

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
        self._recent: deque[AnyReport] = deque(maxlen=_SMOOTH)
        self._evaluated: float | None = None
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

    def step(self, report: AnyReport) -> None:
        """Show a step."""
        self._recent.append(report)
        self._skipped += report.skipped
        if report.opened:
            self._print(report.step - 1, f"opens {', '.join(report.opened)}")
        if self._console.is_terminal:
            shown = Group(self._table(report), *self._parts(report))
            self._live.update(shown, refresh=report.step % 5 == 0)
        elif report.step % self._plain_every == 0 or report.step == self._steps:
            self._console.print(self._line(report), soft_wrap=True)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Show what an evaluation came to, a loss beside its chance level."""
        self._evaluated = values.get(self._metric, self._evaluated)
        told = {name: f"{value:.3f}" for name, value in values.items() if name != "negatives"}
        if chance := told.pop("chance", None):
            told["loss"] += f" (chance {chance})"
        self._print(step, "validation " + ", ".join(f"{name} {told[name]}" for name in told))

    def diagnosis(self, step: int, told: str) -> None:
        """Show what is the matter, above the line that moves."""
        self._print(step, told)

    def _print(self, step: int, text: str) -> None:
        """What stays: a line, or a paragraph that a terminal breaks between words."""
        if self._console.is_terminal:
            print_wrapped(self._live.console, f"  step {step:>6}   {text}")
        else:
            self._console.print(f"step {step}: {text}", markup=False)

    def _table(self, report: AnyReport) -> Table:
        cells = {
            "step": f"{report.step}/{self._steps}",
            "loss": f"{self._mean('loss'):.3f}",
            "chance": f"{report.chance:.3f}",
            **self._cells(report),
            "evaluated": "–" if self._evaluated is None else f"{self._evaluated:.3f}",
            "rows/s": f"{self._per_second('rows_per_second'):.0f}",
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

    def _parts(self, report: AnyReport) -> list[Table]:
        """A line for each part of the model, where the terminal has room for all of them."""
        has_room = self._console.width >= _PARTS_WIDTH and self._console.height >= _PARTS_HEIGHT
        if not (has_room and report.parts):
            return []
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
        for heading in ("part", "parameters", "rate", "gradient", "update / weights"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for name, part in report.parts.items():
            taken = [each for each in self._recent if name in each.parts and not each.skipped]
            means = [
                _mean_of([getattr(each.parts[name], number) for each in taken])
                for number in ("gradient_norm", "update_ratio")
            ]
            table.add_row(name, f"{part.trains:,}", _rate(part), *means)
        return [table]

    def _cells(self, report: AnyReport) -> dict[str, str]:
        """What is told of one objective alone."""
        if isinstance(report, GenerationReport):
            return {
                "tokens right": f"{self._mean('accuracy'):.0%}",
                "tokens/s": f"{self._per_second('tokens_per_second'):,.0f}",
            }
        return {
            "floor": f"{report.floor:.3f}" if report.floor >= _FLOOR_SHOWN else "",
            "margin": f"{self._mean('margin'):+.2f}",
            "first": f"{self._mean('accuracy'):.0%}",
            "candidates": f"{self._mean('candidates'):.0f}",
            "masked": f"{self._mean('masked'):.1f}" if self._mean("masked") else "",
        }

    def _line(self, report: AnyReport) -> str:
        cells = self._cells(report)
        said = {
            "floor": "floor {}",
            "margin": "margin {}",
            "candidates": "{} candidates",
            "masked": "{} masked",
            "tokens right": "{} right",
            "tokens/s": "{} tokens/s",
        }
        parts = {
            "loss": f"loss {self._mean('loss'):.3f} (chance {report.chance:.3f})",
            **{name: text.format(cells[name]) for name, text in said.items() if cells.get(name)},
            "rows/s": f"{self._per_second('rows_per_second'):.0f} rows/s",
            "left": f"{_clock(self._seconds_left(report.step))} left",
            "skipped": f"{self._skipped} skipped (overflow)" if self._skipped else "",
        }
        begin = f"step {report.step}/{self._steps}: "
        widths = {name: len(part) + _GAP for name, part in parts.items() if part}
        shown = _fitting(widths, self._console.width + _GAP - len(begin))
        return begin + ", ".join(parts[name] for name in shown)

    def _mean(self, name: str) -> float:
        return sum(getattr(report, name) for report in self._recent) / len(self._recent)

    def _per_second(self, name: str) -> float:
        """Mean of a pace, over time and not over steps."""
        count = sum(getattr(report, name) * report.seconds for report in self._recent)
        return count / sum(report.seconds for report in self._recent)

    def _seconds_left(self, step: int) -> float:
        return self._mean("seconds") * (self._steps - step)


def _fitting(widths: dict[str, int], width: int) -> list[str]:
    """The names of parts that stand beside each other in a width, without those named first."""
    shown = dict(widths)
    for name in _GIVEN_UP:
        if sum(shown.values()) > width:
            shown.pop(name, None)
    return list(shown)


def _rate(part: PartReport) -> str:
    """Of a part, from the lowest to the highest where they differ."""
    if part.lr_least == part.lr:
        return f"{part.lr:.2e}"
    return f"{part.lr_least:.1e}–{part.lr:.1e}"


def _mean_of(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2e}" if values else "–"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
