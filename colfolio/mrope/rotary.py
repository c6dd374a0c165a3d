"""Rotation by three positions: frequencies, which axis turns which, cos and sin, application.

Each pair of a head's dimensions turns by `position * frequency`. M-RoPE lets every frequency read
one of three positions: temporal (0), height (1) or width (2). Which one is a vector of axes, so a
layout is a function of three section sizes and nothing else. Where all three positions are equal,
as on text, the result is bit for bit that of one-dimensional RoPE (RoFormer, arXiv:2104.09864).

Letters: N tokens, F frequencies (half of the dimensions that turn), D dimensions of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TEMPORAL, HEIGHT, WIDTH = 0, 1, 2


def inverse_frequencies(head_size: int, theta: float = 1_000_000.0) -> Tensor:
    """float32 `[head_size / 2]`: radians a position, falling from 1 (RoFormer, section 3.2.2).

    Args:
        head_size: dimensions that turn, even.
        theta: base of the frequencies; 1,000,000 in Qwen2-VL.

    Raises:
        ValueError: an odd head size, or a base that is no positive number.
    """
    if head_size < 2 or head_size % 2:
        raise ValueError(f"pairs of dimensions turn, so head_size must be even, not {head_size}")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be above 0 and finite, not {theta}")
    return 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)


def sectioned(sections: Sequence[int]) -> Tensor:
    """Axes int64 `[F]` of Qwen2-VL: time turns the highest frequencies, then height, then width.

    >>> sectioned((1, 2, 2)).tolist()
    [0, 1, 1, 2, 2]
    """
    temporal, height, width = _checked(sections)
    return torch.tensor([TEMPORAL] * temporal + [HEIGHT] * height + [WIDTH] * width)


def interleaved(sections: Sequence[int]) -> Tensor:
    """Axes int64 `[F]` of Qwen3-VL: time, height, width in turn, and time where those two end.

    Source: `Qwen3VLTextRotaryEmbedding.recomposition_frequencies` of `transformers`.

    >>> interleaved((3, 2, 2)).tolist()
    [0, 1, 2, 0, 1, 2, 0]

    Raises:
        ValueError: height or width has more frequencies than every third place offers.
    """
    _, height, width = _checked(sections)
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for axis, size in ((HEIGHT, height), (WIDTH, width)):
        places = axes[axis : 3 * size : 3]
        if len(places) != size:
            raise ValueError(
                f"sections {tuple(sections)}: interleaved, axis {axis} can turn at most "
                f"{len(axes[axis::3])} of {len(axes)} frequencies, not {size}"
            )
        places.fill_(axis)
    return axes


def spatial_first(sections: Sequence[int]) -> Tensor:
    """Axes int64 `[F]` of VideoRoPE: height and width alternate, time turns the lowest frequencies.

    Source: arXiv:2502.05173, section 4 (low-frequency temporal allocation).

    >>> spatial_first((2, 2, 2)).tolist()
    [1, 2, 1, 2, 0, 0]

    Raises:
        ValueError: height and width differ, so they cannot alternate.
    """
    temporal, height, width = _checked(sections)
    if height != width:
        raise ValueError(
            f"sections {tuple(sections)}: height and width alternate, so they must be equal"
        )
    return torch.tensor([HEIGHT, WIDTH] * height + [TEMPORAL] * temporal)


def cos_sin(
    position_ids: Tensor, inv_freq: Tensor, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's angles: float32 `[..., F]`, computed in float32.

    Args:
        position_ids: `[3, ...]` for `axes`, or `[...]` without: one-dimensional RoPE.
        inv_freq: float32 `[F]`, of `inverse_frequencies`.
        axes: int64 `[F]`, which of the three positions turns each frequency.

    Raises:
        ValueError: position ids without three rows, or axes that do not fit the frequencies.
    """
    if axes is not None and (position_ids.ndim < 1 or len(position_ids) != 3):
        raise ValueError(
            f"with axes, position_ids must be [3, ...], received {list(position_ids.shape)}; of "
            "four rows, text first, pass the last three"
        )
    if axes is not None and axes.shape != inv_freq.shape:
        raise ValueError(f"{list(axes.shape)} axes do not fit {list(inv_freq.shape)} frequencies")
    inv_freq = inv_freq.to(position_ids.device, torch.float32)
    if axes is None:
        angles = position_ids.float().unsqueeze(-1) * inv_freq  # [..., F]
    else:
        positions = position_ids.float().movedim(0, -1)  # [..., 3]
        angles = positions.index_select(-1, axes.to(positions.device)) * inv_freq
    return angles.cos(), angles.sin()


