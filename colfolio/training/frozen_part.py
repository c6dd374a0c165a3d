"""What decides the output of frozen layers, as one fingerprint: change any, and it is another.

Weights are hashed once and then watched. Before each step `FrozenWeights.fingerprint` asks torch's
own counters whether a tensor was written to or replaced, and hashes again if so. Writing through
`.data` or a numpy view is not counted by torch: where such code may run (weight averaging, some
optimisers), hash by content, once an epoch or after that code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

import PIL
import torch
import transformers
from torch import Tensor, nn

from colfolio.models.contract import hash_weights


@dataclass(frozen=True, slots=True)
class FrozenPart:
    """All that decides what frozen layers make of a row.

    Args:
        weights: `FrozenWeights.fingerprint()` of every module that runs.
        border: where their output is taken.
        config: of the model, as JSON.
        precision: of the arithmetic, settled: never `auto`.
        attention: the implementation that runs, settled likewise.
        device: on which they run.
    """

    weights: str
    border: str
    config: str
    precision: str
    attention: str
    device: str

    def fingerprint(self) -> str:
        """SHA-256 of all fields, of the libraries' versions, and of how float32 is multiplied."""
        values = asdict(self) | {
            "colfolio": version("colfolio"),
            "pillow": PIL.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "float32_matmul": torch.get_float32_matmul_precision(),
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Mark:
    """How a tensor was when it was hashed.

    `tensor` and `memory` are held so that neither the object nor its address can be used again by
    another; holding `memory` costs nothing while the tensor still lies there.
    """

    tensor: Tensor
    memory: Tensor
    version: int

    def fits(self, tensor: Tensor, memory: Tensor) -> bool:
        return (
            tensor is self.tensor
            and memory._version == self.version
            and memory.data_ptr() == self.memory.data_ptr()
            and memory.dtype == self.memory.dtype
            and memory.shape == self.memory.shape
            and memory.stride() == self.memory.stride()
        )


class FrozenWeights:
    """The weights and buffers of modules that do not train, hashed once and then watched.

    Args:
        modules: all that run below the border. They are asked for their tensors anew each time, so
            that one that was replaced is seen.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._marks: dict[str, _Mark] = {}
        self._fingerprint: str | None = None

    @torch.no_grad()
    def fingerprint(self, *, by_content: bool = False) -> str:
        """SHA-256 of the weights as they are now; hashed only if torch says that one changed.

        Under FSDP a rank hashes its own shards, so join the fingerprints of all ranks into one.

        Args:
            by_content: hash in any case, whatever torch says.

        Raises:
            ValueError: a weight trains, so that its output must not be kept, or was made under
                `torch.inference_mode`, so that torch does not count its changes.
        """
        found = dict(self._tensors())
        memories = {name: _memory(name, tensor) for name, tensor in found.items()}
        if by_content or self._fingerprint is None or not self._is_same(found, memories):
            # marked first: what is written while it is hashed is then seen the next time
            self._marks = {
                name: _Mark(tensor, memories[name].detach(), memories[name]._version)
                for name, tensor in found.items()
            }
            self._fingerprint = hash_weights(memories)
        return self._fingerprint

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name; one that is shared stands under each of its names."""
        for number, module in enumerate(self._modules):
            prefix = str(number)
            yield from module.named_parameters(prefix, remove_duplicate=False)
            yield from module.named_buffers(prefix, remove_duplicate=False)

    def _is_same(self, found: dict[str, Tensor], memories: dict[str, Tensor]) -> bool:
        return found.keys() == self._marks.keys() and all(
            self._marks[name].fits(tensor, memories[name]) for name, tensor in found.items()
        )


def _memory(name: str, tensor: Tensor) -> Tensor:
    """The plain tensor behind a weight: itself, or this rank's shard of it."""
    if tensor.requires_grad:
        raise ValueError(
            f"weight {name} trains, so what it makes of a row changes with every step and must not "
            "be kept; drop the cache and take a border below it"
        )
    if tensor.is_inference():
        raise ValueError(
            f"weight {name} was made under torch.inference_mode, where torch does not count "
            "changes; load the model outside of it"
        )
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
