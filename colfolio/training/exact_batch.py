"""The gradient of a whole batch, from chunks that fit into memory: exact, not an approximation.

Vectors first, chunk by chunk; then one loss over all of them, which gives the gradient of every
vector; then each chunk again, with the gradient of its vectors put in (gradient caching,
arXiv:2101.06983). A chunk whose graph fits the budget keeps it and is not run again, so that a
batch that fits costs one pass. Neither chunk size nor budget changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from colfolio.batch import ContrastiveBatch, MultiVectors, Packed
from colfolio.config import Settings
from colfolio.maxsim import maxsim
from colfolio.training.losses import ScoreSummary

Encode = Callable[[Packed], MultiVectors]


class MemorySettings(Settings):
    """How much of a batch is in memory at a time; none of it changes the gradient.

    Args:
        chunk_tokens: tokens of queries or of documents that go through the model together; a row
            that has more goes alone. None: all of them.
        graph_mb: mebibytes of activations that may be kept for backward. A chunk beyond that is
            run a second time. None: all are kept, and nothing is run twice.
    """

    chunk_tokens: int | None = Field(default=None, ge=1)
    graph_mb: float | None = Field(default=None, ge=0)


@dataclass(slots=True)
class _Chunk:
    """Rows of one side of a batch; `vectors` hold a graph if it was kept."""

    packed: Packed
    seed: int
    vectors: Tensor

    @property
    def num_vectors(self) -> int:
        return len(self.packed.token_ids)


def exact_backward(
    encode: Encode,
    weights: Iterable[nn.Parameter],
    batch: ContrastiveBatch,
    loss: Callable[[Float[Tensor, "queries documents"]], ScoreSummary],
    settings: MemorySettings,
    seed: int,
) -> ScoreSummary:
    """Add the gradient of a batch's loss to the parameters; returns what the loss says.

    Args:
        encode: packed inputs to vectors, by a model.
        weights: the model's parameters, which graphs hold without using memory of their own.
        batch: on the model's device.
        loss: of scores float32 `[queries, documents]`.
        seed: what the model draws at random (dropout) depends on it and on the chunk alone, so
            that a chunk run twice draws the same.
    """
    meter = _GraphMeter(weights, settings.graph_mb)
    query_chunks = _first_pass(encode, batch.queries, settings, (seed, 0), meter)
    document_chunks = _first_pass(encode, batch.documents, settings, (seed, 1), meter)
    queries = _together(query_chunks, batch.queries)
    documents = _together(document_chunks, batch.documents)
    summary = loss(maxsim(queries, documents))
    summary.loss.backward()
    waiting = [*_gradients(queries, query_chunks), *_gradients(documents, document_chunks)]
    # kept graphs first: what they hold is free when the others are built again
    for chunk, gradient in sorted(waiting, key=lambda pair: not pair[0].vectors.requires_grad):
        _second_pass(encode, chunk, gradient)
    return summary


def _chunks(packed: Packed, chunk_tokens: int | None) -> Iterator[Packed]:
    """Runs of rows of at most so many tokens, or of one row that has more."""
    if chunk_tokens is None:
        yield packed
        return
    begin, offsets = 0, packed.offsets.tolist()
    for row in range(1, len(packed) + 1):
        if row == len(packed) or offsets[row + 1] - offsets[begin] > chunk_tokens:
            yield packed.rows(begin, row)
            begin = row


def _first_pass(
    encode: Encode,
    packed: Packed,
    settings: MemorySettings,
    seed: tuple[int, int],
    meter: _GraphMeter,
) -> list[_Chunk]:
    """The vectors of one side, chunk by chunk."""
    chunks = []
    for number, rows in enumerate(_chunks(packed, settings.chunk_tokens)):
        drawn = int(np.random.default_rng((*seed, number)).integers(2**63))
        chunk = _Chunk(rows, drawn, torch.empty(0))
        with meter.measuring(chunk) as with_graph:
            chunk.vectors = _vectors(encode, chunk, with_graph=with_graph)
        chunks.append(chunk)
    return chunks


def _together(chunks: list[_Chunk], packed: Packed) -> MultiVectors:
    """All vectors of a side as the loss sees them: a leaf, whose gradient is asked for."""
    vectors = torch.cat([chunk.vectors.detach() for chunk in chunks])
    return MultiVectors(vectors.requires_grad_(), packed.offsets)


def _second_pass(encode: Encode, chunk: _Chunk, gradient: Tensor) -> None:
    vectors = chunk.vectors
    if not vectors.requires_grad:
        vectors = _vectors(encode, chunk, with_graph=True)
    chunk.vectors = torch.empty(0)
    vectors.backward(gradient)


def _vectors(encode: Encode, chunk: _Chunk, *, with_graph: bool) -> Tensor:
    """Vectors of a chunk; run again, the model draws the same random numbers."""
    device = chunk.packed.token_ids.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.set_grad_enabled(with_graph),
    ):
        torch.manual_seed(chunk.seed)
        return encode(chunk.packed).vectors


def _gradients(side: MultiVectors, chunks: list[_Chunk]) -> Iterator[tuple[_Chunk, Tensor]]:
    """Each chunk with the gradient of its vectors."""
    gradient = side.vectors.grad
    assert gradient is not None, "the loss does not depend on this side's vectors"
    return zip(chunks, gradient.split([chunk.num_vectors for chunk in chunks]), strict=True)


class _GraphMeter:
    """Measures what kept graphs hold for backward, and says which chunk may keep its own."""

    def __init__(self, weights: Iterable[nn.Parameter], graph_mb: float | None) -> None:
        self._budget = None if graph_mb is None else int(graph_mb * 2**20)
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept = 0
        self._a_vector = 0.0  # bytes of graph, the most that was measured

    @contextmanager
    def measuring(self, chunk: _Chunk) -> Iterator[bool]:
        """Whether to build the graph of a chunk; if it turns out too large, it is dropped."""
        if self._budget is None:
            yield True
            return
        if self._kept + self._a_vector * chunk.num_vectors > self._budget or self._budget == 0:
            yield False
            return
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would hold its own graph in a circle

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield True
        size = sum(held.values())
        self._a_vector = max(self._a_vector, size / max(chunk.num_vectors, 1))
        if self._kept + size > self._budget:
            chunk.vectors = chunk.vectors.detach()
        else:
            self._kept += size