def rotate(
    queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, heads_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their tokens' angles, in their own dtype.

    The first and second half of a head's leading `2 F` dimensions form the pairs, as in Llama and
    Qwen2; dimensions behind them stay. Backward turns the gradient back by the same angles, so that
    nothing but `cos` and `sin` is kept for it.

    Args:
        queries, keys: `[..., D]` with `D >= 2 F` and a dimension of heads.
        cos, sin: `[..., F]`, as queries without heads, or 1 where they are alike; they get no
            gradient.
        heads_dim: where `queries` and `keys` have their heads: 1 in `[batch, heads, length, D]`
            and in `[N, heads, D]`.

    Raises:
        ValueError: heads smaller than the angles, shapes or dtypes that do not fit, or angles that
            need a gradient.
    """
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin need a gradient; rotate has none for learned frequencies")
    if min(queries.shape[-1], keys.shape[-1]) < 2 * cos.shape[-1]:
        raise ValueError(
            f"{cos.shape[-1]} frequencies turn {2 * cos.shape[-1]} dimensions, but heads have "
            f"{queries.shape[-1]} (queries) and {keys.shape[-1]} (keys)"
        )
    for name, states in (("queries", queries), ("keys", keys)):
        without_heads = [*states.shape[:heads_dim], *states.shape[heads_dim + 1 : -1]]
        pairs = zip(cos.shape[:-1], without_heads, strict=False)
        if (
            cos.shape != sin.shape
            or cos.ndim != len(without_heads) + 1
            or any(angles not in (1, size) for angles, size in pairs)
        ):
            raise ValueError(
                f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit {name} "
                f"{list(states.shape)} with heads in dimension {heads_dim}: they need "
                f"{[*without_heads, cos.shape[-1]]}"
            )
        if not states.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {states.dtype}")
    cos, sin = cos.unsqueeze(heads_dim), sin.unsqueeze(heads_dim)
    return _rotated(queries, cos, sin), _rotated(keys, cos, sin)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula, and trips over ours
        return _turned_plainly(states, cos, sin)
    turned = _Rotation.apply(states, cos, sin)
    assert isinstance(turned, Tensor)
    return turned


class _Rotation(torch.autograd.Function):
    """Rotation whose gradient is the opposite rotation."""

    @staticmethod
    def forward(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _turned(states, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(gradients[0], cos, -sin), None, None


def _turned_plainly(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second, rest = states.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # products and sums are rounded one by one, as in the plain formula: with fused multiply-add it
    # would be faster still, but no longer equal to it bit for bit
    half = cos.shape[-1]
    turned = torch.empty_like(states)
    first, second = states[..., :half], states[..., half : 2 * half]
    torch.mul(first, cos, out=turned[..., :half])
    product = second * sin
    turned[..., :half].sub_(product)
    torch.mul(second, cos, out=turned[..., half : 2 * half])
    torch.mul(first, sin, out=product)
    turned[..., half : 2 * half].add_(product)
    turned[..., 2 * half :] = states[..., 2 * half :]
    return turned


def _checked(sections: Sequence[int]) -> Sequence[int]:
    if len(sections) != 3 or min(sections) < 0 or sum(sections) == 0:
        raise ValueError(
            f"sections are three sizes, temporal, height and width, not {tuple(sections)}"
        )
    return sections
