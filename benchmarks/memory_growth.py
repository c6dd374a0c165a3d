"""Peak memory of a step as the global batch grows 16-fold while its chunks stay as they are.

    python benchmarks/memory_growth.py [--rows 8 16 32 64 128]

The step and the ragged pages are those of `step.py`; chunks have at most 300 tokens, and two
graphs of such a chunk fit the budget, so almost all chunks run twice, which is the least that a
step can hold. Each size runs in a fresh process, on one thread. Its peak is what it holds at most
during the step beyond what it held before the batch was made: libraries, weights and optimiser
state. Of that,

- *inputs* are the tensors of the batch, which the loader makes: token ids, positions, patches;
- *vectors* are those of the chunks, all of them as the loss sees them, and their gradient;
- *winners* is what MaxSim notes of each query vector and page: which page vector was the best, and
  in backward the order of all of them; the one part that grows with the square of the batch;
- the *rest* should not grow: the graph of a chunk, the gradient of the weights, tiles of MaxSim.

Writes `benchmarks/results/memory_growth.json` and prints the table for `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from demo import commit, machine
from process_memory import peak_bytes, resident_bytes, tell_from_fresh_process
from step_batch import build_model, draw_rows, packed_batch
from step_sides import SMALL

from colfolio.batch import ContrastiveBatch
from colfolio.training.exact_batch import ExactBatch
from colfolio.training.losses import LossSettings, info_nce
from colfolio.training.optim import OptimiserSettings, build_optimiser, optimiser_step

RESULTS = Path(__file__).parent / "results" / "memory_growth.json"
ROWS = (8, 16, 32, 64, 128)
FLOAT, INT64 = 4, 8  # bytes
VECTOR_COPIES = 3  # of chunks, of the loss, and the gradient
# In backward: winner, sorted winner, its place in the order, and its query, int64; the gradient of
# the winning similarity, and the same in that order, float32.
WINNER_BYTES = 4 * INT64 + 2 * FLOAT


@dataclass(frozen=True, slots=True)
class Grown:
    """Bytes that a step holds at most, and what they are."""

    rows: int
    peak: int
    inputs: int
    vectors: int
    winners: int

    @property
    def rest(self) -> int:
        """What nothing else explains."""
        return self.peak - self.inputs - self.vectors - self.winners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--step-of", type=int, metavar="ROWS")
    options = parser.parse_args()
    if options.step_of:
        print(json.dumps(asdict(measure(options.step_of))))
        return
    told = [tell_from_fresh_process(__file__, "--step-of", str(rows)) for rows in options.rows]
    grown = [Grown(**json.loads(line)) for line in told]
    record = {"machine": machine(), "commit": commit(), "bytes": [asdict(each) for each in grown]}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(grown))


def measure(num_rows: int) -> Grown:
    torch.set_num_threads(1)
    model, settings = build_model(), OptimiserSettings()
    optimiser = build_optimiser(model, settings)
    exact = ExactBatch(model, SMALL)

    def step(batch: ContrastiveBatch) -> None:
        exact.backward(
            batch,
            lambda scores: info_nce(scores, batch.positives, batch.ignored, LossSettings()),
            seed=0,
        )
        optimiser_step(model, optimiser, 0.0, settings)

    step(packed_batch(model, draw_rows(is_ragged=True, num_rows=2)))  # makes the optimiser's state
    held = resident_bytes()
    batch = packed_batch(model, draw_rows(is_ragged=True, num_rows=num_rows))
    peak = peak_bytes(lambda: step(batch)) - held
    sides = (batch.queries, batch.documents)
    tensors = [each for side in sides for each in (side.token_ids, side.position_ids, side.patches)]
    num_queries, num_pages = (len(side.token_ids) for side in sides)
    return Grown(
        rows=num_rows,
        peak=peak,
        inputs=sum(tensor.nbytes for tensor in tensors),
        vectors=VECTOR_COPIES * (num_queries + num_pages) * model.dim * FLOAT,
        winners=WINNER_BYTES * num_queries * num_rows,
    )


def table(grown: list[Grown]) -> str:
    lines = [
        "| rows | peak MiB beyond the model | inputs | vectors | winners | rest |",
        "|---|---|---|---|---|---|",
    ]
    for each in grown:
        parts = (each.peak, each.inputs, each.vectors, each.winners, each.rest)
        cells = " | ".join(f"{size / 2**20:.1f}" for size in parts)
        lines.append(f"| {each.rows} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
