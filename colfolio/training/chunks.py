"""A batch cut into chunks of rows, and what is kept of each between the two passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from colfolio.batch import ContrastiveBatch, MultiVectors, Packed
from colfolio.data.collate import Collator
from colfolio.models.border import BorderOutput

Side = Literal["documents", "queries"]
_SIDES: tuple[Side, Side] = ("documents", "queries")


@dataclass(slots=True)
class Chunk:
    """Rows of one side of a batch that go through the model together.

    Args:
        rows: where the batch is; they are moved to the model's device when they are run.
        row_ids: what dropout draws from, beside `seed`.
        seed: of the batch.
        replay_seed: of the chunk, for what draws from torch's generators.
        digests: of each row, for the feature cache; None: not to be cached.
        is_filler: belongs to no batch; its vectors have no part in the loss.

    Attributes:
        is_kept: its graph waits for backward; else it is run a second time.
        vectors: with a graph, if that was kept.
        below: what the frozen layers made, if that was kept.
    """

    side: Side
    rows: Packed
    row_ids: Int64[Tensor, " rows"]
    seed: int
    replay_seed: int
    digests: tuple[bytes, ...] | None = None
    is_filler: bool = False
    is_kept: bool = False
    vectors: Tensor = field(default_factory=lambda: torch.empty(0))
    below: BorderOutput | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens, and so vectors, of all rows."""
        return len(self.rows.token_ids)


def chunks_of(
    batch: ContrastiveBatch, chunk_tokens: int | None, seed: int, rank: int
) -> dict[Side, list[Chunk]]:
    """Runs of rows of each side of at most so many tokens, or of one row that has more.

    Args:
        seed: of the batch, the same on all ranks.
        rank: whose rows these are.
    """
    sides = (
        (batch.documents, batch.document_ids, batch.document_digests),
        (batch.queries, batch.query_ids, None),
    )
    chunks: dict[Side, list[Chunk]] = {}
    generator = np.random.default_rng((seed, rank))
    for side, (packed, ids, digests) in zip(_SIDES, sides, strict=True):
        chunks[side] = [
            Chunk(
                side,
                packed.rows(begin, end),
                ids[begin:end],
                seed,
                int(generator.integers(2**63)),
                None if digests is None else digests[begin:end],
            )
            for begin, end in row_runs(packed, chunk_tokens)
        ]
    return chunks


def filler(collator: Collator, side: Side) -> Chunk:
    """A chunk for a rank that has run out of its own, while others still run theirs."""
    if side == "queries":
        rows = collator.queries(["a"])
    else:
        pixel = collator.budget.factor
        rows = collator.documents([np.zeros((pixel, pixel, 3), dtype=np.uint8)])
    ids = torch.zeros(1, dtype=torch.int64)
    # of a side whose rows have digests, so that it is looked up when they are
    digests = (b"filler",) if side == "documents" else None
    return Chunk(side, rows, ids, 0, 0, digests, is_filler=True)


def leaf(chunks: list[Chunk], packed: Packed, projection: Any) -> MultiVectors:
    """All vectors of a side as the loss sees them: a leaf, whose gradient is asked for.

    Args:
        projection: the last of the model's layers, adapted or not; says what the vectors of no rows
            are like.
    """
    vectors = [chunk.vectors.detach() for chunk in chunks if not chunk.is_filler]
    if not vectors:
        weight = projection.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        vectors = [torch.empty(0, len(weight), dtype=dtype, device=weight.device)]
    return MultiVectors(torch.cat(vectors).requires_grad_(), packed.offsets)


def gradients(side: MultiVectors, chunks: list[Chunk]) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with the gradient of its vectors; of a filler it is zero."""
    gradient = side.vectors.grad
    assert gradient is not None, "the loss does not depend on this side's vectors"
    begin = 0
    for chunk in chunks:
        if chunk.is_filler:
            yield chunk, gradient.new_zeros(chunk.num_tokens, gradient.shape[1])
            continue
        yield chunk, gradient[begin : begin + chunk.num_tokens]
        begin += chunk.num_tokens


def row_runs(packed: Packed, chunk_tokens: int | None) -> Iterator[tuple[int, int]]:
    """First row and end of each chunk."""
    if chunk_tokens is None:
        if len(packed):
            yield 0, len(packed)
        return
    begin, offsets = 0, packed.offsets.tolist()
    for row in range(1, len(packed) + 1):
        if row == len(packed) or offsets[row + 1] - offsets[begin] > chunk_tokens:
            yield begin, row
            begin = row
