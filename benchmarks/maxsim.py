"""MaxSim beside its peers on the CPU: the loss of a batch, forward and backward.

    pip install --no-deps colpali-engine==0.3.18 "sentence-transformers==6.2.*"
    pip install scikit-learn
    python benchmarks/maxsim.py [--threads 1 2] [--repeats 7]

Every side computes InfoNCE (temperature 1) over all documents of the batch and the gradient of all
vectors; query i belongs to document i. All run in turn, in one process, on the same vectors, and
must agree in loss and gradients before they are timed. Each peer has its best case: all rows
equally long, so nothing is padded, and no normalisation of scores by length.

- colpali-engine: its own `ColbertLoss`. Importing the package imports its models, which need
  torchvision; only the loss is loaded here.
- sentence-transformers: `colbert_scores`, with which its loss for multi-vector models scores,
  without masks, which that loss always hands over; as it comes, and with the budget for
  similarities (`chunk_elements`) that was fastest here.
- PyLate: the formula of its `colbert_scores` on the CPU, with the mask of the documents that its
  loss always hands over.

Peak memory is of one call in a fresh process, beyond what that process held before it (library,
vectors); the gradients of all vectors are in it. Writes `benchmarks/results/maxsim.json` and prints
the table that stands in `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from demo import commit, machine
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from colfolio.batch import MultiVectors, offsets_of
from colfolio.maxsim import maxsim

RESULTS = Path(__file__).parent / "results" / "maxsim.json"
DIM, QUERY_TOKENS = 128, 32
CASES = [(64, 256), (64, 768), (128, 256), (128, 768)]  # rows of each side, document tokens
# Of the norm. Rounding alone is a thousandth of it; the rest is room for two vectors so nearly
# equally good that two products, which round differently, find different winners.
GRADIENT_TOLERANCE = 1e-3
# The fastest of 2^20, 2^21, 2^23 and 2^25 for sentence-transformers, each tried once: 128 documents
# of 768 vectors, on two threads.
FASTEST_CHUNK = 1 << 23

# Dense queries [rows, tokens, dim] and documents of the same kind to the loss.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: so many queries and documents, and so many vectors of each document."""

    rows: int
    document_tokens: int

    def draw(self) -> tuple[Tensor, Tensor]:
        """Vectors of length 1; each query is near vectors of its own document."""
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        documents = normalize(draw(self.rows, self.document_tokens, DIM), dim=2)
        noise = normalize(draw(self.rows, QUERY_TOKENS, DIM), dim=2)
        return normalize(documents[:, :QUERY_TOKENS] + 2 * noise, dim=2), documents


