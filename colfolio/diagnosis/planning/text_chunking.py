"""How a batch of conversations would be cut: each chunk runs once, and its graph goes with it."""

from __future__ import annotations

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

    def advice(self, room: int) -> Chunking | None:
        """The largest chunk of which so many bytes have room.

        None: not even a single row fits.
        """
        for rows in sorted({-(-self._rows // part) for part in range(1, self._rows + 1)})[::-1]:
            tokens = max(rows * self._row.tokens, self._longest)
            cut = self.chunking(tokens, None)
            if cut.peak <= room:
                return self.chunking(tokens, room - (cut.peak - cut.largest))
        return None

    def _memory(self, rows: int) -> GraphMemory:
        return graph_memory(self._generator, rows_alike(rows, self._row), self._numerics)
