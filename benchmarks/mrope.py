"""M-RoPE beside `transformers`: positions against `get_rope_index`, rotation against its formula.

    python benchmarks/mrope.py [--threads 1] [--repeats 41]

Both sides run in turn, in one process, on the same batch, and must agree before they are timed.
Positions are of padded batches with an attention mask, as a processor of `transformers` gives them:
`padded_position_ids` and `Qwen2VLModel.get_rope_index`. "First time" is with an empty cache of
grids. Rotation is of queries and keys of Qwen2-VL-2B (12 and 2 heads of 128, float32), with the
gradient: `rotate` and `apply_rotary_pos_emb`; "with angles" adds the cosines and sines of the
positions: `cos_sin` and `Qwen2VLRotaryEmbedding`. Writes `benchmarks/results/mrope.json` and prints
the tables that stand in `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from demo import commit, machine
from torch import Tensor
from transformers import Qwen2VLModel, Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb,
)

from colfolio.mrope import (
    IMAGE,
    TEXT,
    VIDEO,
    cos_sin,
    forget_grids,
    inverse_frequencies,
    padded_position_ids,
    rotate,
    scheme_of,
)

RESULTS = Path(__file__).parent / "results" / "mrope.json"
NUM_BEFORE, NUM_BEHIND = 4, 12  # tokens of text around the image, as in ColQwen2's template
QUERY_HEADS, KEY_HEADS, HEAD_SIZE, SECTIONS = 12, 2, 128, (16, 24, 24)
# grids of 768 tokens, in patches: documents of one batch have them in turn
PAGES = [(1, 2 * rows, 2 * 768 // rows) for rows in (24, 32, 48, 16, 12, 64, 8, 96)]
# 64 frames enter two by two: 32 x 18 x 32 tokens
CASES = {
    "8 documents of 768 visual tokens": (IMAGE, PAGES),
    "64 documents of 768 visual tokens": (IMAGE, PAGES * 8),
    "one video of 64 frames, 18,432 visual tokens": (VIDEO, [(32, 36, 64)]),
}


class PublishedPositions:
    """The library's own code for positions, without a model around it."""

    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    get_rope_index = Qwen2VLModel.get_rope_index
    get_vision_position_ids = Qwen2VLModel.get_vision_position_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of one grid, as a processor gives them."""

    types: Tensor
    mask: Tensor
    grids: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Compared:
    """Median milliseconds of both, and how they spread: the tenth and the ninetieth percentile."""

    case: str
    what: str
    theirs_ms: float
    ours_ms: float
    ratio: float
    theirs_spread: tuple[float, float]
    ours_spread: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compared = []
    for case, (kind, grids) in CASES.items():
        batch = documents(kind, grids)
        compared += compare_positions(case, batch, options.repeats)
        compared += compare_rotation(case, batch, max(5, options.repeats // 4))
    told = {
        "machine": machine(),
        "transformers": transformers.__version__,
        "commit": commit(),
        "threads": options.threads,
        "repeats": options.repeats,
    }
    text = json.dumps(told | {"compared": [asdict(line) for line in compared]}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(table(compared))
    print("\n" + ", ".join(f"{name} {value}" for name, value in told.items()))


def documents(kind: int, grids: list[tuple[int, int, int]]) -> Batch:
    """A row for each grid, all of one length: text, one image or clip, and text."""
    num_visual = math.prod(grids[0]) // 4
    row = [TEXT] * NUM_BEFORE + [kind] * num_visual + [TEXT] * NUM_BEHIND
    types = torch.tensor([row] * len(grids))
    name = "image_grid_thw" if kind == IMAGE else "video_grid_thw"
    return Batch(types, torch.ones_like(types), {name: torch.tensor(grids)})


def compare_positions(case: str, batch: Batch, repeats: int) -> list[Compared]:
    """Position ids with the grids' coordinates kept from earlier batches, and without."""
    published = PublishedPositions()

    def theirs() -> Tensor:
        return published.get_rope_index(
            batch.types, batch.types, attention_mask=batch.mask, **batch.grids
        )[0]

    def ours() -> Tensor:
        return padded_position_ids(batch.types, batch.mask, **batch.grids)

    def first_time() -> Tensor:
        forget_grids()
        return ours()

    assert torch.equal(theirs(), ours())
    kept = timed(theirs, ours, repeats)
    cold = timed(theirs, first_time, repeats)
    return [
        line(case, "positions", *kept),
        line(case, "positions, first time", *cold),
    ]


