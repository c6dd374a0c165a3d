"""The gradient of a whole batch, from chunks that fit into memory: exact, not an approximation.

Vectors first, chunk by chunk; then one loss over all of them, which gives the gradient of every
vector; then each chunk again, with the gradient of its vectors put in (gradient caching,
arXiv:2101.06983). A chunk whose graph fits the budget keeps it and is not run again, so that a
batch that fits costs one pass. What lies below the lowest trainable layer runs once. Neither chunk
size nor budget nor the number of ranks changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from colfolio.batch import ContrastiveBatch, MultiVectors, offsets_of
from colfolio.config import Settings
from colfolio.distributed import World
from colfolio.maxsim import maxsim
from colfolio.models.border import BorderOutput
from colfolio.models.precision import Precision, autocast
from colfolio.models.retriever import Retriever
from colfolio.training.chunks import Chunk, Side, chunks_of, filler, gradients, leaf
from colfolio.training.dropout import RowDropouts, dropout_keys
from colfolio.training.feature_cache import FeatureCache
from colfolio.training.frozen_states import FrozenStates
from colfolio.training.graph_budget import GraphBudget
from colfolio.training.losses import ScoreSummary

Loss = Callable[[Float[Tensor, "queries documents"]], ScoreSummary]


class MemorySettings(Settings):
    """How much of a batch is in memory at a time; none of it changes the gradient.

    Args:
        chunk_tokens: tokens of queries or of documents that go through the model together; a row
            that has more goes alone. None: all of them.
        activation_mb: mebibytes of activations that may be held for backward. A chunk beyond that
            is run a second time, so one chunk must fit. None: all are held, nothing is run twice.
    """

    chunk_tokens: int | None = Field(default=None, ge=1)
    activation_mb: float | None = Field(default=None, gt=0)


class ExactBatch:
    """Adds the gradient of whole batches to the parameters of a model.

    Args:
        retriever: the model, on its device.
        settings: chunk size and budget.
        precision: of the model's arithmetic; scores and loss are float32 at least.
        world: the ranks that share each batch.
        is_sharded: the model is spread over them, so that all must run it equally often.
        cache: for what frozen layers make of documents, across epochs.
        dropouts: of the model, which draw by row, so that chunks and ranks change no draw. None:
            it draws from torch's generators, which each chunk seeds; its second run draws alike.
        kernel: of attention, as part of what decides the cached output.
    """

    def __init__(
        self,
        retriever: Retriever,
        settings: MemorySettings,
        precision: Precision = "fp32",
        world: World | None = None,
        *,
        is_sharded: bool = False,
        cache: FeatureCache | None = None,
        dropouts: RowDropouts | None = None,
        kernel: str = "",
    ) -> None:
        self._retriever = retriever
        self._chunk_tokens = settings.chunk_tokens
        self._precision: Precision = precision
        self._world = world or World()
        # with whom to agree on what is run: ranks that hold the whole model need not
        self._partners = self._world if is_sharded else World()
        self._budget = GraphBudget(retriever, settings.activation_mb)
        self._dropouts = dropouts
        self._frozen = FrozenStates(retriever, precision, kernel, cache, self._partners)

    @property
    def cache(self) -> FeatureCache | None:
        """Where what frozen layers make is kept; with one, batches should carry digests."""
        return self._frozen.cache

    def backward(
        self,
        batch: ContrastiveBatch,
        loss: Loss,
        seed: int,
        share: float = 1.0,
        scale: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> ScoreSummary:
        """Add `share` times the gradient of a batch's loss; returns what the loss says.

        Of several ranks, each adds its part: the sum over ranks is the gradient.

        Args:
            batch: anywhere; chunks are moved to the model's device one by one.
            loss: of the scores of all ranks' queries and documents.
            seed: of all that the model draws at random.
            share: one over the number of batches of an optimiser step.
            scale: of the vectors' gradients on their way into a model in half precision.

        Raises:
            RecipeError: a chunk holds more for backward than the budget.
        """
        chunks = chunks_of(batch, self._chunk_tokens, seed, self._world.rank)
        self._make_equally_many(chunks)
        projection = self._retriever.projection
        # one context around all chunks: weights are cast once, and all graphs hold the same copies
        with autocast(self._precision, self._retriever.device):
            self._first_pass([*chunks["documents"], *chunks["queries"]])
        documents = leaf(chunks["documents"], batch.documents, projection)
        queries = leaf(chunks["queries"], batch.queries, projection)
        summary = loss(self._scores(queries, documents))
        (summary.loss * share).backward()
        # in the order of the chunks, whichever graphs were kept, so that sums round alike
        for vectors, of_side in ((documents, chunks["documents"]), (queries, chunks["queries"])):
            for chunk, gradient in gradients(vectors, of_side):
                self._second_pass(chunk, scale(gradient))
        return summary

    def _make_equally_many(self, chunks: dict[Side, list[Chunk]]) -> None:
        """Add to each side as many chunks as any rank has that shares this model."""
        for side, own in chunks.items():
            missing = max(self._partners.gather_counts(len(own))) - len(own)
            own += [filler(self._retriever.collator, side) for _ in range(missing)]

    def _scores(self, queries: MultiVectors, documents: MultiVectors) -> Float[Tensor, "Q D"]:
        """Scores of all ranks' queries and documents, the same on every rank."""
        lengths = self._world.gather_rows(documents.lengths, "own")
        vectors = self._world.gather_rows(documents.vectors, "sum")
        own = maxsim(queries, MultiVectors(vectors, offsets_of(lengths)))
        return self._world.gather_rows(own, "own")

    def _first_pass(self, chunks: list[Chunk]) -> None:
        """The vectors of each chunk; with a graph as far as the budget goes."""
        self._budget.begin()
        self._frozen.begin()
        to_come = sum(chunk.num_tokens for chunk in chunks)
        for chunk in chunks:
            to_come -= chunk.num_tokens
            below = self._below(chunk)
            self._run(chunk, below, to_come)
            if not chunk.is_kept:
                chunk.vectors = chunk.vectors.detach()
                size = 0 if below is None else below.states.nbytes
                if self._partners.agree(self._budget.has_space(size)):
                    self._budget.hold(size)
                    chunk.below = below

    def _run(self, chunk: Chunk, below: BorderOutput | None, to_come: int) -> None:
        """Run a chunk for the first time, and settle whether its graph is kept."""
        budget, side, tokens = self._budget, chunk.side, chunk.num_tokens
        held = None
        chunk.is_kept = self._partners.agree(budget.has_room(side, tokens, to_come))
        if chunk.is_kept:
            with budget.measuring(chunk.rows) as held:
                chunk.vectors = self._vectors(chunk, below, with_graph=True)
            budget.check(side, tokens, held)
            chunk.is_kept = self._partners.agree(budget.fits(held, to_come))
        else:
            chunk.vectors = self._vectors(chunk, below, with_graph=False)
        budget.count(side, tokens, held, is_kept=chunk.is_kept)

    def _second_pass(self, chunk: Chunk, gradient: Tensor) -> None:
        vectors = chunk.vectors
        if not chunk.is_kept:
            below = chunk.below or self._below(chunk)
            with self._budget.measuring(chunk.rows) as held:
                vectors = self._vectors(chunk, below, with_graph=True)
            self._budget.check(chunk.side, chunk.num_tokens, held)
        chunk.vectors, chunk.below = torch.empty(0), None
        if vectors.requires_grad:  # else nothing that made them trains
            vectors.backward(gradient)

    def _below(self, chunk: Chunk) -> BorderOutput | None:
        """What the frozen layers make of a chunk, if there are any."""
        with self._drawing(chunk, with_graph=False):
            return self._frozen.of(chunk.rows, chunk.digests)

    def _vectors(self, chunk: Chunk, below: BorderOutput | None, *, with_graph: bool) -> Tensor:
        """Vectors of a chunk; run again, the model draws the same random numbers."""
        rows = chunk.rows.to(self._retriever.device, with_patches=below is None)
        with self._drawing(chunk, with_graph=with_graph), torch.set_grad_enabled(with_graph):
            return self._retriever(rows, below).vectors

    @contextmanager
    def _drawing(self, chunk: Chunk, *, with_graph: bool) -> Iterator[None]:
        device = self._retriever.device
        with ExitStack() as stack:
            gpus = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(gpus))
            torch.manual_seed(chunk.replay_seed)
            if self._dropouts:
                keys = dropout_keys(chunk.rows, chunk.row_ids, chunk.seed, chunk.side)
                stack.enter_context(self._dropouts.of(keys.to(device)))
            # a copy of a weight that was made without a graph would give the weight no gradient
            stack.enter_context(autocast(self._precision, device, keeps_copies=with_graph))
            yield
