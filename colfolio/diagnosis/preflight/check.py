"""One question that has an answer before a run: passed or failed, with the number that says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Check:
    """What one check came to.

    Args:
        name: what was asked, in a few words.
        told: the number with its unit; of a failure also what to do.
        cause: the name of the cause that a failure points to, as `diagnosis.causes` has it; empty
            where none is known.
        seconds: that it took.
    """

    name: str
    passed: bool
    told: str
    cause: str = ""
    seconds: float = 0.0


Asked = Callable[[], Check]


def run_checks(asked: Mapping[str, Asked]) -> Iterator[Check]:
    """The checks one after another, each with its time; one that cannot be made has failed.

    Args:
        asked: by the name that a check has if it ends in an error.
    """
    for name, ask in asked.items():
        begin = time.perf_counter()
        try:
            yield timed(ask)
        except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
            yield Check(name, False, str(error), seconds=time.perf_counter() - begin)


def timed(ask: Asked) -> Check:
    """A check with the time that it took."""
    begin = time.perf_counter()
    return replace(ask(), seconds=time.perf_counter() - begin)


def failures(checks: Iterable[Check]) -> list[Check]:
    """Those that failed."""
    return [check for check in checks if not check.passed]
