"""The objective `generation`: the mean loss of all answer tokens of a step, in chunks and exactly.

The loss is a sum over tokens, divided by how many of them all batches and ranks of the step have
together. So each chunk runs once, forward and backward, and adds its part; neither chunk size nor
accumulation nor the number of ranks changes the gradient.

Letters: A answer tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import UNLABELLED, TextBatch
from colfolio.distributed import World
from colfolio.models.encoding import evaluating
from colfolio.models.generator import Generator
from colfolio.models.precision import Precision, autocast
from colfolio.training.chunks import row_runs
from colfolio.training.dropout import RowDropouts, dropout_keys
from colfolio.training.exact_batch import MemorySettings
from colfolio.training.feature_cache import FeatureCache
from colfolio.training.frozen_states import FrozenStates, row_digests
from colfolio.training.graph_budget import GraphBudget

_SIDE = "conversations"


@dataclass(frozen=True, slots=True)
class TextSummary:
    """What the answers of one step say; every field is a tensor of no dimensions, on the device.

    Args:
        loss: mean over all answer tokens, in nats.
        chance: the loss of a guess that knows nothing, the logarithm of the vocabulary's size.
        accuracy: share of the answer tokens whose logit is strictly above all others.
        answer_tokens: number of tokens that were predicted.
        tokens: number of all tokens, what is seen and asked included.
    """

    loss: Float[Tensor, ""]
    chance: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    answer_tokens: Float[Tensor, ""]
    tokens: Float[Tensor, ""]


class ExactText:
    """Adds the gradient of the mean loss of conversations to the parameters of a generator.

    Args:
        generator: the model, on its device.
        settings: chunk size, and budget of a chunk.
        precision: of the model's arithmetic; the loss is float32 at least.
        world: the ranks that share each batch.
        is_sharded: the model is spread over them, so that all must run it equally often.
        cache: for what frozen layers make of each row, across epochs.
        dropouts: of the model, which draw by row. None: it draws from torch's generators.
        kernel: of attention, as part of what decides the cached output.
    """

    def __init__(
        self,
        generator: Generator,
        settings: MemorySettings,
        precision: Precision = "fp32",
        world: World | None = None,
        *,
        is_sharded: bool = False,
        cache: FeatureCache | None = None,
        dropouts: RowDropouts | None = None,
        kernel: str = "",
    ) -> None:
        self._generator = generator
        self._chunk_tokens = settings.chunk_tokens
        self._precision: Precision = precision
        self._world = world or World()
        # with whom to agree on what is run: ranks that hold the whole model need not
        self._partners = self._world if is_sharded else World()
        self._budget = GraphBudget(generator, settings.activation_mb)
        self._dropouts = dropouts
        self._frozen = FrozenStates(generator, precision, kernel, cache, self._partners)

    @property
    def cache(self) -> FeatureCache | None:
        """Where what frozen layers make is kept."""
        return self._frozen.cache

    def backward(
        self,
        batches: Sequence[TextBatch],
        seeds: Sequence[int],
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> TextSummary:
        """Add the gradient of the mean over all answer tokens of some batches and all ranks.

        Of several ranks, each adds its part: the sum over ranks is the gradient.

        Args:
            batches: of this rank; chunks are moved to the model's device one by one.
            seeds: of each batch, for all that the model draws at random.
            scale: of the loss, for a model in half precision.

        Raises:
            RecipeError: a chunk holds more for backward than the budget.
        """
        everyone = self._world.gather_counts(sum(batch.num_labels for batch in batches))
        total = max(sum(everyone), 1)

        def add(loss: Tensor) -> None:
            if loss.requires_grad:
                scale(loss / total).backward()

        return self._summary(zip(batches, seeds, strict=True), add)

    def measure(self, batches: Iterable[TextBatch]) -> TextSummary:
        """Loss and accuracy over batches, nothing dropped and no gradient added."""
        with evaluating(self._generator), torch.no_grad():
            return self._summary(((batch, 0) for batch in batches), None)

    def _summary(
        self,
        batches: Iterable[tuple[TextBatch, int]],
        add: Callable[[Tensor], None] | None,
    ) -> TextSummary:
        """Run all batches of all ranks; each chunk's summed loss is given to `add`."""
        self._frozen.begin()
        weight = self._generator.projection.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        sums = torch.zeros(2, dtype=wide, device=weight.device)  # loss, accurate predictions
        num_labels = num_tokens = 0
        for batch, seed in batches:
            num_labels += batch.num_labels
            num_tokens += len(batch.labels)
            for chunk, replay_seed in self._chunks(batch, seed):
                sums += self._run(chunk, seed, replay_seed, add)
        loss, accurate = self._world.gather_rows(sums[None], "own").sum(0).unbind()
        answers, tokens = (sum(self._world.gather_counts(n)) for n in (num_labels, num_tokens))
        return TextSummary(
            loss / max(answers, 1),
            loss.new_tensor(math.log(self._generator.vocabulary)),
            accurate / max(answers, 1),
            loss.new_tensor(answers),
            loss.new_tensor(tokens),
        )

    def _chunks(self, batch: TextBatch, seed: int) -> list[tuple[TextBatch, int]]:
        """Runs of rows, each with a seed; of ranks that share a model all run equally many."""
        chunks = [batch.rows(*run) for run in row_runs(batch.inputs, self._chunk_tokens)]
        missing = max(self._partners.gather_counts(len(chunks))) - len(chunks)
        chunks += [self._filler()] * missing
        seeds = np.random.default_rng((seed, self._world.rank)).integers(2**63, size=len(chunks))
        return list(zip(chunks, seeds.tolist(), strict=True))

    def _filler(self) -> TextBatch:
        """A chunk without labels, which adds a gradient of zero."""
        side = self._generator.collator.budget.factor
        image = np.zeros((side, side, 3), dtype=np.uint8)
        inputs = self._generator.chat.prompts([image], [""])
        labels = torch.full_like(inputs.token_ids, UNLABELLED)
        return TextBatch(inputs, labels, torch.zeros(1, dtype=torch.int64))

    def _run(
        self, chunk: TextBatch, seed: int, replay_seed: int, add: Callable[[Tensor], None] | None
    ) -> Float[Tensor, "2"]:
        """Loss of a chunk's answer tokens, and how many are predicted rightly."""
        device = self._generator.device
        digests = row_digests(chunk.inputs) if self.cache is not None else None
        is_labelled = chunk.labels != UNLABELLED
        labels = chunk.labels[is_labelled].to(device)  # [A]
        places = is_labelled.nonzero().flatten().to(device)  # [A]
        with self._drawing(chunk, seed, replay_seed):
            below = self._frozen.of(chunk.inputs, digests)
            rows = chunk.inputs.to(device, with_patches=below is None)
            with self._budget.measuring(chunk.inputs) as held:
                logits = self._generator(rows, places, below)  # [A, vocabulary]
                loss = F.cross_entropy(logits, labels, reduction="sum")
        # of two numbers a row: a comparison with all logits takes more memory than they do
        highest = logits.detach().topk(2, dim=1)
        is_above = highest.values[:, 0] > highest.values[:, 1]
        accurate = (is_above & (highest.indices[:, 0] == labels)).sum()
        del logits  # backward has no need of them, and they are as large as what it makes
        if add is not None:
            self._budget.check(_SIDE, len(rows.token_ids), held)
            add(loss)
        return torch.stack([loss.detach(), accurate.to(loss)])

    @contextmanager
    def _drawing(self, chunk: TextBatch, seed: int, replay_seed: int) -> Iterator[None]:
        device = self._generator.device
        with ExitStack() as stack:
            gpus = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(gpus))
            torch.manual_seed(replay_seed)
            if self._dropouts:
                keys = dropout_keys(chunk.inputs, chunk.row_ids, seed, _SIDE)
                stack.enter_context(self._dropouts.of(keys.to(device)))
            stack.enter_context(autocast(self._precision, device))
            yield
