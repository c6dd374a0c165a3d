"""How often the diagnosis is right: each cause planted in real runs, and runs without any.

    python benchmarks/diagnosis.py [--tune] [--only CAUSE …] [--jobs 2] [--folder FOLDER]

Trains every plant of `tests/faults/plants.py` with three seeds, and every healthy run of
`tests/faults/healthy.py` with two, by the real command, on a tiny model that learns coloured
shapes; then reads each run folder as `colfolio diagnose` does. Beside them stand faults of which
nothing can be seen, which are not counted, and the arms of the two stories' quick forms, diagnosed
from their logs alone.

Writes `benchmarks/results/diagnosis.json` and prints a confusion table: what was planted, and which
cause was named first. `--tune` does the same with other seeds, models and images, by which alone
the thresholds of `colfolio/diagnosis/causes/thresholds.py` were set, and writes
`diagnosis_tuning.json` beside it. A run whose folder is whole is diagnosed again, not trained
again, so that an hour's work can be done in parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from demo import commit, machine
from diagnosis_stories import STORIES, run_story

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from faults.ground import COUNTED, TUNED, Ground, Size  # noqa: E402
from faults.healthy import HEALTHY_RUNS  # noqa: E402
from faults.plants import INDISTINCT, PLANTS  # noqa: E402
from faults.trials import HEALTHY, Outcome, run_trial  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TRIALS = {trial.name: trial for trial in (*PLANTS, *HEALTHY_RUNS, *INDISTINCT)}
UNTOLD = {trial.name for trial in INDISTINCT}
SEEDS, TUNING_SEEDS = (3, 4, 5), (100, 101)
NAMED = 3  # other causes that a row of the table tells
_TASKS = 16  # of a process, lest its memory grows


@dataclass(frozen=True, slots=True)
class Run:
    """A run, and what it was read as.

    Args:
        planted: the cause that should come first.
        first: the cause that did.
        findings: all causes, with how sure each is.
        evidence: of the first.
    """

    name: str
    told: str
    planted: str
    model: str
    seed: int
    first: str
    findings: list[str]
    evidence: list[str]
    loss: float | None
    chance: float | None
    error: str
    seconds: float


Job = tuple[str, Size, int]  # a trial's or a story's name, and where and how it runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", nargs="+", help="causes, names of runs, or `stories`")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    seeds = options.seeds or (TUNING_SEEDS if options.tune else SEEDS)
    jobs = list(jobs_of(seeds, is_tuning=options.tune, only=options.only))
    path = RESULTS / ("diagnosis_tuning.json" if options.tune else "diagnosis.json")
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for run in done(jobs, options.folder or Path(scratch), options.jobs):
            runs.append(run)
            verdict = "right" if run.first == run.planted else f"{run.first}, not {run.planted}"
            print(f"{run.name}, {run.model}, seed {run.seed}: {verdict}", flush=True)
    runs.sort(key=_place)
    if not options.only:
        record = {"machine": machine(), "commit": commit(), "runs": [asdict(run) for run in runs]}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(report(runs))


def _place(run: Run) -> tuple[int, int]:
    names = [*TRIALS, *STORIES]
    return names.index(run.name), run.seed


def jobs_of(seeds: Sequence[int], *, is_tuning: bool, only: Sequence[str] | None) -> Iterator[Job]:
    """Plants with every seed, and healthy runs with the first two."""
    for name, trial in TRIALS.items():
        if only and not {name, trial.cause} & set(only):
            continue
        own = seeds[:2] if trial.cause == HEALTHY else seeds
        for seed in own:
            yield name, TUNED[seed % len(TUNED)] if is_tuning else COUNTED, seed
    if not is_tuning:
        for name in STORIES:
            if not only or {name, "stories"} & set(only):
                yield name, COUNTED, 0


def done(jobs: Sequence[Job], folder: Path, processes: int) -> Iterator[Run]:
    """The runs, as they end."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, torch.set_num_threads, (1,), maxtasksperchild=_TASKS) as pool:
        yield from pool.imap_unordered(partial(run_job, folder=folder), jobs)


def run_job(job: Job, folder: Path) -> Run:
    name, size, seed = job
    if name in STORIES:
        return run_of(run_story(name, folder / "stories"), "story")
    return run_of(run_trial(TRIALS[name], Ground(folder, size), seed, folder / "runs"), size.name)


def run_of(outcome: Outcome, model: str) -> Run:
    trial, found = outcome.trial, outcome.diagnosis
    last = outcome.evidence.steps[-1] if outcome.evidence.steps else None
    return Run(
        trial.name,
        trial.told,
        trial.cause,
        model,
        outcome.seed,
        found.first.cause,
        [f"{each.cause} ({each.sureness})" for each in found.findings],
        list(found.first.evidence),
        last and last.loss,
        last and last.chance,
        outcome.error,
        round(outcome.seconds, 2),
    )


def report(runs: Sequence[Run]) -> str:
    """The confusion table, and what it comes to."""
    counted = [run for run in runs if run.model != "story" and run.name not in UNTOLD]
    lines = ["| planted | runs | named first | else |", "|---|---|---|---|"]
    for cause in dict.fromkeys(run.planted for run in counted):
        lines.append(_row(cause, [run for run in counted if run.planted == cause]))
    planted = [run for run in counted if run.planted != HEALTHY]
    healthy = [run for run in counted if run.planted == HEALTHY]
    lines.append("")
    if planted:
        right = sum(run.first == run.planted for run in planted)
        causes = len({run.planted for run in planted})
        lines.append(
            f"{right} of {len(planted)} planted runs ({right / len(planted):.1%}), of {causes} "
            "causes, are named right as the first cause."
        )
    if healthy:
        alarms = sum(run.first != HEALTHY for run in healthy)
        lines.append(f"{alarms} of {len(healthy)} healthy runs are given a cause.")
    for run in runs:
        if run.model == "story":
            lines.append(f"Story {run.name}: {run.first} ({run.planted} expected).")
        elif run.name in UNTOLD:
            lines.append(f"Not counted, {run.told}, seed {run.seed}: {run.first}.")
    return "\n".join(lines)


def _row(cause: str, runs: Sequence[Run]) -> str:
    others = Counter(run.first for run in runs if run.first != cause).most_common(NAMED)
    told = ", ".join(f"{other} {count}" for other, count in others)
    right = sum(run.first == cause for run in runs)
    return f"| `{cause}` | {len(runs)} | {right} | {told} |"


if __name__ == "__main__":
    main()
