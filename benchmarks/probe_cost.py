"""What the probe of a run costs, on the demo's model and data: its share of the time of all steps.

    python benchmarks/probe_cost.py DEMO_FOLDER [--threads 2] [--repeats 15] [--quick]

The folder is one that `colfolio demo` has made: its base and its strips are used, nothing in it is
changed. For each batch size, steps of the demo's recipe and measurements of the probe are taken in
turn, in one process, so that other work on the machine meets both alike. A run measures the probe
every so many steps; the share is the median time of a measurement over that of so many steps. What
a run measures once, before its first step, is timed beside it. Writes
`benchmarks/results/probe_cost.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from demo import commit, machine

from colfolio.commands.run_evidence import steps_between
from colfolio.commands.run_folder import TrainRecipe
from colfolio.config import load_settings
from colfolio.data.dataset import RetrievalDataset, load_dataset
from colfolio.data.picks import Picker
from colfolio.diagnosis.signals import Probe, draw_probe, measure_data, measure_model
from colfolio.models import Retriever
from colfolio.training import TrainingState, TrainSettings, start_training, train

RESULTS = Path(__file__).parent / "results" / "probe_cost.json"
RECIPE = Path(__file__).parent.parent / "colfolio" / "demo" / "recipe.yaml"
ROWS = (128, 8)
_WARM = 2
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Cost:
    """One batch size.

    Args:
        probe_rows, probe_tokens: of the probe.
        every: steps from one measurement to the next.
        step_seconds, probe_seconds: medians.
        step_spread, probe_spread: tenth and ninetieth percentile.
        share: of the time of all steps that the probe takes.
        begin_seconds: of what is measured once, the probe's inputs included.
    """

    rows: int
    probe_rows: int
    probe_tokens: int
    every: int
    step_seconds: float
    probe_seconds: float
    step_spread: tuple[float, float]
    probe_spread: tuple[float, float]
    share: float
    begin_seconds: float


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    dataset = load_dataset(options.folder / "strips", "train")
    held_out = load_dataset(options.folder / "strips", "validation")
    costs = []
    for rows in ROWS:
        state = fresh_state(options.folder / "base", rows, options)
        costs.append(measured(state, dataset, held_out, options.repeats))
        print(told(costs[-1]), flush=True)
    about = {"machine": machine(), "commit": commit()}
    about |= {"threads": options.threads, "repeats": options.repeats}
    if not options.quick:
        RESULTS.write_text(
            json.dumps(about | {"costs": [asdict(c) for c in costs]}, indent=2) + "\n"
        )


def fresh_state(base: Path, rows: int, options: argparse.Namespace) -> TrainingState:
    """The demo's state before its first step, with another batch size."""
    recipe = load_settings(RECIPE, TrainRecipe)
    changed = {"steps": 10_000, "threads": options.threads}
    batch = recipe.train.batch.model_copy(update={"rows": rows})
    settings: TrainSettings = recipe.train.model_copy(update=changed | {"batch": batch})
    return start_training(Retriever.from_pretrained(base, device="cpu"), settings)


def measured(
    state: TrainingState, dataset: RetrievalDataset, held_out: RetrievalDataset, repeats: int
) -> Cost:
    """Steps and measurements in turn, and what is measured once."""
    settings, retriever = state.settings, state.retriever
    reports = train(state, dataset)
    (probe, every), begin = timed(lambda: prepared(state, dataset, held_out))
    steps, probes = [], []
    for number in range(repeats + _WARM):
        _, of_step = timed(lambda: next(reports))
        _, of_probe = timed(
            lambda: probe.measure(retriever, state.step, settings.loss, settings.precision)
        )
        if number >= _WARM:
            steps.append(of_step)
            probes.append(of_probe)
    step, of_probe = statistics.median(steps), statistics.median(probes)
    return Cost(
        rows=settings.batch.rows,
        probe_rows=len(probe.batch.queries),
        probe_tokens=probe.batch.num_tokens,
        every=every,
        step_seconds=step,
        probe_seconds=of_probe,
        step_spread=spread(steps),
        probe_spread=spread(probes),
        share=of_probe / (every * step),
        begin_seconds=begin,
    )


def prepared(
    state: TrainingState, dataset: RetrievalDataset, held_out: RetrievalDataset
) -> tuple[Probe, int]:
    """What a run does before its first step; the probe, and the steps between measurements."""
    settings, retriever = state.settings, state.retriever
    picker = Picker(dataset, settings.batch, settings.seed)
    batch = draw_probe(dataset, retriever.collator, settings.batch, picker.relations)
    assert batch is not None
    probe = Probe(batch, settings.memory.chunk_tokens)
    measure_data(dataset, retriever.collator, settings.batch, picker, batch, held_out)
    measure_model(retriever, probe, settings.precision)
    return probe, steps_between(len(batch.queries), float(settings.batch.rows), is_whole=True)


def timed(run: Callable[[], _Result]) -> tuple[_Result, float]:
    """What a call returns, and its seconds."""
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def spread(seconds: list[float]) -> tuple[float, float]:
    """Tenth and ninetieth percentile."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def told(cost: Cost) -> str:
    return (
        f"batch {cost.rows}: step {cost.step_seconds:.3f} s, probe of {cost.probe_rows} queries "
        f"{cost.probe_seconds:.3f} s every {cost.every} steps: {cost.share:.2%} of the steps; "
        f"before the first step {cost.begin_seconds:.2f} s"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
