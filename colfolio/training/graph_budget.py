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
    """What a graph holds for backward, beside weights and inputs; known when it is built.

    Args:
        num_bytes: all of it.
        shared: of these, copies of weights in half precision, which all graphs of a batch share.
    """

    num_bytes: int = 0
    shared: int = 0

    @property
    def own(self) -> int:
        """Bytes that no other graph holds."""
        return self.num_bytes - self.shared


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
        self._shared = 0
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
        return self._budget is None or self._fits(self._expected(side, tokens), tokens_to_come)

    def check(self, side: str, tokens: int, held: Held) -> None:
        """Note what the graph of a chunk that was built holds.

        Raises:
            RecipeError: it holds more than the budget by itself.
        """
        if self._budget is None:
            return
        self._a_token[side] = max(self._a_token.get(side, 0.0), held.own / max(tokens, 1))
        self._shared = max(self._shared, held.shared)
        if held.num_bytes > self._budget:
            raise RecipeError(
                f"a chunk of {tokens} tokens of {side} holds {held.num_bytes / _MIB:.3g} MiB for "
                f"backward, but activation_mb is {self._budget / _MIB:.3g}: raise it to "
                f"{held.num_bytes / _MIB * 1.05:.3g} or more, switch on gradient_checkpointing, "
                "or, if the chunk is more than one row, lower chunk_tokens"
            )

    def fits(self, held: Held, tokens_to_come: int) -> bool:
        """Whether a graph that was built may stay."""
        return self._budget is None or self._fits(held.own, tokens_to_come)

    def count(self, side: str, tokens: int, held: Held | None, *, is_kept: bool) -> None:
        """Note whether a chunk's graph stays.

        Args:
            held: what it holds; None if it was not built.
        """
        own = self._expected(side, tokens) if held is None else held.own
        self._largest = max(self._largest, own)
        self._is_any_dropped |= not is_kept
        self._kept += own if is_kept else 0

    def has_space(self, num_bytes: int) -> bool:
        """Whether so many bytes beside the graphs may be kept."""
        if self._budget is None:
            return True
        return self._kept + num_bytes + self._largest + self._shared <= self._budget

    def hold(self, num_bytes: int) -> None:
        """Note bytes that are kept beside the graphs."""
        self._kept += num_bytes

    def _expected(self, side: str, tokens: int) -> int:
        """Bytes that the graph of a chunk will hold by itself."""
        most = max(self._a_token.values(), default=0.0)
        return int(self._a_token.get(side, most) * tokens)

    def _fits(self, own: int, tokens_to_come: int) -> bool:
        """Whether all that is still to come fits, or this beside a chunk that is built again."""
        assert self._budget is not None
        with_this = self._kept + own + self._shared
        with_all = with_this + max(self._a_token.values(), default=0.0) * tokens_to_come
        if not self._is_any_dropped and with_all <= self._budget:
            return True
        return with_this + max(self._largest, own) <= self._budget

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
        held.num_bytes = sum(storage.nbytes() for storage, _ in storages.values())
        held.shared = sum(storage.nbytes() for storage, is_shared in storages.values() if is_shared)


@contextmanager
def _held_by_graph(
    model: nn.Module, inputs: Packed
) -> Iterator[dict[int, tuple[torch.UntypedStorage, bool]]]:
    """Every storage that a graph built inside holds, by address; weights and inputs aside.

    Beside each stands whether it is a copy of a weight, which other graphs hold as well.

    A layer that is computed again in backward hands its input over past the hooks of autograd, so
    its input is counted as it comes in.
    """
    weights = [weight for weight in model.parameters() if not isinstance(weight, DTensor)]
    there_anyway = [*weights, inputs.patches, inputs.position_ids, inputs.token_ids]
    known = {tensor.untyped_storage().data_ptr() for tensor in there_anyway}
    held: dict[int, tuple[torch.UntypedStorage, bool]] = {}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage, _is_cast_weight(tensor)

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


def _is_cast_weight(tensor: Tensor) -> bool:
    """Whether autocast made a tensor of a weight that trains, and keeps it for the next use."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        if node.name() not in ("ToCopyBackward0", "TBackward0"):
            return False
        node = node.next_functions[0][0]
        if node is not None and node.name() == "torch::autograd::AccumulateGrad":
            return True
    return False


def _recomputed_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module
