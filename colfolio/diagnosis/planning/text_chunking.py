"""How a batch of conversations would be cut: each chunk runs once, and its graph goes with it."""

from __future__ import annotations

from collections.abc import Sequence

from colfolio.diagnosis.planning.chunking import Chunking, rows_alike
from colfolio.diagnosis.planning.fixed_memory import embedding_gradient
from colfolio.diagnosis.planning.graph_memory import GraphMemory, graph_memory
from colfolio.diagnosis.planning.numerics import Numerics
from colfolio.diagnosis.planning.row_sizes import TextSize
from colfolio.models.generator import Generator
from colfolio.models.generator_files import TiedHead


class TextChunker:
    """Cuts the heaviest share of a batch as `ExactText` does.

    Args:
        generator: its weights may be on the meta device.
    """

    def __init__(
        self, generator: Generator, batch: TextSize, numerics: Numerics, ranks: int
    ) -> None:
        self._generator, self._numerics = generator, numerics
        self._rows, self._row, self._longest = -(-batch.rows // ranks), batch.heavy, batch.largest
        # of a tied head two gradients meet at the end: that of the head, and of what is embedded
        times = 2 if isinstance(generator.projection, TiedHead) else 1
        self._after = times * embedding_gradient(generator)

    def chunking(self, chunk_tokens: int | None, activation_bytes: int | None) -> Chunking:
        """What these settings come to."""
        rows = self._rows
        if chunk_tokens is not None:
            rows = min(rows, max(1, chunk_tokens // self._row.tokens))
        memory = self._memory(rows)
        return Chunking(
            chunk_tokens,
            activation_bytes,
            {"conversations": -(-self._rows // rows)},
            largest=memory.held,
            kept=0,
            working=max(memory.peak, self._after),
            share_twice=0.0,
        )

    def sizes(self) -> list[int]:
        """Tokens of the chunks that are worth a try, rising."""
        counts = sorted({-(-self._rows // part) for part in range(1, self._rows + 1)})
        return [max(rows * self._row.tokens, self._longest) for rows in counts]

    def _memory(self, rows: int) -> GraphMemory:
        return graph_memory(self._generator, rows_alike(rows, self._row), self._numerics)


def advised_text_cuts(
    chunkers: Sequence[TextChunker], rooms: Sequence[int]
) -> list[Chunking] | None:
    """The largest chunk for which there is room, as it comes out in each phase of a run.

    None: not even a single row fits.

    Args:
        chunkers: of the phases, which differ in what trains alone.
        rooms: bytes that each phase has for it.
    """
    for tokens in reversed(chunkers[0].sizes()):
        cuts = [chunker.chunking(tokens, None) for chunker in chunkers]
        budget = min(room - (cut.peak - cut.largest) for cut, room in zip(cuts, rooms, strict=True))
        if max(cut.largest for cut in cuts) <= budget:
            return [chunker.chunking(tokens, budget) for chunker in chunkers]
    return None
