"""Random weights that are equal to the bit on every machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from colfolio.errors import CheckpointError

_BLOCK = 1 << 18  # numbers drawn at once; the block stays in a processor's cache
_WORDS = 3  # of 64 bits, of which a number is made
_MEAN = 12 * 0xFFFF // 2
_VARIANCE = 2**32 - 1
_EVEN_LANES = np.uint64(0x0000FFFF0000FFFF)
_LANE = np.uint64(16)
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_DRAWN = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)
_STD = 0.02  # of `transformers`, where a configuration says nothing


def draw_normal(
    shape: Sequence[int], std: float, seed: int, name: str, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """Numbers that are normal but for their far tails, the same on every machine to the bit.

    A generator of torch draws other numbers with other vector units, and any that takes a logarithm
    or a cosine does so with another mathematical library. So a number here is the sum of twelve
    integers of 16 bits (Irwin-Hall), exact, then multiplied once in float64 and rounded to float32
    and from there to a narrower dtype. Mean and variance are those asked for; the excess kurtosis
    is -6 / (5 * 12) = -0.1, and nothing lies further out than 6 standard deviations.

    The integers come from Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011), keyed by the seed and the name: what one tensor gets does not depend on which others are
    drawn, nor in what order.

    Args:
        std: from `math.sqrt` rather than a power, which machines round differently.
        name: of the tensor; two tensors of one name and seed are drawn alike.
        dtype: any of floating point; float64 keeps the product as it is.

    Raises:
        ValueError: the seed is negative, or the standard deviation negative or not finite.
    """
    if seed < 0:
        raise ValueError(f"a seed is 0 or more, received {seed} for {name}")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"a standard deviation is finite and 0 or more, received {std} for {name}")
    key = hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little"))
    scale = std / math.sqrt(_VARIANCE)
    drawn = torch.empty(tuple(shape), dtype=dtype)
    flat = drawn.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        size = min(_BLOCK, flat.numel() - start)
        numbers = torch.from_numpy(_centred_sums(words, size) * scale)
        is_narrow = dtype != torch.float64
        flat[start : start + size] = numbers.float() if is_narrow else numbers
    return drawn


def draw_weights(backbone: PreTrainedModel, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """First weights of a backbone, which may be on the meta device, by name.

    They are distributed as those of `transformers`: matrices and embeddings normal with the
    `initializer_range` of their tower, a padding token's row 0, biases 0, norms as their class
    makes them.

    Raises:
        CheckpointError: how a parameter begins is not known; it is named.
    """
    drawn: dict[str, Tensor] = {}
    for path, module, std in _with_std(backbone):
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}" if path else name
            if isinstance(module, _DRAWN) and name == "weight":
                drawn[whole] = draw_normal(parameter.shape, std, seed, whole, dtype)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    drawn[whole][module.padding_idx] = 0
            else:
                first = _first_value(module, name, whole)
                drawn[whole] = torch.full(parameter.shape, first, dtype=dtype)
    return drawn


def _with_std(backbone: PreTrainedModel) -> Iterator[tuple[str, nn.Module, float]]:
    """Each module with the standard deviation that the model around it configures."""
    deviations: dict[str, float] = {}
    for path, module in backbone.named_modules():
        around = path.rpartition(".")[0]
        is_model = isinstance(module, PreTrainedModel)
        deviations[path] = _deviation(module.config) if is_model else deviations[around]
        yield path, module, deviations[path]


def _deviation(config: Any) -> float:
    """As `PreTrainedModel._init_weights` finds it."""
    own = config if hasattr(config, "initializer_range") else config.get_text_config()
    return float(getattr(own, "initializer_range", None) or _STD)


def _first_value(module: nn.Module, name: str, whole: str) -> float:
    """What fills a bias or a parameter of a norm at the start."""
    if isinstance(module, _DRAWN) and name == "bias":
        return 0.0
    kind: Any = type(module)
    if "Norm" in kind.__name__:
        with torch.device("cpu"):
            return float(getattr(kind(1), name).detach())
    raise CheckpointError(
        f"{whole}: how a parameter of a {kind.__name__} begins is not known, so no base is made "
        "from scratch; start from published weights"
    )


def _centred_sums(words: np.random.Philox, size: int) -> np.ndarray:
    """The next `size` sums of twelve integers of 16 bits, less their mean: float64 `[size]`."""
    raw = words.random_raw(size * _WORDS)
    lanes = (raw & _EVEN_LANES) + (raw >> _LANE & _EVEN_LANES)  # two sums of 32 bits in a word
    lanes = lanes[0::_WORDS] + lanes[1::_WORDS] + lanes[2::_WORDS]  # [size]
    sums = (lanes & _LOW_HALF) + (lanes >> _HALF)
    return sums.astype(np.float64) - _MEAN
