"""Attention over packed sequences, as one function that `transformers` backbones call.

`transformers` looks its attention up by name. We register one function under two names, because
"flash" in a name changes what the library does around it: a text decoder set to a "flash" name
looks for a kernel on the hub, while a vision tower needs it to hand over the boundaries of all
images in one call instead of looping over them.

Sequences of equal length that stand behind one another go through one batched call, so whoever
packs a batch sorts its rows by length. Short ones of many lengths share one call on a CPU.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None

TEXT_ATTENTION = "colfolio_packed"
VISION_ATTENTION = "colfolio_packed_flash"

# Up to this length a plain product of matrices is faster on a CPU than the fused kernel, whose
# backward is slow for short sequences.
_SHORT = 128


def register_attention() -> None:
    """Make `TEXT_ATTENTION` and `VISION_ATTENTION` known to `transformers`; again does no harm."""
    for name in (TEXT_ATTENTION, VISION_ATTENTION):
        AttentionInterface.register(name, packed_attention_forward)
        AttentionMaskInterface.register(name, _no_mask)


def packed_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads head_dim"], None]:
    """Attention within each packed sequence, in the form that `AttentionInterface` asks for.

    Args:
        module: the calling layer; its `is_causal` says whether a token sees later ones.
        query, key, value: all sequences behind one another; fewer key heads are shared in groups.
        attention_mask: always None: a packed batch has none.
        scaling: factor on the products of query and key; None means `head_dim ** -0.5`.
        dropout: probability of dropping an attention weight.
        kwargs: `cu_seq_lens_q`, int `[sequences + 1]`, where each sequence begins.

    Raises:
        ValueError: no boundaries came with the call, so one sequence would see another.
    """
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is None or attention_mask is not None:
        raise ValueError(
            "packed attention needs cu_seq_lens_q and no mask: run the model through Retriever"
        )
    causal = kwargs.get("is_causal")
    attended = packed_attention(
        query[0].to(value.dtype),
        key[0].to(value.dtype),
        value[0],
        offsets,
        causal=bool(module.is_causal) if causal is None else causal,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    return attended.transpose(0, 1).unsqueeze(0), None


def packed_attention(
    query: Float[Tensor, "heads tokens head_dim"],
    key: Float[Tensor, "kv_heads tokens head_dim"],
    value: Float[Tensor, "kv_heads tokens head_dim"],
    offsets: Tensor,
    *,
    causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> Float[Tensor, "heads tokens head_dim"]:
    """Softmax attention of each token over the tokens of its own sequence.

    Args:
        offsets: int `[sequences + 1]`, where each sequence begins; on the CPU it costs no wait.
        causal: whether a token sees only itself and those before it.
        scaling: factor on the products of query and key.
    """
    group = query.shape[0] // key.shape[0]
    if group > 1:
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    if _has_varlen_kernel(query) and dropout == 0.0:
        return _varlen(query, key, value, offsets, causal, scaling)
    lengths = offsets.diff().tolist()
    if query.device.type == "cpu" and len(set(lengths)) > 1 and max(lengths) <= _SHORT:
        return _together(query, key, value, offsets, causal, scaling, dropout)
    pieces, start = [], 0
    for length, run in groupby(lengths):
        size = len(list(run)) * length
        if size:
            piece = slice(start, start + size)
            heads = [part[:, piece].unflatten(1, (-1, length)) for part in (query, key, value)]
            pieces.append(_batched(*heads, causal, scaling, dropout).flatten(1, 2))
        start += size
    if not pieces:
        return torch.empty_like(query)
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def _together(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    causal: bool,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Short sequences of many lengths in one call, each laid into a row of the longest.

    A call for each length costs more than the empty places, which exist only in here: no token
    sees them, and they are left out again.
    """
    offsets = offsets.unique_consecutive()  # an empty sequence would be a row of nothing but -inf
    place = torch.arange(int(offsets.diff().max()))  # [longest]
    filled = place < offsets.diff().unsqueeze(1)  # [sequences, longest]
    source = (offsets[:-1].unsqueeze(1) + place).masked_fill(~filled, 0).flatten()
    query, key, value = (
        part.transpose(0, 1).index_select(0, source).unflatten(0, filled.shape).transpose(1, 2)
        for part in (query, key, value)
    )  # [sequences, heads, longest, head_dim]
    seen = filled[:, None, None, :]
    if causal:
        seen = seen & (place <= place.unsqueeze(1))
    logits = (query * scaling) @ key.transpose(-1, -2)  # [sequences, heads, longest, longest]
    hidden = torch.zeros(seen.shape, dtype=logits.dtype).masked_fill_(~seen, float("-inf"))
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = (logits + hidden).softmax(dim=-1, dtype=precise).to(value.dtype)
    attended = F.dropout(weights, dropout, training=dropout > 0) @ value
    kept = filled.flatten().nonzero()[:, 0]
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, kept).transpose(0, 1)


def _batched(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float, dropout: float
) -> Tensor:
    """Attention of equally long sequences, each tensor `[heads, sequences, length, head_dim]`."""
    length = query.shape[-2]
    if query.is_cuda or length > _SHORT:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=scaling
        )
    logits = (query * scaling) @ key.transpose(-1, -2)  # [heads, sequences, length, length]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if causal and length > 1:
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    weights = F.dropout(logits.softmax(dim=-1).to(value.dtype), dropout, training=dropout > 0)
    return weights @ value


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scaling: float
) -> Tensor:
    assert varlen_attn is not None
    longest = int(offsets.diff().max())
    boundaries = offsets.to(query.device, torch.int32)
    attended = varlen_attn(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1).contiguous(),
        value.transpose(0, 1).contiguous(),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(attended, Tensor)
    return attended.transpose(0, 1)


def _has_varlen_kernel(query: Tensor) -> bool:
    """The kernel is for half precision on a GPU; before torch 2.11 it had no `window_size`."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and "window_size" in inspect.signature(varlen_attn).parameters
    )


def _no_mask(*_: Any, **__: Any) -> None:
    """A packed batch needs no mask: the boundaries say all."""
