"""What graphs hold for backward, measured; and which of a batch's chunks may keep theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from colfolio.batch import Packed
from colfolio.errors import RecipeError

_MIB = 2**20


@dataclass(slots=True)
class Held:
    """Bytes that a graph holds for backward, beside the weights; known when it is built."""

    num_bytes: int = 0


class GraphBudget:
    """Says before each chunk of a batch whether its graph may be built and kept.

    What a token costs is measured on the graphs that are built, for each side of its own, because
    a token of a page carries its share of the vision tower. Nothing is known before the first
    graph, so the first chunk is always tried.

    Args:
        model: its weights are in memory anyway, and cost a graph nothing.
        activation_mb: mebibytes that graphs may hold together, the one of a chunk that is run a
            second time included. None: no bound, and nothing is measured.
    """

    def __init__(self, model: nn.Module, activation_mb: float | None) -> None:
        self._model = model
        self._budget = None if activation_mb is None else int(activation_mb * _MIB)
        self._a_token: dict[str, float] = {}  # bytes of graph, the most that was measured
        self.begin()

    def begin(self) -> None:
        """A new batch: nothing is kept yet."""
        self._kept = 0
        self._largest = 0
        self._is_any_dropped = False

    def has_room(self, side: str, tokens: int, tokens_to_come: int) -> bool:
        """Whether to build the graph of the next chunk.

        Args:
            side: "documents" or "queries".
            tokens: of the chunk.
            tokens_to_come: of all chunks of the batch behind it, of either side.
        """
        if self._budget is None or not self._a_token:
            return True
        needed = int(self._a_token.get(side, max(self._a_token.values())) * tokens)
        fits = self._fits(needed, tokens_to_come)
        self._largest = max(self._largest, needed)
        self._is_any_dropped |= not fits
        return fits

    def check(self, side: str, tokens: int, held: Held) -> None:
        """Note what a graph that was built holds.

        Raises:
            RecipeError: it holds more than the budget by itself.
        """
        if self._budget is None:
            return
        self._a_token[side] = max(self._a_token.get(side, 0.0), held.num_bytes / max(tokens, 1))
        if held.num_bytes > self._budget:
            raise RecipeError(
                f"a chunk of {tokens} tokens of {side} holds {held.num_bytes / _MIB:.1f} MiB for "
                f"backward, but activation_mb is {self._budget / _MIB:.1f}: lower chunk_tokens to "
                f"about {int(tokens * self._budget / held.num_bytes)}, raise activation_mb, or "
                "switch on gradient_checkpointing; if the chunk is one long row, shrink its pages"
            )

    def keep(self, side: str, tokens: int, tokens_to_come: int, held: Held) -> bool:
        """Whether a graph that was built may stay; its size is counted if so.

        Raises:
            RecipeError: it holds more than the budget by itself.
        """
        if self._budget is None:
            return True
        self.check(side, tokens, held)
        fits = self._fits(held.num_bytes, tokens_to_come)
        self._largest = max(self._largest, held.num_bytes)
        self._is_any_dropped |= not fits
        self._kept += held.num_bytes if fits else 0
        return fits

    def _fits(self, needed: int, tokens_to_come: int) -> bool:
        """Whether all that is still to come fits, or this beside a chunk that is built again."""
        assert self._budget is not None
        with_this = self._kept + needed
        with_all = with_this + max(self._a_token.values()) * tokens_to_come
        if not self._is_any_dropped and with_all <= self._budget:
            return True
        return with_this + max(self._largest, needed) <= self._budget

    def take(self, num_bytes: int) -> bool:
        """Whether so many bytes beside the graphs may be kept; they are counted if so."""
        if self._budget is None:
            return True
        fits = self._kept + num_bytes + self._largest <= self._budget
        self._kept += num_bytes if fits else 0
        return fits

    @contextmanager
    def measuring(self, inputs: Packed) -> Iterator[Held]:
        """Measures the graph that is built inside of a chunk; with no budget, nothing.

        The inputs themselves are in memory as long as their batch is, and are not counted.
        """
        held = Held()
        if self._budget is None:
            yield held
            return
        with _held_by_graph(self._model, inputs) as storages:
            yield held
        # only now: the weights of a sharded model were put together for the run, and are gone again
        held.num_bytes = sum(storage.nbytes() for storage in storages.values())


@contextmanager
def _held_by_graph(model: nn.Module, inputs: Packed) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Every storage that a graph built inside holds, by address; weights and inputs aside.

    A layer that is computed again in backward hands its input over past the hooks of autograd, so
    its input is counted as it comes in.
    """
    weights = [weight for weight in model.parameters() if not isinstance(weight, DTensor)]
    there_anyway = [*weights, inputs.patches, inputs.position_ids, inputs.token_ids]
    known = {tensor.untyped_storage().data_ptr() for tensor in there_anyway}
    held: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage

    def pack(tensor: Tensor) -> Tensor:
        count(tensor)
        return tensor.detach()  # the tensor itself would hold its own graph in a circle

    def count_inputs(_layer: nn.Module, states: tuple[Tensor, ...]) -> None:
        for tensor in states:
            count(tensor)

    with ExitStack() as stack:
        for layer in _recomputed_layers(model):
            stack.callback(layer.register_forward_pre_hook(count_inputs).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        yield held


def _recomputed_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module
