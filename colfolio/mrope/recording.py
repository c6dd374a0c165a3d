"""What hooks see of a forward: its inputs, and the ids that reached the rotary embedding.

They read and change nothing. `call_of` makes of a record what can be judged.

Letters: B rows, L padded length, N tokens of all rows of a packed call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .schemes import IMAGE, VIDEO, Scheme

DECODING = "the call goes on behind a cache of keys and values, and its past is not known"
_INPUTS = (
    *("input_ids", "mm_token_type_ids", "attention_mask"),
    *("image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
)
# attributes of a packed batch that comes as one argument
_PACKED = ("token_ids", "offsets", "position_ids", "grid_thw")


@dataclass(frozen=True, slots=True)
class Known:
    """What holds for all calls."""

    scheme: Scheme
    merge: int
    image_token_id: int | None
    video_token_id: int | None
    truth: dict[str, Any]


@dataclass(slots=True)
class Record:
    """One forward as it runs, on the device."""

    inputs: dict[str, Any]
    rope_deltas: Tensor | None
    offsets: Tensor | None = None
    attention_mask: Any = None
    embeds_itself: bool = False
    past_length: int = 0
    seen: list[Tensor] = field(default_factory=list)


class Recorder:
    """The hooks of a watch."""

    def __init__(self, model: nn.Module) -> None:
        self.records: list[Record] = []
        self.num_unreached = 0
        self._keepers = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        self._record: Record | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins; one before it that raised is forgotten."""
        inputs, offsets = _inputs(_bound(module, args, kwargs))
        known: list[Any] = [keeper.rope_deltas for keeper in self._keepers]
        deltas = [kept(delta).flatten() for delta in known if isinstance(delta, Tensor)]
        self._record = Record(inputs, torch.cat(deltas) if deltas else None, offsets)

    def end(self, *_: Any) -> None:
        """A forward ended well."""
        if self._record is not None and self._record.seen:
            self.records.append(self._record)
        else:
            self.num_unreached += 1
        self._record = None

    def decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The text decoder begins."""
        if self._record is None:
            return
        given = _bound(module, args, kwargs)
        self._record.embeds_itself = given.get("inputs_embeds") is None
        self._record.attention_mask = kept(given.get("attention_mask"))
        if self._record.offsets is None:
            self._record.offsets = kept(given.get("cu_seq_lens_q"))
        past: Any = given.get("past_key_values")
        if hasattr(past, "get_seq_length"):
            self._record.past_length = int(past.get_seq_length())

    def rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The rotary embedding gets its ids."""
        if self._record is None:
            return
        ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        used: Any = getattr(module, "positions_used", None)  # a grafted one knows better
        ids = ids if used is None else used(ids)
        hidden = args[0] if args else kwargs.get("x")
        if isinstance(ids, Tensor) and isinstance(hidden, Tensor):
            self._record.seen.append(_three_rows(ids.detach(), len(hidden)).clone())


def call_of(record: Record, known: Known) -> Call:
    """A record on the CPU, in padded form, with what is known of its inputs."""
    inputs = {**record.inputs, **known.truth}
    inputs = {name: _on_cpu(value) for name, value in inputs.items()}
    seen = record.seen[0].cpu()
    mask = inputs.get("attention_mask", record.attention_mask)
    types = _token_types(inputs, known)
    if types is None and record.embeds_itself:
        types = torch.zeros(seen.shape[1:], dtype=torch.int64)  # no other embeddings can be inside
    unjudged = _why_unjudged(record, mask, types)
    is_one = types is not None and types.shape == seen.shape[1:] and len(types) == 1
    if record.offsets is not None and types is not None and is_one:
        offsets = record.offsets.tolist()
        seen, types, mask = _unpacked(seen, offsets), _unpacked(types, offsets), _lengths(offsets)
    return Call(
        seen=seen,
        token_types=types,
        scheme=known.scheme,
        attention_mask=mask.cpu() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        spatial_merge_size=known.merge,
        second_per_grid_ts=inputs.get("second_per_grid_ts"),
        rope_deltas=_on_cpu(record.rope_deltas),
        unjudged=unjudged,
    )


def _why_unjudged(record: Record, mask: Any, types: Tensor | None) -> str | None:
    """Why a record says too little, if so."""
    first = record.seen[0]
    if record.past_length:
        return DECODING
    if any(ids.shape != first.shape or (ids != first).any() for ids in record.seen):
        return "its decoder ran several times in one forward: watch the module that runs it once"
    if not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        return "its attention mask is not [batch, length], so its padding is not known"
    if types is None:
        return (
            "the call does not tell the types of its tokens: pass `token_types` to watch(...), or "
            "`mm_token_type_ids` or `input_ids` to the model"
        )
    return None


def _token_types(inputs: dict[str, Any], known: Known) -> Tensor | None:
    types = inputs.get("mm_token_type_ids")
    token_ids = inputs.get("input_ids")
    if types is None and token_ids is not None and known.image_token_id is not None:
        types = torch.zeros_like(token_ids)
        for kind, token_id in ((IMAGE, known.image_token_id), (VIDEO, known.video_token_id)):
            if token_id is not None:
                types[token_ids == token_id] = kind
    return types if types is None or types.ndim > 1 else types[None]


def _inputs(arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """What a forward was given by the names of transformers, and the offsets if it is packed."""
    found, offsets = dict(arguments), None
    for argument in arguments.values():
        if isinstance(argument, Mapping):
            found = {**argument, **found}
        elif all(hasattr(argument, name) for name in _PACKED):
            found["input_ids"] = argument.token_ids
            found["image_grid_thw"] = argument.grid_thw if len(argument.grid_thw) else None
            offsets = kept(argument.offsets)
    return {name: kept(found[name]) for name in _INPUTS if found.get(name) is not None}, offsets


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by name; else positional ones by number."""
    names = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    numbered = {str(number): value for number, value in enumerate(args[len(names) :])}
    return {**numbered, **dict(zip(names, args, strict=False)), **kwargs}


def _three_rows(ids: Tensor, num_rows: int) -> Tensor:
    """Ids as `[3, B, L]`: one-dimensional ones in all three rows."""
    ids = ids[None] if ids.ndim == 1 else ids
    ids = ids[None] if ids.ndim == 2 else ids
    ids = ids if ids.is_floating_point() else ids.long()
    return ids.expand(3, num_rows, -1)


def _unpacked(packed: Tensor, offsets: list[int]) -> Tensor:
    """Rows `[..., B, L]` of a packed `[..., 1, N]`, with 0 behind each."""
    rows = [packed[..., 0, begin:end] for begin, end in pairwise(offsets)]
    length = max((row.shape[-1] for row in rows), default=0)
    padded = [nn.functional.pad(row, (0, length - row.shape[-1])) for row in rows]
    return torch.stack(padded, dim=-2)


def _lengths(offsets: list[int]) -> Tensor:
    """The mask `[B, L]` of rows cut at offsets."""
    lengths = torch.tensor(offsets).diff()
    return torch.arange(int(lengths.max())) < lengths[:, None]


def kept(value: Any) -> Any:
    """A value that no one can change later."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
