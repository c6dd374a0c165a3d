"""Gives M-RoPE to a text decoder of `transformers` that has rotary positions, and takes it off.

Two things change. `decoder.rotary_emb` becomes a `MultimodalRotary`, which holds the original and
asks it for cos and sin of all three rows of position ids, so that every type of RoPE, its scaling,
dtype and arguments are inherited. And two hooks on the decoder lead three-row position ids past its
masks and layers, which understand one row only, to that module. Text with ids of one row takes the
path it always took, and gives the same numbers bit for bit. No parameter and no key of the
state_dict changes. Source: Qwen2-VL, arXiv:2409.12191, section 2.1.

Letters: B sequences, L length, F frequencies, D columns of cos and sin.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .schemes import Scheme, Sections, described, scheme_of

_DEFAULT_SCHEME = "qwen2_vl"
_FITTING = "LlamaModel, MistralModel, Qwen2Model, Qwen3Model or SmolLM3Model"

# how a rotary embedding lays its F frequencies out over D columns
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda axes: axes.repeat(2),  # D = 2 F, behind one another: Llama
    "pairs": lambda axes: axes.repeat_interleave(2),  # D = 2 F, side by side: Cohere
    "single": lambda axes: axes,  # D = F: gpt-oss
}


def graft(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    sections: Sequence[int] | Tensor | None = None,
) -> nn.Module:
    """The model, whose decoder now also takes `position_ids` of `[3, B, L]`.

    Also `[4, B, L]`, text ids first, which make the mask of packed sequences, as the library makes
    it: without an `attention_mask` and with `use_cache=False`. Text ids `[B, L]` work as before.
    Scheme and sections are written into the decoder's configuration, so that a checkpoint keeps
    them: behind `from_pretrained`, `graft(model)` alone restores them. Where a model makes masks
    outside its decoder, as PaliGemma does, three rows need an `attention_mask`.

    Args:
        model: a decoder such as `LlamaModel`, or a module that holds exactly one. Changed in place.
        scheme: a name in `SCHEMES`, or a scheme. Default: the configuration's, else `qwen2_vl`.
        sections: frequencies of time, height and width. Default: the configuration's, else the
            scheme's published share.

    Raises:
        ValueError: not exactly one decoder, one that has M-RoPE already or rotates in a way of its
            own, sections that do not fit its heads, or settings other than the configuration's.
    """
    decoder = _decoder_of(model)
    _refuse_multimodal(decoder)
    num_frequencies, layout = _probed(decoder)
    chosen, shares = _settings(decoder, scheme, sections, num_frequencies)
    axes = _axes(decoder, chosen, shares, num_frequencies)
    written = {**described(chosen), "sections": list(shares)}
    rotary = MultimodalRotary(decoder.rotary_emb, chosen, shares, axes, layout)
    rotary.handles = (
        decoder.register_forward_pre_hook(_take_rows, with_kwargs=True),
        decoder.register_forward_hook(_drop_rows, always_call=True),
    )
    decoder.rotary_emb = rotary
    decoder.config.mrope = written
    return model


def ungraft(model: nn.Module) -> nn.Module:
    """The model as it was before `graft`: its own rotary embedding, no hooks, no settings.

    Raises:
        ValueError: its decoder is not grafted.
    """
    decoder = _decoder_of(model)
    rotary = decoder.rotary_emb
    if not isinstance(rotary, MultimodalRotary):
        raise ValueError(
            f"{_name(decoder)} is not grafted: its rotary_emb is {_name(rotary)}; graft it first"
        )
    for handle in rotary.handles:
        handle.remove()
    decoder.rotary_emb = rotary.original
    # models built from one configuration share it, so another's ungraft may have come first
    if hasattr(decoder.config, "mrope"):
        del decoder.config.mrope
    return model


class _OfThread(threading.local):
    """Rows of position ids for the call that runs in this thread; a copy starts without any."""

    rows: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> _OfThread:
        return _OfThread()

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()


class MultimodalRotary(nn.Module):
    """A rotary embedding whose frequencies read one of three position ids each.

    Args:
        original: the decoder's own rotary embedding.
        scheme, sections: what the axes were made from.
        axes: int64 `[F]`, which row of the position ids each frequency reads.
        layout: how the original lays frequencies over columns: `halves`, `pairs` or `single`.
    """

    axes: Tensor
    column_axes: Tensor

    def __init__(
        self, original: nn.Module, scheme: Scheme, sections: Sections, axes: Tensor, layout: str
    ) -> None:
        super().__init__()
        self.original = original
        self.scheme = scheme
        self.sections = sections
        self.layout = layout
        self.handles: tuple[Any, ...] = ()
        self._pending = _OfThread()
        self.register_buffer("axes", axes, persistent=False)
        self.register_buffer("column_axes", _LAYOUTS[layout](axes), persistent=False)  # [D]

    @property
    def pending(self) -> Tensor | None:
        """Three rows `[3, B, L]` handed over for the call that runs in this thread."""
        return self._pending.rows

    @pending.setter
    def pending(self, rows: Tensor | None) -> None:
        self._pending.rows = rows

    def positions_used(self, position_ids: Tensor) -> Tensor:
        """The ids this call turns by: the three rows handed to the decoder, else those given."""
        return position_ids if self.pending is None else self.pending

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[B, L, D]` of `[B, L]` or `[3, B, L]` position ids, as the original's.

        Args:
            x: tells dtype and device.
            position_ids: what the decoder made or was given; rows handed to it come first.
            *args, **kwargs: passed to the original, such as `layer_type` of Gemma 3.
        """
        position_ids = self.positions_used(position_ids)
        if position_ids.ndim != 3:
            return self.original(x, position_ids, *args, **kwargs)
        stacked = position_ids.to(x.device).flatten(0, 1)  # [3 * B, L]
        # one call for all rows: a RoPE that depends on the longest position sees the longest of all
        cos, sin = self.original(x, stacked, *args, **kwargs)
        return self._picked(cos), self._picked(sin)

    def extra_repr(self) -> str:
        """Scheme, sections and layout, for printing."""
        return f"{self.scheme}, sections={self.sections}, layout={self.layout}"

    def _picked(self, stacked: Tensor) -> Tensor:
        """Each column from the row its axis names: `[3 * B, L, D]` to `[B, L, D]`."""
        rows = stacked.unflatten(0, (3, -1))  # [3, B, L, D]
        index = self.column_axes.to(rows.device).expand(1, *rows.shape[1:])  # [1, B, L, D]
        return rows.gather(0, index)[0]