@dataclass(frozen=True, slots=True)
class Measured:
    """Median milliseconds of one side, their tenth and ninetieth percentile, and peak memory."""

    case: Case
    threads: int
    side: str
    ms: float
    spread_ms: tuple[float, float]
    times_ours: float
    gradient_difference: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", nargs=3, metavar=("SIDE", "ROWS", "TOKENS"))
    options = parser.parse_args()
    if options.memory_of:
        side, rows, tokens = options.memory_of
        print(peak_memory(side, Case(int(rows), int(tokens))))
        return
    measured, losses = [], {side: build() for side, build in SIDES.items()}
    for case in (Case(*each) for each in CASES):
        peaks = {side: memory_in_a_fresh_process(side, case) for side in SIDES}
        for threads in options.threads:
            torch.set_num_threads(threads)
            measured += compare(losses, case, threads, options.repeats, peaks)
            print(table(measured[-len(SIDES) :]), flush=True)
    told = {
        "machine": machine(),
        "commit": commit(),
        **{name: version(name) for name in ("colpali-engine", "sentence-transformers")},
        "threads": options.threads,
        "repeats": options.repeats,
    }
    text = json.dumps(told | {"measured": [asdict(line) for line in measured]}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print("\n" + table(measured))
    print("\n" + ", ".join(f"{name} {value}" for name, value in told.items()))


def compare(
    losses: dict[str, Loss], case: Case, threads: int, repeats: int, peaks: dict[str, float]
) -> list[Measured]:
    """All sides, checked against Colfolio and then timed in turn."""
    batch = case.draw()
    differences = {side: difference(loss, losses[OURS], batch) for side, loss in losses.items()}
    times: dict[str, list[float]] = {side: [] for side in losses}
    for _ in range(repeats):
        for side, loss in losses.items():
            begin = time.perf_counter()
            with_gradients(loss, batch)
            times[side].append(1e3 * (time.perf_counter() - begin))
    ours = statistics.median(times[OURS])
    return [
        Measured(
            *(case, threads, side, round(statistics.median(taken), 1), spread(taken)),
            *(round(statistics.median(taken) / ours, 2), differences[side], peaks[side]),
        )
        for side, taken in times.items()
    ]


def difference(loss: Loss, ours: Loss, batch: tuple[Tensor, Tensor]) -> float:
    """The larger difference of both gradients, as a share of their norm; it is checked."""
    expected, *their_gradients = with_gradients(loss, batch)
    found, *our_gradients = with_gradients(ours, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(our_gradients, their_gradients, strict=True)
    worst = max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
    assert worst < GRADIENT_TOLERANCE, f"gradients differ by {worst:.1e} of their norm"
    return worst


def with_gradients(loss: Loss, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The loss, and its gradients for queries and documents."""
    leaves = [side.detach().requires_grad_() for side in batch]
    value = loss(leaves[0], leaves[1])
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def memory_in_a_fresh_process(side: str, case: Case) -> float:
    asked = [side, str(case.rows), str(case.document_tokens)]
    told = subprocess.run(
        [sys.executable, __file__, "--memory-of", *asked],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(told.stdout.split()[-1])


def peak_memory(side: str, case: Case) -> float:
    """MiB that one call adds to what the process holds after a small first call."""
    loss = SIDES[side]()
    with_gradients(loss, Case(2, case.document_tokens).draw())
    batch = case.draw()
    before = kibibytes("VmRSS")
    with_gradients(loss, batch)
    return round((kibibytes("VmHWM") - before) / 1024, 1)


def kibibytes(name: str) -> int:
    """A line of this process's status; `ru_maxrss` would count the memory of who started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def build_ours() -> Loss:
    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        return in_batch(maxsim(packed(queries), packed(documents)))

    return loss


def build_colpali_engine() -> Loss:
    spec = importlib.util.find_spec("colpali_engine")
    assert spec is not None
    # stands in for the package, whose own first lines import every model
    package = ModuleType(spec.name)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[spec.name] = package
    from colpali_engine.loss import ColbertLoss  # noqa: PLC0415

    return ColbertLoss(temperature=1.0, normalize_scores=False)


def build_sentence_transformers(chunk_elements: int | None = None) -> Loss:
    from sentence_transformers.multi_vector_encoder.scoring import colbert_scores  # noqa: PLC0415

    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        return in_batch(colbert_scores(queries, documents[:, None], chunk_elements=chunk_elements))

    return loss


def build_pylate() -> Loss:
    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        mask = torch.ones(documents.shape[:2], dtype=torch.bool)
        similarity = torch.einsum("ash,bth->abst", queries, documents) * mask[None, :, None]
        return in_batch(similarity.max(dim=3).values.sum(dim=2))

    return loss


OURS = "Colfolio"
SIDES: dict[str, Callable[[], Loss]] = {
    OURS: build_ours,
    "colpali-engine": build_colpali_engine,
    "sentence-transformers": build_sentence_transformers,
    "sentence-transformers, best chunks": partial(build_sentence_transformers, FASTEST_CHUNK),
    "PyLate's formula": build_pylate,
}


def in_batch(scores: Tensor) -> Tensor:
    return cross_entropy(scores, torch.arange(len(scores)))


def packed(rows: Tensor) -> MultiVectors:
    return MultiVectors(rows.flatten(0, 1), offsets_of([rows.shape[1]] * len(rows)))


def spread(times: list[float]) -> tuple[float, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return round(tenths[0], 1), round(tenths[-1], 1)


def table(measured: list[Measured]) -> str:
    lines = [
        "| batch | document tokens | threads | | ms | times Colfolio's | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.case.rows} | {each.case.document_tokens} | {each.threads} | {each.side} "
        f"| {each.ms:.0f} | {each.times_ours:.1f} | {each.peak_mib:.0f} |"
        for each in measured
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
