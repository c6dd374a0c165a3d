"""One optimiser step beside the peers, on the CPU: the same weights, global batch and gradient.

    pip install --no-deps "sentence-transformers==6.2.*"
    python benchmarks/step.py [--threads 2] [--rows 32] [--repeats 3] [--quick] [--tune]

A step is forward, InfoNCE over all pages of the batch (temperature 1), backward, clipping and
AdamW. The sides are told in `step_sides.py`; the model (Qwen2-VL's shape, 6 million random weights)
and the batch in `step_batch.py`. Uniform pages have 140 visual tokens; ragged ones 21 to 256, any
number as likely as another, a third of 64 to 768, which is what two cores can do in seconds.
*Frozen* is the vision tower with its merger. All sides begin with the same weights and take their
steps in turn, in one process, on the same batch, with the same clipping and optimiser.

Before that: on four rows in float64 the gradients of all sides are equal to rounding
(sentence-transformers rounds its scores to float32); on the whole batch the difference to that of
transformers in float32 is printed, and checked for float32.

Each peer has its best case. `--tune` prints what mini batches and which attention cost; the fastest
are in `TUNED`. Rows come to sentence-transformers as its loader brings them, in the order drawn,
and, as a side of its own, in the order of their pages, which its loader does not do. Inputs are
made before the clock starts, for all sides: ids, patches, and padding or offsets; Colfolio's loader
makes positions too, which the peers make in their forward: 2 to 6 ms, measured alone.

Peak memory is of one step in a fresh process, beyond what it held before: libraries, weights,
optimiser state, batch, feature cache (1 KiB a visual token). Writes `benchmarks/results/step.json`
and prints the table that stands in `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from demo import commit, machine
from process_memory import peak_bytes, resident_bytes, tell_from_fresh_process
from step_batch import draw_rows
from step_sides import OURS, PEER, PLAIN, Case, PeerSettings, Side, sides_of
from torch import Tensor
from torch.optim import AdamW

from colfolio.models.precision import Precision
from colfolio.training.optim import OptimiserSettings, build_optimiser, optimiser_step

RESULTS = Path(__file__).parent / "results" / "step.json"
# Of the gradient's norm, in float32. Rounding is a hundredth of it; the rest is room for two page
# vectors so nearly equally good that two products, which round differently, find different winners.
TOLERANCE = 1e-4
EXACT = 1e-6  # in float64, where one side rounds its scores to float32
EXACT_ROWS = 4
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
RATE = 1e-5  # so low that the steps of a run are all of the same kind
# By pages and precision the fastest of `ATTEMPTS`, as `--tune` told on one thread.
TUNED = {
    ("ragged", "fp32"): PeerSettings(attention="sdpa", mini_batch_num_tokens=256),
    ("ragged", "bf16"): PeerSettings(attention="eager", mini_batch_num_tokens=512),
    ("uniform", "fp32"): PeerSettings(attention="sdpa", mini_batch_size=8),
    ("uniform", "bf16"): PeerSettings(attention="eager", mini_batch_size=8),
}
ATTEMPTS = [
    PeerSettings(attention, size, num_tokens)
    for attention in ("sdpa", "eager")
    for size, num_tokens in [
        *((size, None) for size in (1, 4, 8, 32)),
        *((1, num_tokens) for num_tokens in (256, 512, 1024)),
    ]
]


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's step: median seconds, tenth and ninetieth percentile, and peak memory.

    Args:
        pages, precision, vision: the case.
        cpu_seconds: median of what all threads together computed, which other work on the machine
            disturbs less.
        times_ours: seconds as a multiple of Colfolio's.
        gradient_difference: to the gradient of transformers in float32, as a share of its norm.
    """

    pages: str
    precision: str
    vision: str
    side: str
    seconds: float
    spread_seconds: tuple[float, float]
    cpu_seconds: float
    rows_per_second: float
    times_ours: float
    gradient_difference: float
    peak_mib: float