def _take_rows(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The decoder's call without three-row ids, which go to its rotary embedding instead.

    A function of the module, not a closure: a copied or unpickled decoder finds its own rotary.
    """
    rotary = decoder.rotary_emb
    # also where the call before was stopped in a way that runs no hook
    rotary.pending = None
    given = kwargs
    if args:
        given = dict(zip(_parameters(decoder), args, strict=False)) | kwargs
    ids = given.get("position_ids")
    if not isinstance(ids, Tensor) or not _has_rows(decoder, ids, given):
        return None
    rotary.pending = ids[-3:]
    if len(ids) == 3:  # no row makes masks, so the decoder counts, as without position ids
        return (), given | {"position_ids": None}
    # with a cache, decoders do not look for sequences packed behind one another
    use_cache = bool(given.get("use_cache"))
    return (), given | {"position_ids": ids[0], "use_cache": use_cache}


def _drop_rows(decoder: Any, args: Any, output: Any) -> None:  # noqa: ARG001
    """Ends the call: what comes next brings its own position ids."""
    decoder.rotary_emb.pending = None


def _has_rows(decoder: nn.Module, ids: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether ids have three rows, or four with those of text.

    Raises:
        ValueError: ids that fit neither a decoder nor the inputs of this call.
    """
    tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    shape = embeddings.shape[:2] if embeddings is not None else getattr(tokens, "shape", None)
    told = f"{_name(decoder)}: position_ids {list(ids.shape)} ({ids.dtype})"
    if ids.ndim < 3:
        if shape is not None and ids.ndim == 2 and len(ids) == 3 != shape[0]:
            raise ValueError(
                f"{told} do not fit inputs {list(shape)}: three rows are [3, batch, length], so "
                "those of one packed sequence go as position_ids[:, None]"
            )
        return False
    if ids.ndim > 3 or len(ids) not in (3, 4):
        raise ValueError(
            f"{told} must be [batch, length], [3, batch, length], or [4, batch, length] with text "
            "ids first"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{told} must be whole numbers: pass position_ids.long()")
    if shape is not None and ids.shape[1:] != shape:
        raise ValueError(
            f"{told} do not fit inputs {list(shape)}: batch and length must be the inputs' own, "
            "at a step behind a cache those of the new tokens"
        )
    return True


def _decoder_of(model: nn.Module) -> Any:
    """The one module with children `rotary_emb` and `layers` that takes position ids."""
    found = {name: part for name, part in model.named_modules() if _is_decoder(part)}
    if len(found) > 1:
        # towers of images and sound may look alike, but embed no tokens
        texts = {name: part for name, part in found.items() if "embed_tokens" in _children(part)}
        found = texts or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        parts = ", ".join(f"{name or 'itself'} ({_name(part)})" for name, part in found.items())
        raise ValueError(
            f"{_name(model)} holds {len(found)} decoders: {parts}; pass the one that is meant"
        )
    learned = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
    ]
    reason = f"it has learned positions ({', '.join(learned)}), and " if learned else ""
    raise ValueError(
        f"{_name(model)} cannot be grafted: {reason}no module of it has children rotary_emb and "
        f"layers, a config, and a forward with position_ids; what fits is {_FITTING}, or a model "
        "that holds one such decoder"
    )


def _is_decoder(part: nn.Module) -> bool:
    # children by name, not attributes: wrappers such as those of peft pass attributes on
    return (
        {"rotary_emb", "layers"} <= _children(part)
        and hasattr(part, "config")
        and "position_ids" in _parameters(part)
    )


def _refuse_multimodal(decoder: Any) -> None:
    """Raises if the decoder turns by more than one row of position ids already."""
    if isinstance(decoder.rotary_emb, MultimodalRotary):
        raise ValueError(
            f"{_name(decoder)} is grafted already: {decoder.rotary_emb.extra_repr()}; "
            "ungraft it first"
        )
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in dict(getattr(decoder.config, key, None) or {}).items():
            # `mrope_section` of Qwen2-VL and its kin, `xdrope_section` of HunYuan
            if name.endswith("rope_section"):
                raise ValueError(
                    f"{_name(decoder)} has M-RoPE already ({key}: {name} {value}) and takes "
                    f"[3, batch, length] as it is; what fits is {_FITTING}"
                )
    if hasattr(decoder.rotary_emb, "mrope_section"):
        raise ValueError(
            f"{_name(decoder)} has M-RoPE already ({_name(decoder.rotary_emb)}: mrope_section "
            f"{decoder.rotary_emb.mrope_section}); what fits is {_FITTING}"
        )


def _probed(decoder: Any) -> tuple[int, str]:
    """F of the decoder's rotary embedding, and its layout, from what it returns for a few ids."""
    # a copy, for some change their frequencies with the positions they see
    rotary = copy.deepcopy(decoder.rotary_emb)
    if rotary.state_dict():
        raise ValueError(
            f"{_name(rotary)} of {_name(decoder)} saves {', '.join(rotary.state_dict())}; a graft "
            "would rename what checkpoints hold, so frequencies must not be learned or saved"
        )
    found = {kind: _probed_layout(decoder, rotary, kind) for kind in _layer_types(rotary)}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{kind}: {size} ({layout})" for kind, (size, layout) in found.items())
        raise ValueError(
            f"{_name(decoder)} turns other frequencies in other layers, so one choice of sections "
            f"cannot fit all: {told}"
        )
    return next(iter(found.values()))


def _probed_layout(
    decoder: nn.Module, rotary: nn.Module, layer_type: str | None
) -> tuple[int, str]:
    tensors = [*rotary.buffers(), *rotary.parameters()]
    device = tensors[0].device if tensors else torch.device("cpu")
    positions = torch.arange(4, device=device)[None]  # [1, 4]
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    told = f"{_name(rotary)} of {_name(decoder)} cannot be grafted"
    try:
        turned = rotary(torch.zeros(1, 4, 1, device=device), positions, **kwargs)
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{told}: called as (x, position_ids), it raises {type(error).__name__}: {error}"
        ) from error
    parts = turned if isinstance(turned, tuple) else (turned,)
    shapes = {tuple(part.shape[:-1]) for part in parts}
    if len(parts) != 2 or shapes != {(1, 4)} or any(part.is_complex() for part in parts):
        seen = ", ".join(f"{list(part.shape)} ({part.dtype})" for part in parts)
        raise ValueError(
            f"{told}: for position ids [1, 4] it must return cos and sin, each [1, 4, columns], "
            f"but returns {seen}"
        )
    if device.type == "meta":
        raise ValueError(f"{told}: it is on the meta device; load the weights first")
    return _layout_of(*parts)


