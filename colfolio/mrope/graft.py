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

import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .decoders import FITTING, LAYOUTS, class_of, decoder_of, parameters_of, probed
from .schemes import Scheme, Sections, described, scheme_of

_DEFAULT_SCHEME = "qwen2_vl"


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
    decoder = decoder_of(model)
    _refuse_multimodal(decoder)
    num_frequencies, layout = probed(decoder)
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
    decoder = decoder_of(model)
    rotary = decoder.rotary_emb
    if not isinstance(rotary, MultimodalRotary):
        raise ValueError(
            f"{class_of(decoder)} is not grafted: its rotary_emb is {class_of(rotary)}; graft it "
            "first"
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
        self.register_buffer("column_axes", LAYOUTS[layout](axes), persistent=False)  # [D]

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
        given = dict(zip(parameters_of(decoder), args, strict=False)) | kwargs
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
    told = f"{class_of(decoder)}: position_ids {list(ids.shape)} ({ids.dtype})"
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


def _refuse_multimodal(decoder: Any) -> None:
    """Raises if the decoder turns by more than one row of position ids already."""
    if isinstance(decoder.rotary_emb, MultimodalRotary):
        raise ValueError(
            f"{class_of(decoder)} is grafted already: {decoder.rotary_emb.extra_repr()}; "
            "ungraft it first"
        )
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in dict(getattr(decoder.config, key, None) or {}).items():
            # `mrope_section` of Qwen2-VL and its kin, `xdrope_section` of HunYuan
            if name.endswith("rope_section"):
                raise ValueError(
                    f"{class_of(decoder)} has M-RoPE already ({key}: {name} {value}) and takes "
                    f"[3, batch, length] as it is; what fits is {FITTING}"
                )
    if hasattr(decoder.rotary_emb, "mrope_section"):
        raise ValueError(
            f"{class_of(decoder)} has M-RoPE already ({class_of(decoder.rotary_emb)}: "
            f"mrope_section {decoder.rotary_emb.mrope_section}); what fits is {FITTING}"
        )


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
            f"mrope in the configuration of {class_of(decoder)} must be a mapping with scheme and "
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
            f"the configuration of {class_of(decoder)} says {saved}, sections {saved_shares}, but "
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
            f"sections {sections} sum to {sum(sections)}, but heads of {class_of(decoder)} turn "
            f"{num_frequencies} frequencies (head size {head_size}): "
            f"e.g. {scheme.sections(num_frequencies)}"
        )
    device = next((buffer.device for buffer in decoder.rotary_emb.buffers()), None)
    return scheme.axes(sections).to(device)
