"""What looking costs a run: share of the time of its steps that measuring and diagnosing take.

    python benchmarks/probe_cost.py DEMO_FOLDER [--threads 2] [--quick]

The folder is one that `colfolio demo` has made: its base and its strips are used, nothing in it is
changed. Trains by the real command, with the demo's recipe and changes to it, and times inside of
the run: each step, each measurement of the probe with its line in the log, each look of the
diagnosis at the log, and what is checked and measured once before the first step. Steps and
measurements come in turn, so that other work on the machine meets both alike. The share is that of
medians times counts. Writes `benchmarks/results/probe_cost.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from demo import commit, machine

from colfolio.commands import train as train_module
from colfolio.commands.run_evidence import RunEvidence
from colfolio.commands.run_log import RunLog
from colfolio.commands.train import train_command
from colfolio.diagnosis.plateau import is_due

RESULTS = Path(__file__).parent / "results" / "probe_cost.json"
RECIPE = Path(__file__).parent.parent / "colfolio" / "demo" / "recipe.yaml"
_WARM = 2  # steps and measurements that are left out


@dataclass(frozen=True, slots=True)
class Case:
    """A run: what of the demo's recipe is changed, and how many steps are taken."""

    told: str
    steps: int
    changes: Sequence[str] = ()


CASES = (
    Case("128 rows", 300),
    Case("8 rows", 1608, ["train.batch.rows=8", "train.batch.candidates=null"]),
    Case(
        "128 rows, vision tower frozen and its features kept",
        300,
        ["train.frozen=[vision]", "train.features.ram_mb=2048"],
    ),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """One case.

    Args:
        step_seconds, probe_seconds, look_seconds: medians.
        step_spread, probe_spread: tenth and ninetieth percentile.
        share: of the time of all steps that probes and looks take.
        begin_seconds: of what is checked and measured once, before the first step.
    """

    told: str
    steps: int
    probes: int
    looks: int
    step_seconds: float
    probe_seconds: float
    look_seconds: float
    step_spread: tuple[float, float]
    probe_spread: tuple[float, float]
    share: float
    begin_seconds: float


def main() -> None:
    options = parsed()
    costs = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            costs.append(measured(case, options, Path(scratch)))
        print(said(costs[-1]), flush=True)
    about = {"machine": machine(), "commit": commit(), "threads": options.threads}
    if not options.quick:
        RESULTS.write_text(
            json.dumps(about | {"costs": [asdict(c) for c in costs]}, indent=2) + "\n"
        )


def measured(case: Case, options: argparse.Namespace, scratch: Path) -> Cost:
    """Train, and count."""
    steps = case.steps // 3 if options.quick else case.steps
    given = [
        f"model={options.folder / 'base'}",
        f"dataset={options.folder / 'strips'}",
        f"out={scratch / 'run'}",
        f"train.steps={steps}",
        f"train.threads={options.threads}",
        "checkpoint.every=100000",
        "validation.every=100000",
        *case.changes,
    ]
    with watched() as seconds:
        train_command(RECIPE, given, device="cpu")
    log = (scratch / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    of_steps = [row["seconds"] for row in map(json.loads, log) if row["kind"] == "step"][_WARM:]
    probes = seconds["probe"][_WARM:]
    looks = [each for step, each in enumerate(seconds["look"]) if is_due(step, steps)]
    step, probe, look = map(statistics.median, (of_steps, probes, looks))
    looking = probe * len(seconds["probe"]) + look * len(looks)
    return Cost(
        told=case.told,
        steps=steps,
        probes=len(seconds["probe"]),
        looks=len(looks),
        step_seconds=step,
        probe_seconds=probe,
        look_seconds=look,
        step_spread=spread(of_steps),
        probe_spread=spread(probes),
        share=looking / (step * steps),
        begin_seconds=sum(seconds["begin"]),
    )


@contextmanager
def watched() -> Iterator[Mapping[str, list[float]]]:
    """Seconds of each call inside of a run, by what it is for."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                seconds[name].append(time.perf_counter() - begin)

        return timed_call

    calls = [
        ("probe", RunEvidence, "_measure"),
        ("look", RunLog, "look"),
        ("begin", RunEvidence, "begin"),
        ("begin", train_module, "first_checks"),
    ]
    with ExitStack() as patches:
        for name, owner, call in calls:
            patches.enter_context(patch.object(owner, call, timed(name, getattr(owner, call))))
        yield seconds


def spread(seconds: list[float]) -> tuple[float, float]:
    """Tenth and ninetieth percentile."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def said(cost: Cost) -> str:
    return (
        f"{cost.told}: step {cost.step_seconds:.3f} s, {cost.probes} probes of "
        f"{cost.probe_seconds:.3f} s and {cost.looks} looks of {cost.look_seconds:.3f} s in "
        f"{cost.steps} steps: {cost.share:.2%}; before them {cost.begin_seconds:.2f} s"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few steps; write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
