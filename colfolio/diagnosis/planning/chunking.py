"""How a batch would be cut, what its graphs would hold, and which cut suits a machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from colfolio.diagnosis.planning.fixed_memory import embedding_gradient, rows_of_rank
from colfolio.diagnosis.planning.graph_memory import GraphMemory, Rows, graph_memory
from colfolio.diagnosis.planning.numerics import Numerics
from colfolio.diagnosis.planning.row_sizes import BatchSize, RowSize
from colfolio.models.retriever import Retriever
from colfolio.training.chunks import Side
from colfolio.training.graph_budget import GraphBudget, Held

# Tokens at a time of which a processor is assumed to be half busy: what running fewer chunks twice
# saves is weighed against smaller ones.
_HALF_BUSY = 256


@dataclass(frozen=True, slots=True)
class Chunking:
    """A rank's batch in chunks.

    Args:
        chunk_tokens: of a chunk at most; None: all of a side.
        activation_bytes: that graphs may hold; None: no bound.
        num_chunks: by what their rows are, as `documents`.
        largest: bytes that the largest graph holds.
        kept: bytes of all graphs that stay from the first pass to the second.
        working: bytes beside those at the highest moment.
        share_twice: of the tokens, that run a second time.
    """

    chunk_tokens: int | None
    activation_bytes: int | None
    num_chunks: Mapping[str, int]
    largest: int
    kept: int
    working: int
    share_twice: float

    @property
    def peak(self) -> int:
        """Bytes of graphs and of what works on them."""
        return self.kept + self.working

    @property
    def fits_budget(self) -> bool:
        """Whether no graph is larger than all may be."""
        return self.activation_bytes is None or self.largest <= self.activation_bytes

    @property
    def relative_time(self) -> float:
        """In forward passes of full speed: one, its backward of two, and what runs twice."""
        passes = 3 + self.share_twice
        return passes * (1 + _HALF_BUSY / self.chunk_tokens) if self.chunk_tokens else passes


@dataclass(frozen=True, slots=True)
class _Chunk:
    side: Side
    tokens: int
    memory: GraphMemory


class Chunker:
    """Cuts the heaviest share of a batch as `ExactBatch` does.

    Args:
        retriever: its weights may be on the meta device.
    """

    def __init__(
        self, retriever: Retriever, batch: BatchSize, numerics: Numerics, ranks: int
    ) -> None:
        self._retriever = retriever
        self._numerics = numerics
        queries, documents = rows_of_rank(batch, ranks)
        self._sides: dict[Side, tuple[int, RowSize]] = {
            "documents": (documents, batch.heavy_document),
            "queries": (queries, batch.heavy_query),
        }
        self._longest = batch.largest
        self._known: dict[tuple[int, RowSize], GraphMemory] = {}
        self._after = embedding_gradient(retriever)

    def chunking(self, chunk_tokens: int | None, activation_bytes: int | None) -> Chunking:
        """What these settings come to."""
        chunks = self._chunks(chunk_tokens)
        largest = max(chunk.memory.held for chunk in chunks)
        can_run = activation_bytes is None or largest <= activation_bytes
        kept, dropped = _kept(chunks, activation_bytes) if can_run else ([], chunks)
        kept_bytes = sum(chunk.memory.held for chunk in kept)
        working = [max(chunk.memory.peak, self._after) for chunk in dropped]
        working += [max(each.memory.peak, self._after) - each.memory.held for each in kept]
        tokens = sum(chunk.tokens for chunk in chunks)
        return Chunking(
            chunk_tokens,
            activation_bytes,
            Counter(chunk.side for chunk in chunks),
            largest,
            kept_bytes,
            max(working),
            sum(chunk.tokens for chunk in dropped) / tokens,
        )

    def sizes(self) -> list[int]:
        """Tokens of the chunks that are worth a try, rising."""
        documents, row = self._sides["documents"]
        counts = sorted({-(-documents // part) for part in range(1, documents + 1)})
        return [max(rows * row.tokens, self._longest) for rows in counts]

    def beside(self, chunk_tokens: int) -> int:
        """The most that a chunk takes beyond what its graph holds."""
        chunks = self._chunks(chunk_tokens)
        return max(max(each.memory.peak, self._after) - each.memory.held for each in chunks)

    def _chunks(self, chunk_tokens: int | None) -> list[_Chunk]:
        """Of both sides, in the order in which they run."""
        chunks = []
        for side, (count, row) in self._sides.items():
            rows = count if chunk_tokens is None else max(1, chunk_tokens // row.tokens)
            whole, rest = divmod(count, rows)
            chunks += [
                _Chunk(side, size * row.tokens, self._memory(size, row))
                for size in [rows] * whole + [rest] * bool(rest)
            ]
        return chunks

    def _memory(self, rows: int, row: RowSize) -> GraphMemory:
        if (rows, row) not in self._known:
            alike = rows_alike(rows, row)
            self._known[rows, row] = graph_memory(self._retriever, alike, self._numerics)
        return self._known[rows, row]


def advised_cuts(chunkers: Sequence[Chunker], rooms: Sequence[int]) -> list[Chunking] | None:
    """The cut that takes least time and fits, as it comes out in each phase of a run.

    None: not even a single row fits.

    Args:
        chunkers: of the phases, which differ in what trains alone.
        rooms: bytes that each phase has for it.
    """
    both = list(zip(chunkers, rooms, strict=True))
    found: list[list[Chunking]] = []
    for tokens in chunkers[0].sizes():
        budget = min(room - chunker.beside(tokens) for chunker, room in both)
        if max(chunker.chunking(tokens, None).largest for chunker in chunkers) > budget:
            break
        cuts = [chunker.chunking(tokens, budget) for chunker in chunkers]
        if all(cut.peak <= room for cut, room in zip(cuts, rooms, strict=True)):
            found.append(cuts)
    return min(found, key=lambda cuts: sum(cut.relative_time for cut in cuts), default=None)


def rows_alike(count: int, row: RowSize) -> Rows:
    """So many rows of one size."""
    patches = [row.patches // row.steps] * row.steps * count if row.patches else ()
    return Rows([row.tokens] * count, patches, row.answers * count)


def _kept(
    chunks: Sequence[_Chunk], activation_bytes: int | None
) -> tuple[list[_Chunk], list[_Chunk]]:
    """Chunks whose graph stays, and those that run twice, once what a token costs is known."""
    if activation_bytes is None:
        return list(chunks), []
    budget = GraphBudget(nn.Module(), activation_bytes / 2**20)
    kept: list[_Chunk] = []
    for _batch in range(2):
        budget.begin()
        to_come = sum(chunk.tokens for chunk in chunks)
        kept = []
        for chunk in chunks:
            to_come -= chunk.tokens
            held, is_kept = None, budget.has_room(chunk.side, chunk.tokens, to_come)
            if is_kept:
                held = Held(chunk.memory.held)
                budget.check(chunk.side, chunk.tokens, held)
                is_kept = budget.fits(held, to_come)
            budget.count(chunk.side, chunk.tokens, held, is_kept=is_kept)
            kept += [chunk] * is_kept
    return kept, [chunk for chunk in chunks if not any(chunk is each for each in kept)]
