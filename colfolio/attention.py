"""Attention over packed sequences, as functions that `transformers` backbones call by name.

Each implementation is registered under two names, because "flash" in a name changes what
`transformers` does around it: a text decoder set to a "flash" name looks for a kernel on the hub,
while a vision tower needs it to hand over the boundaries of all images in one call instead of
looping over them.

Sequences of equal length that stand behind one another go through one batched call, so whoever
packs a batch sorts its rows by length. Short ones of many lengths share one call on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from colfolio.errors import ColfolioError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None

AttentionKernel = Literal["flash_attention_2", "varlen", "sdpa", "eager"]
AttentionChoice = Literal["auto", AttentionKernel]

# Names of a text decoder; those of vision towers end in "_flash".
_TEXT_NAMES: dict[AttentionChoice, str] = {
    "auto": "colfolio_packed",
    "flash_attention_2": "colfolio_packed_fa2",
    "varlen": "colfolio_packed_varlen",
    "sdpa": "colfolio_packed_sdpa",
    "eager": "colfolio_packed_eager",
}

# What `auto` takes, the first that is there; the first two are the same algorithm, and the second
# is for a torch whose own kernel does not know `window_size` yet.
_BEST: tuple[AttentionKernel, ...] = ("varlen", "flash_attention_2", "sdpa")

# Up to this length a plain product of matrices is faster on a CPU than the fused kernel, whose
# backward is slow for short sequences, and in half precision for longer ones too.
_SHORT, _SHORT_IN_HALF = 128, 1024


def set_attention(backbone: Any, choice: AttentionChoice = "auto") -> None:
    """Let a backbone and its vision tower attend by our functions.

    With `auto` each call takes what is best for its own device and dtype, so that one retriever
    trains in half precision on a GPU and encodes in float32; a kernel by name takes every call.
    """
    register_attention()
    backbone.set_attn_implementation(_TEXT_NAMES[choice])
    backbone.visual.config._attn_implementation = f"{_TEXT_NAMES[choice]}_flash"


def register_attention() -> None:
    """Make our functions known to `transformers`; again does no harm."""
    for choice, text_name in _TEXT_NAMES.items():
        forward = functools.partial(packed_attention_forward, choice=choice)
        for name in (text_name, f"{text_name}_flash"):
            AttentionInterface.register(name, forward)
            AttentionMaskInterface.register(name, _no_mask)


def choose_attention(
    choice: AttentionChoice, device: torch.device, dtype: torch.dtype
) -> AttentionKernel:
    """The kernel that a choice comes to.

    Args:
        device: where the model is.
        dtype: of the products of matrices, under autocast that of autocast.

    Raises:
        ColfolioError: the named kernel cannot run here; says what is missing, and how to get it.
    """
    if choice == "auto":
        return next(kernel for kernel in _BEST if _missing(kernel, device, dtype) is None)
    missing = _missing(choice, device, dtype)
    if missing is not None:
        raise ColfolioError(
            f"attention {choice} needs {missing}; or choose auto, which takes "
            f"{choose_attention('auto', device, dtype)} here"
        )
    return choice


def packed_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    choice: AttentionChoice = "auto",
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads head_dim"], None]:
    """Attention within each packed sequence, in the form that `AttentionInterface` asks for.

    Args:
        module: the calling layer; its `is_causal` says whether a token sees later ones.
        query, key, value: all sequences behind one another; fewer key heads are shared in groups.
        attention_mask: always None: a packed batch has none.
        scaling: factor on the products of query and key; None means `head_dim ** -0.5`.
        dropout: always 0: no kernel draws what belongs to a row alone.
        choice: what computes it.
        kwargs: `cu_seq_lens_q`, int `[sequences + 1]`, where each sequence begins.

    Raises:
        ValueError: no boundaries came with the call, so one sequence would see another; or there
            is dropout.
    """
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is None or attention_mask is not None:
        raise ValueError(
            "packed attention needs cu_seq_lens_q and no mask: run the model through Retriever"
        )
    if dropout > 0:
        raise ValueError(
            f"packed attention has no dropout, received {dropout}: its draws would depend on the "
            "batch that a row is in; set attention_dropout to 0 in the backbone's configuration"
        )
    causal = kwargs.get("is_causal")
    attended = packed_attention(
        query[0].to(value.dtype),
        key[0].to(value.dtype),
        value[0],
        offsets,
        causal=bool(module.is_causal) if causal is None else causal,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        choice=choice,
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
    choice: AttentionChoice = "auto",
) -> Float[Tensor, "heads tokens head_dim"]:
    """Softmax attention of each token over the tokens of its own sequence.

    Args:
        offsets: int `[sequences + 1]`, where each sequence begins; on the CPU it costs no wait.
        causal: whether a token sees only itself and those before it.
        scaling: factor on the products of query and key.

    Raises:
        ColfolioError: the named kernel cannot run on this device or in this dtype.
    """
    kernel = choose_attention(choice, query.device, query.dtype)
    if kernel == "flash_attention_2":
        return _flash_attention_2(query, key, value, offsets, causal, scaling)
    group = query.shape[0] // key.shape[0]
    if group > 1:
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    if kernel == "varlen":
        return _varlen(query, key, value, offsets, causal, scaling)
    if kernel == "eager":
        return _eager(query, key, value, offsets, causal, scaling)
    return _sdpa(query, key, value, offsets, causal, scaling)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scaling: float
) -> Tensor:
    """The definition, one sequence after another; the other kernels are compared with it."""
    parts = [part.split(offsets.diff().tolist(), dim=1) for part in (query, key, value)]
    rows = zip(*parts, strict=True)
    return torch.cat([_plain(q, k, v, causal, scaling) for q, k, v in rows], dim=1)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scaling: float
) -> Tensor:
    """Sequences of equal length in one call, on a CPU short ones of all lengths in one."""
    lengths = offsets.diff().tolist()
    if query.device.type == "cpu" and len(set(lengths)) > 1 and max(lengths) <= _SHORT:
        return _together(query, key, value, offsets, causal, scaling)
    pieces, start = [], 0
    for length, run in groupby(lengths):
        size = len(list(run)) * length
        if size:
            piece = slice(start, start + size)
            heads = [part[:, piece].unflatten(1, (-1, length)) for part in (query, key, value)]
            pieces.append(_batched(*heads, causal, scaling).flatten(1, 2))
        start += size
    if not pieces:
        return torch.empty_like(query)
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def _together(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scaling: float
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
    kept = filled.flatten().nonzero()[:, 0]
    attended = (weights @ value).transpose(1, 2).flatten(0, 1)
    return attended.index_select(0, kept).transpose(0, 1)


def _batched(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> Tensor:
    """Attention of equally long sequences, each tensor `[heads, sequences, length, head_dim]`."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda or query.shape[-2] > (_SHORT_IN_HALF if is_half else _SHORT):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
    return _plain(query, key, value, causal, scaling)