def compare_rotation(case: str, batch: Batch, repeats: int) -> list[Compared]:
    """Queries and keys turned, and their gradients."""
    positions = padded_position_ids(batch.types, batch.mask, **batch.grids)
    rows, length = batch.types.shape
    states = [torch.randn(rows, heads, length, HEAD_SIZE) for heads in (QUERY_HEADS, KEY_HEADS)]
    weights = [torch.randn_like(state) for state in states]
    published = published_rotary()
    inv_freq, axes = inverse_frequencies(HEAD_SIZE), scheme_of("qwen2_vl").axes(SECTIONS)
    full, half = published(states[0], positions), cos_sin(positions, inv_freq, axes)

    def theirs() -> list[Tensor]:
        return with_gradient(apply_rotary_pos_emb, states, weights, full)

    def ours() -> list[Tensor]:
        return with_gradient(rotate, states, weights, half)

    def theirs_with_angles() -> list[Tensor]:
        angles = published(states[0], positions)
        return with_gradient(apply_rotary_pos_emb, states, weights, angles)

    def ours_with_angles() -> list[Tensor]:
        return with_gradient(rotate, states, weights, cos_sin(positions, inv_freq, axes))

    for mine, expected in zip(ours_with_angles(), theirs_with_angles(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-6, rtol=0)
    return [
        line(case, "rotation and gradient", *timed(theirs, ours, repeats)),
        line(
            case,
            "rotation and gradient, with angles",
            *timed(theirs_with_angles, ours_with_angles, repeats),
        ),
    ]


def published_rotary() -> Qwen2VLRotaryEmbedding:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(SECTIONS)}
    return Qwen2VLRotaryEmbedding(
        Qwen2VLTextConfig(
            hidden_size=QUERY_HEADS * HEAD_SIZE,
            num_attention_heads=QUERY_HEADS,
            num_key_value_heads=KEY_HEADS,
            rope_parameters=rope,
        )
    )


def with_gradient(
    apply: Callable[..., Any],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    angles: Sequence[Tensor],
) -> list[Tensor]:
    """Turned queries and keys, and the gradients of both."""
    leaves = [state.detach().requires_grad_() for state in states]
    turned = apply(*leaves, *angles)
    torch.autograd.backward(list(turned), list(weights))
    return [*turned, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def timed(
    theirs: Callable[[], Any], ours: Callable[[], Any], repeats: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each call, one side after the other; two rounds of warm-up are left out."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for call, taken in zip((theirs, ours), times, strict=True):
            begin = time.perf_counter()
            call()
            if turn > 1:
                taken.append(1e3 * (time.perf_counter() - begin))
    return times


def line(case: str, what: str, theirs: list[float], ours: list[float]) -> Compared:
    their_median, our_median = statistics.median(theirs), statistics.median(ours)
    return Compared(
        *(case, what, round(their_median, 3), round(our_median, 3)),
        *(round(their_median / our_median, 2), spread(theirs), spread(ours)),
    )


def spread(times: list[float]) -> tuple[float, float]:
    tenths = statistics.quantiles(times, n=10)
    return round(tenths[0], 3), round(tenths[-1], 3)


def table(compared: list[Compared]) -> str:
    lines = ["| batch | what | transformers, ms | Colfolio, ms | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {each.case} | {each.what} | {each.theirs_ms:.2f} | {each.ours_ms:.2f} "
        f"| {each.ratio:.1f} |"
        for each in compared
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