class Stepper:
    """A side with an optimiser of its own, and the times of its steps."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._settings = OptimiserSettings()
        self._optimiser: AdamW = build_optimiser(side.model, self._settings)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def gradient(self) -> dict[str, Tensor]:
        """Of each trainable parameter, by name; the weights stay as they are."""
        self._side.backward()
        named = {
            name: parameter.grad.double()
            for name, parameter in self._side.model.named_parameters()
            if parameter.grad is not None
        }
        self._optimiser.zero_grad(set_to_none=True)
        return named

    def step(self) -> None:
        """Take a step and note its times."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self._side.backward()
        optimiser_step(self._side.model, self._optimiser, RATE, self._settings)
        self.seconds.append(time.perf_counter() - begin)
        self.cpu_seconds.append(time.process_time() - cpu_begin)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        side, pages, vision, precision = options.memory_of
        case = Case(pages == "ragged", vision == "frozen", precision, options.rows)
        print(peak_of_a_step(side, case))
        return
    if options.tune:
        tune(options.rows)
        return
    measured: list[Measured] = []
    for is_ragged, is_frozen, precision in product((True, False), (False, True), PRECISIONS):
        case = Case(is_ragged, is_frozen, precision, options.rows)
        measured += compare(case, options.repeats, options.threads)
        print(table(measured[-len(sides_of(case)) :]), flush=True)
    told = {
        "machine": machine(),
        "commit": commit(),
        **{name: version(name) for name in ("transformers", "sentence-transformers")},
        **{name: getattr(options, name) for name in ("threads", "rows", "repeats")},
    }
    if not options.quick:
        tuned = {" ".join(names): asdict(settings) for names, settings in TUNED.items()}
        lines = [asdict(line) for line in measured]
        text = json.dumps(told | {"tuned": tuned, "measured": lines}, indent=2)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    print("\n" + table(measured))
    print("\n" + ", ".join(f"{name} {value}" for name, value in told.items()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 rows, one step, nothing written")
    parser.add_argument("--tune", action="store_true", help="only print what peers' settings cost")
    parser.add_argument("--memory-of", nargs=4, metavar=("SIDE", "PAGES", "VISION", "PRECISION"))
    options = parser.parse_args()
    if options.quick:
        options.rows, options.repeats = 8, 1
    return options


def compare(case: Case, repeats: int, threads: int) -> list[Measured]:
    """All sides of a case, checked against transformers and then timed in turn."""
    if case.precision == "fp32":
        check_in_float64(case)
    rows, tuned = draw_rows(case.is_ragged, case.num_rows), TUNED[case.names[:2]]
    exact = sides_of(case)[PLAIN](replace(case, precision="fp32"), rows, tuned)
    reference = Stepper(exact).gradient()
    steppers = {name: Stepper(make(case, rows, tuned)) for name, make in sides_of(case).items()}
    differences = {
        name: difference(stepper.gradient(), reference) for name, stepper in steppers.items()
    }
    for name, found in differences.items():
        assert case.precision != "fp32" or found < TOLERANCE, f"{name}: {found:.1e} of the norm"
    for _ in range(repeats):
        for stepper in steppers.values():
            stepper.step()
    ours = statistics.median(steppers[OURS].seconds)
    return [
        Measured(
            *(*case.names, name, round(seconds, 3), spread(stepper.seconds)),
            *(round(statistics.median(stepper.cpu_seconds), 3), round(case.num_rows / seconds, 2)),
            *(round(seconds / ours, 2), differences[name], peak_mib(name, case, threads)),
        )
        for name, stepper in steppers.items()
        for seconds in [statistics.median(stepper.seconds)]
    ]


def check_in_float64(case: Case) -> None:
    """On a few rows, all gradients are the same but for rounding."""
    few = replace(case, num_rows=EXACT_ROWS, dtype=torch.float64, precision="fp32")
    rows, tuned = draw_rows(case.is_ragged, EXACT_ROWS), TUNED[few.names[:2]]
    sides = {name: Stepper(build(few, rows, tuned)) for name, build in sides_of(few).items()}
    reference = sides[PLAIN].gradient()
    for name, stepper in sides.items():
        found = difference(stepper.gradient(), reference)
        assert found < EXACT, f"{name}: in float64 its gradient differs by {found:.1e} of the norm"


def difference(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Of two gradients of all parameters, as a share of the second one's norm."""
    assert mine.keys() == reference.keys(), sorted(mine.keys() ^ reference.keys())
    apart = torch.stack([(mine[name] - reference[name]).norm() for name in reference]).norm()
    return float(apart / torch.stack([each.norm() for each in reference.values()]).norm())


def tune(num_rows: int) -> None:
    """Print what a step of the peer costs with each of its settings: the best of three."""
    print("| pages | precision | vision | attention | rows | tokens | s |\n" + "|---" * 7 + "|")
    for is_ragged, precision in product((True, False), PRECISIONS):
        case = Case(is_ragged, is_frozen=False, precision=precision, num_rows=num_rows)
        rows = draw_rows(is_ragged, num_rows)
        for settings in ATTEMPTS:
            stepper = Stepper(sides_of(case)[PEER](case, rows, settings))
            for _ in range(3):
                stepper.step()
            tried = (settings.attention, settings.mini_batch_size, settings.mini_batch_num_tokens)
            cells = [*case.names, *map(str, tried), f"{min(stepper.seconds):.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def peak_mib(side: str, case: Case, threads: int) -> float:
    """Asked of a fresh process, because a peak cannot be told from earlier ones in this."""
    pages, precision, vision = case.names
    arguments = ["--memory-of", side, pages, vision, precision]
    arguments += ["--rows", str(case.num_rows), "--threads", str(threads)]
    return float(tell_from_fresh_process(__file__, *arguments))


def peak_of_a_step(side: str, case: Case) -> float:
    """MiB that a step adds to what the process holds after a small first one."""
    build, tuned = sides_of(case)[side], TUNED[case.names[:2]]
    rows = draw_rows(case.is_ragged, case.num_rows)
    Stepper(build(replace(case, num_rows=2), draw_rows(case.is_ragged, 2), tuned)).step()
    stepper = Stepper(build(case, rows, tuned))
    held = resident_bytes()
    return round((peak_bytes(stepper.step) - held) / 2**20, 1)


def spread(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return round(tenths[0], 3), round(tenths[-1], 3)


def table(measured: list[Measured]) -> str:
    lines = [
        "| pages | precision | vision | | rows/s | s | CPU s | times Colfolio's "
        "| gradient off by | peak MiB |",
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {each.pages} | {each.precision} | {each.vision} | {each.side} "
        f"| {each.rows_per_second:.1f} | {each.seconds:.2f} | {each.cpu_seconds:.2f} "
        f"| {each.times_ours:.2f} | {each.gradient_difference:.0e} | {each.peak_mib:.0f} |"
        for each in measured
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