def _plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> Tensor:
    """Softmax of products over the last two dimensions `[length, head_dim]`."""
    length = query.shape[-2]
    logits = (query * scaling) @ key.transpose(-1, -2)  # [..., length, length]
    if causal and length > 1:
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        with torch.no_grad():  # their weights are 0, and so are their gradients
            logits.masked_fill_(later, float("-inf"))
    # softmax computes in float32 at least, whatever it reads and writes
    return logits.softmax(dim=-1) @ value


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


def _flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scaling: float
) -> Tensor:
    """The kernel of the package `flash_attn`, which shares key heads in groups by itself."""
    kernel = importlib.import_module("flash_attn").flash_attn_varlen_func
    longest = int(offsets.diff().max())
    boundaries = offsets.to(query.device, torch.int32)
    attended: Tensor = kernel(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1).contiguous(),
        value.transpose(0, 1).contiguous(),
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=causal,
    )
    return attended.transpose(0, 1)


def _missing(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a kernel lacks here, if anything."""
    if kernel in ("sdpa", "eager"):
        return None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return (
            f"half precision on a CUDA device (precision bf16 or fp16), not {dtype} on "
            f"{device.type}"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"a GPU of the Ampere generation or later, not {torch.cuda.get_device_name(device)}"
    if kernel == "varlen" and not _knows_windows():
        return f"torch 2.11 or later, not {torch.__version__} (pip install --upgrade torch)"
    if kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn (pip install flash-attn --no-build-isolation)"
    return None


@functools.cache
def _knows_windows() -> bool:
    """Before torch 2.11 the kernel had no `window_size`."""
    return varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters


def _no_mask(*_: Any, **__: Any) -> None:
    """A packed batch needs no mask: the boundaries say all."""