def _layout_of(cos: Tensor, sin: Tensor) -> tuple[int, str]:
    """F and the layout by which columns repeat."""
    half = cos.shape[-1] // 2
    for layout in ("halves", "pairs") if cos.shape[-1] == 2 * half else ():
        columns = _LAYOUTS[layout](torch.arange(half, device=cos.device))  # [D]
        first = (columns[:, None] == columns).int().argmax(dim=0)  # [D], where each one began
        if all(torch.equal(part, part[..., first]) for part in (cos, sin)):
            return half, layout
    return cos.shape[-1], "single"


def _layer_types(rotary: Any) -> list[str | None]:
    """The kinds of layers that it turns in different ways, or None alone."""
    if "layer_type" not in _parameters(rotary):
        return [None]
    # kinds of layers without rotation are not in `rope_type`
    kinds = rotary.rope_type if isinstance(rotary.rope_type, Mapping) else rotary.layer_types
    return list(kinds)


def _settings(
    decoder: Any,
    scheme: str | Scheme | None,
    sections: Sequence[int] | Tensor | None,
    num_frequencies: int,
) -> tuple[Scheme, Sections]:
    """Scheme and sections: the configuration's, or those asked for where it says nothing."""
    kept = getattr(decoder.config, "mrope", None)
    if kept is None:
        chosen = scheme_of(_DEFAULT_SCHEME if scheme is None else scheme)
        return chosen, _shares(chosen, sections, num_frequencies)
    if not isinstance(kept, Mapping):
        raise ValueError(
            f"mrope in the configuration of {_name(decoder)} must be a mapping with scheme and "
            f"sections, not {kept!r}"
        )
    settings = dict(kept)
    shares = settings.pop("sections", None)
    saved = scheme_of(settings)
    saved_shares = _shares(saved, shares, num_frequencies)
    chosen = saved if scheme is None else scheme_of(scheme)
    asked = shares if sections is None and chosen == saved else sections
    chosen_shares = _shares(chosen, asked, num_frequencies)
    if (chosen, chosen_shares) != (saved, saved_shares):
        raise ValueError(
            f"the configuration of {_name(decoder)} says {saved}, sections {saved_shares}, but "
            f"{chosen}, sections {chosen_shares} was asked for; graft(model) restores its own, and "
            "ungraft behind it clears them"
        )
    return saved, saved_shares


