"""A run's numbers as the event files that TensorBoard reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from colfolio.errors import ColfolioError
from colfolio.training import AnyReport

_FLUSH_SECONDS = 10


def check_tensorboard() -> None:
    """Refuse to begin without the package that writes event files.

    Raises:
        ColfolioError: it is missing.
    """
    _writer_class()


class TensorBoardLog:
    """Event files of a run: `train/loss`, `parts/vision/gradient_norm`, `validation/loss` ….

    Args:
        folder: of the files; those that are there stay.
        step: after which the run goes on. What earlier files say of later steps is void.

    Raises:
        ColfolioError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _writer_class()(str(folder), purge_step=step + 1, flush_secs=_FLUSH_SECONDS)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()

    def step(self, report: AnyReport) -> None:
        """Write all numbers of a step, and what opened."""
        values = asdict(report)
        parts = values.pop("parts")
        self._add("train", values, report.step)
        for part, numbers in parts.items():
            self._add(f"parts/{part}", numbers, report.step)
        if report.opened:
            self._writer.add_text("opened", ", ".join(report.opened), report.step)

    def evaluation(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Write all numbers of an evaluation."""
        self._add(split, values, step)

    def diagnosis(self, step: int, told: str) -> None:
        """Write what is the matter, as text."""
        self._writer.add_text("diagnosis", told, step)

    def _add(self, group: str, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                # a tag has no @
                self._writer.add_scalar(f"{group}/{name.replace('@', '_at_')}", value, step)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ColfolioError(
            f"train.tensorboard is true, but the package tensorboard is missing ({error}): "
            "pip install 'colfolio[tensorboard]', or set it to false"
        ) from None
    return SummaryWriter
