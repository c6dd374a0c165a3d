"""MaxSim beside its peers on a GPU: the loss of a batch, forward and backward.

    pip install --no-deps colpali-engine==0.3.18 late-interaction-kernels==0.4.5 flash-maxsim==0.3.0
    python benchmarks/maxsim_gpu.py [--repeats 20] [--dtypes bf16 fp32]

Every side computes InfoNCE (temperature 1) over all documents of the batch and the gradient of all
vectors; query i belongs to document i. All run in turn, in one process, on the same vectors. Before
that, each gradient is compared with that of the tiles in float32 on the same vectors; Colfolio's
must agree within rounding, and those of its peers are told in the table. All rows are equally long,
so that no peer pads. A peer that is not installed, or that runs out of memory, is named and left
out.

- colpali-engine: its own `ColbertLoss`, scoring with torch, as it does where no kernels are
  installed.
- late-interaction-kernels: `maxsim`, as it chooses its own way back.
- flash-maxsim: `flash_maxsim_batched_train` over shared documents.

Peak memory is what torch's allocator held beyond the vectors; the gradients of all vectors are in
it. Writes `benchmarks/results/maxsim_gpu.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from demo import commit, machine
from maxsim import Case, Loss, build_colpali_engine, packed, spread, with_gradients
from torch import Tensor
from torch.nn.functional import cross_entropy

from colfolio.batch import MultiVectors
from colfolio.maxsim import maxsim
from colfolio.maxsim.tiled import maxsim_tiled

RESULTS = Path(__file__).parent / "results" / "maxsim_gpu.json"
CASES = [Case(128, 768), Case(512, 768)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Of the norm. Rounding of inputs is shared; what is left is the rounding of gradients to their
# dtype, and vectors so nearly equally good that two orders of addition find different winners.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-3}
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """Median milliseconds of one side, their tenth and ninetieth percentile, and peak memory."""

    case: Case
    dtype: str
    side: str
    ms: float
    spread_ms: tuple[float, float]
    times_ours: float
    gradient_difference: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch sees none")
    losses, measured = installed(), []
    for case in CASES:
        for dtype in options.dtypes:
            measured += compare(losses, case, dtype, options.repeats)
            print(table(measured[-len(losses) :]), flush=True)
    told = {
        "machine": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {machine()}",
        "commit": commit(),
        **{name: version(name) for name in losses if name not in OURS},
        "repeats": options.repeats,
    }
    text = json.dumps(told | {"measured": [asdict(line) for line in measured]}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print("\n" + table(measured))
    print("\n" + ", ".join(f"{name} {value}" for name, value in told.items()))


def installed() -> dict[str, Loss]:
    """The sides that can be had here; the others are named."""
    losses = {}
    for side, build in SIDES.items():
        try:
            if side not in OURS:
                version(side)
            losses[side] = build()
        except (ImportError, PackageNotFoundError) as error:
            print(f"{side} is left out: {error}", flush=True)
    return losses


def compare(losses: dict[str, Loss], case: Case, dtype: str, repeats: int) -> list[Measured]:
    """All sides that fit, checked and then timed in turn."""
    queries, documents = (side.to("cuda", DTYPES[dtype]) for side in case.draw())
    batch = (queries, documents)
    exact = with_gradients(losses[TILED], (queries.float(), documents.float()))
    differences, peaks = {}, {}
    for side, loss in losses.items():
        try:
            differences[side], peaks[side] = checked(loss, batch, exact)
        except torch.OutOfMemoryError:
            print(f"{side} runs out of memory at {case}, {dtype}", flush=True)
            torch.cuda.empty_cache()
            continue
        assert side not in OURS or differences[side] < TOLERANCE[dtype], (side, differences[side])
    del exact
    times: dict[str, list[float]] = {side: [] for side in differences}
    for turn in range(WARM_UP + repeats):
        for side, taken in times.items():
            ms = milliseconds(losses[side], batch)
            if turn >= WARM_UP:
                taken.append(ms)
    ours = statistics.median(times[FUSED])
    return [
        Measured(
            *(case, dtype, side, round(statistics.median(taken), 2), spread(taken)),
            *(round(statistics.median(taken) / ours, 2), differences[side], peaks[side]),
        )
        for side, taken in times.items()
    ]


def checked(loss: Loss, batch: tuple[Tensor, Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """The larger difference of both gradients as a share of their norm, and peak MiB."""
    with_gradients(loss, batch)  # compiles and tunes, which takes memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, *gradients = with_gradients(loss, batch)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    pairs = zip(gradients, exact[1:], strict=True)
    worst = max(float((mine.float() - other).norm() / other.norm()) for mine, other in pairs)
    return worst, round(peak, 1)


def milliseconds(loss: Loss, batch: tuple[Tensor, Tensor]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    with_gradients(loss, batch)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def build_fused() -> Loss:
    # named, so that tiles do not stand in for it where Triton is missing
    import triton  # noqa: F401, PLC0415

    return on_packed(maxsim)


def build_tiled() -> Loss:
    return on_packed(maxsim_tiled)


def on_packed(score: Callable[[MultiVectors, MultiVectors], Tensor]) -> Loss:
    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        return in_batch(score(packed(queries), packed(documents)))

    return loss


def build_colbert_loss() -> Loss:
    os.environ["COLPALI_SCORES_BACKEND"] = "torch"
    return build_colpali_engine()


def build_late_interaction_kernels() -> Loss:
    from late_interaction_kernels import maxsim as fused  # noqa: PLC0415

    return lambda queries, documents: in_batch(fused(queries, documents))


def build_flash_maxsim() -> Loss:
    from flash_maxsim import flash_maxsim_batched_train  # noqa: PLC0415

    return lambda queries, documents: in_batch(flash_maxsim_batched_train(queries, documents))


FUSED, TILED = OURS = ("Colfolio", "Colfolio in tiles")
SIDES: dict[str, Callable[[], Loss]] = {
    FUSED: build_fused,
    TILED: build_tiled,
    "colpali-engine": build_colbert_loss,
    "late-interaction-kernels": build_late_interaction_kernels,
    "flash-maxsim": build_flash_maxsim,
}


def in_batch(scores: Tensor) -> Tensor:
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def table(measured: list[Measured]) -> str:
    lines = [
        "| batch | document tokens | | | ms | times Colfolio's | peak MiB | gradient off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.case.rows} | {each.case.document_tokens} | {each.dtype} | {each.side} "
        f"| {each.ms:.2f} | {each.times_ours:.2f} | {each.peak_mib:.0f} "
        f"| {each.gradient_difference:.0e} |"
        for each in measured
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
