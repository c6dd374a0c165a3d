"""What a run tells while it goes on: to its log, to the terminal, and to TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType

from rich.console import Console

from colfolio.commands.live import LiveTraining
from colfolio.commands.run_folder import RunFolder, TrainRecipe
from colfolio.commands.tensorboard import TensorBoardLog
from colfolio.diagnosis.plateau import PlateauWatch, is_due, named_plateaus
from colfolio.diagnosis.run_evidence import evidence_of_log
from colfolio.diagnosis.training_log import read_log
from colfolio.training import AnyReport


class RunLog:
    """Takes each step and evaluation once and writes it wherever the recipe says.

    Args:
        step: after which the run goes on.
    """

    def __init__(self, run: RunFolder, recipe: TrainRecipe, console: Console, step: int) -> None:
        self._run = run
        self._steps = recipe.train.steps
        self._watch = PlateauWatch(named_plateaus(read_log(run.log)) if run.log.exists() else ())
        metric = "ndcg@5" if recipe.train.objective == "retrieval" else "loss"
        self._live = LiveTraining(console, recipe.train.steps, metric)
        self._events: TensorBoardLog | None = None
        if recipe.train.tensorboard:
            self._events = TensorBoardLog(run.tensorboard, step)
        self._open = ExitStack()

    def __enter__(self) -> RunLog:
        self._open.enter_context(self._live)
        if self._events:
            self._open.enter_context(self._events)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def step(self, report: AnyReport) -> None:
        """Tell of a step."""
        self._run.append("step", asdict(report))
        self._live.step(report)
        if self._events:
            self._events.step(report)

    def evaluation(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Tell of an evaluation."""
        self._run.append("evaluation", {"step": step, "split": split, **values})
        self._live.evaluation(step, values)
        if self._events:
            self._events.evaluation(step, split, values)

    def look(self, step: int) -> None:
        """Say what keeps the run from learning, where a look at its log is due and finds it."""
        if not is_due(step, self._steps):
            return
        finding = self._watch.see(evidence_of_log(read_log(self._run.log)))
        if finding is None:
            return
        told = finding.paragraph()
        self._run.append("diagnosis", {"step": step, "cause": finding.cause, "told": told})
        self._live.diagnosis(step, told)
        if self._events:
            self._events.diagnosis(step, told)