def _shares(
    scheme: Scheme, sections: Sequence[int] | Tensor | None, num_frequencies: int
) -> Sections:
    if sections is None:
        return scheme.sections(num_frequencies)
    try:
        # plain integers, whatever they came as: they are written into a JSON file
        temporal, height, width = (operator.index(size) for size in sections)
    except (TypeError, ValueError):
        raise ValueError(
            f"sections are three whole numbers, time, height and width, not {sections!r}: "
            f"e.g. {scheme.sections(num_frequencies)}"
        ) from None
    return temporal, height, width


def _axes(decoder: Any, scheme: Scheme, sections: Sections, num_frequencies: int) -> Tensor:
    """int64 `[F]` on the device of the decoder's rotary embedding."""
    if sum(sections) != num_frequencies:
        config = decoder.config
        head_size = getattr(config, "head_dim", None)
        head_size = head_size or config.hidden_size // config.num_attention_heads
        raise ValueError(
            f"sections {sections} sum to {sum(sections)}, but heads of {_name(decoder)} turn "
            f"{num_frequencies} frequencies (head size {head_size}): "
            f"e.g. {scheme.sections(num_frequencies)}"
        )
    device = next((buffer.device for buffer in decoder.rotary_emb.buffers()), None)
    return scheme.axes(sections).to(device)


def _children(part: nn.Module) -> set[str]:
    return {name for name, _ in part.named_children()}


def _parameters(part: nn.Module) -> list[str]:
    return list(inspect.signature(part.forward).parameters)


def _name(part: nn.Module) -> str:
    return type(part).__name__
