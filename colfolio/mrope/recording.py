"""What hooks see of a forward: its inputs, and the ids that reached the rotary embedding.

They read and change nothing. `call_of` makes of a record what can be judged; a step behind a cache
is judged by the call that began this cache.

Letters: B rows, L padded length, N tokens of all rows of a packed call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .calls import Call, Contradiction
from .schemes import IMAGE, KINDS, TEXT, VIDEO, Scheme

_BEHIND = "the call goes on behind a cache of keys and values, "
_ALL_TEXT = (
    "All tokens were taken as text, since the call does not tell their types and the model no ids "
    "of placeholders: pass `token_types` to watch(...) if there are others"
)
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

    @property
    def token_ids(self) -> dict[int, int]:
        """The placeholder of each kind that has a known one."""
        named = {IMAGE: self.image_token_id, VIDEO: self.video_token_id}
        return {kind: token_id for kind, token_id in named.items() if token_id is not None}


@dataclass(slots=True)
class Record:
    """One forward as it runs, on the device."""

    inputs: dict[str, Any]
    rope_deltas: Tensor | None
    offsets: Tensor | None = None
    attention_mask: Any = None
    embeds_itself: bool = False
    text_ids: Tensor | None = None
    cache: int | None = None
    past_length: int = 0
    seen: list[Tensor] = field(default_factory=list)


class Recorder:
    """The hooks of a watch."""

    def __init__(self, model: nn.Module) -> None:
        self.records: list[Record] = []
        self.num_unreached = 0
        self._keepers = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        self._record: Record | None = None
        self._caches: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._numbers = count()

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
        given = _bound(module, args, kwargs)
        past: Any = given.get("past_key_values")
        if self._record is None:
            self._forget(past)  # whatever this call adds is not seen
            return
        self._record.embeds_itself = given.get("inputs_embeds") is None
        self._record.attention_mask = kept(given.get("attention_mask"))
        if self._record.offsets is None:
            self._record.offsets = kept(given.get("cu_seq_lens_q"))
        self._record.text_ids = kept(_text_row(given.get("position_ids")))
        if hasattr(past, "get_seq_length"):
            self._record.past_length = int(past.get_seq_length())
            self._record.cache = self._number(past)

    def decoded(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """The text decoder ends; it may have made a cache of its own."""
        if self._record is None or self._record.cache is not None:
            return
        parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
        made = [part for part in parts if hasattr(part, "get_seq_length")]
        self._record.cache = self._number(made[0]) if made else None

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

    def _number(self, cache: Any) -> int | None:
        """The number of a cache, the same as long as it lives; None if it cannot be known again."""
        try:
            return self._caches.setdefault(cache, next(self._numbers))
        except TypeError:
            return None

    def _forget(self, cache: Any) -> None:
        if self._number(cache) is not None:
            del self._caches[cache]


def call_of(record: Record, known: Known, begun: dict[int, Call]) -> Call:
    """A record on the CPU, in padded form, with what is known of its inputs.

    Args:
        begun: the call that began each cache, by the cache's number; brought up to date.
    """
    inputs = {name: _on_cpu(value) for name, value in {**record.inputs, **known.truth}.items()}
    mask = _on_cpu(inputs.get("attention_mask", record.attention_mask))
    whole = Call(
        seen=record.seen[0].cpu(),
        token_types=None,
        scheme=known.scheme,
        spatial_merge_size=known.merge,
        rope_deltas=_on_cpu(record.rope_deltas),
    )
    if not record.past_length:
        call = _beginning(whole, record, known, inputs, mask)
        if record.cache is not None:
            begun[record.cache] = call
        return call
    number = -1 if record.cache is None else record.cache
    call = _step(whole, record, known, mask, begun.get(number))
    if call.why_unjudged:
        begun.pop(number, None)  # what it added is not known
    return call


def _beginning(
    whole: Call, record: Record, known: Known, inputs: dict[str, Any], mask: Any
) -> Call:
    """A call that goes on behind nothing."""
    types, premise = _token_types(inputs, known), ""
    is_one_dimensional = bool((whole.seen == whole.seen[:1]).all())
    if types is None and record.embeds_itself and is_one_dimensional:
        types, premise = torch.zeros(whole.seen.shape[1:], dtype=torch.int64), _ALL_TEXT
    unjudged = _why_unjudged(record, mask, types)
    seen, token_ids, offsets = whole.seen, _rows(inputs.get("input_ids")), _offsets(record, mask)
    is_one = types is not None and types.shape == seen.shape[1:] and len(types) == 1
    if offsets is not None and types is not None and is_one:
        seen, types, mask = _unpacked(seen, offsets), _unpacked(types, offsets), _lengths(offsets)
        token_ids = None if token_ids is None else _unpacked(token_ids, offsets)
    told = known.truth.keys()
    call = replace(
        whole,
        seen=seen,
        token_types=types,
        attention_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        second_per_grid_ts=inputs.get("second_per_grid_ts"),
        unjudged=unjudged,
        is_told=bool(told & {"image_grid_thw", "video_grid_thw"}),
        premise=premise,
    )
    if token_ids is not None and "mm_token_type_ids" in inputs.keys() - told:
        call = replace(call, contradictions=_contradictions(call, token_ids, known))
    return call.fitted() if call.is_told else call


def _step(whole: Call, record: Record, known: Known, mask: Any, first: Call | None) -> Call:
    """A call behind a cache: judged if it brings text alone to a cache that was begun in sight."""
    num_rows, length = whole.seen.shape[1:]
    end = record.past_length + length
    is_whole = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= end
    types = _types_behind(record, known, end)
    past = None
    if first is not None:
        past = first.followed(record.past_length, mask if is_whole else None)
    unjudged, premise = _ran_several(record), ""
    if types is None and record.embeds_itself:
        types = torch.zeros(num_rows, length, dtype=torch.int64)
        premise = "" if "mm_token_type_ids" in known.truth else _ALL_TEXT
    if types is None:
        unjudged = unjudged or _BEHIND + "and does not tell the types of its tokens"
    elif types.any():
        unjudged = unjudged or _BEHIND + "and brings tokens of images or clips"
    elif past is None or len(past.num_real) != num_rows:
        unjudged = unjudged or _BEHIND + "and the call that began this cache was not seen or judged"
    return replace(
        whole,
        token_types=types,
        attention_mask=mask[:, record.past_length : end] if is_whole else None,
        past=None if unjudged else past,
        unjudged=unjudged,
        is_step=True,
        premise=premise,
    )


def _types_behind(record: Record, known: Known, end: int) -> Tensor | None:
    """Types of the tokens that a step brings, those of an image if anything says so."""
    shape = record.seen[0].shape[1:]
    found = []
    types = _rows(_on_cpu(record.inputs.get("mm_token_type_ids")))
    if types is not None and types.shape in {shape, (shape[0], end)}:
        found.append(types[:, -shape[1] :])
    token_ids = _rows(_on_cpu(record.inputs.get("input_ids")))
    if token_ids is not None and token_ids.shape == shape and known.token_ids:
        found.append(_types_of(token_ids, known))
    return torch.stack([types.long() for types in found]).amax(0) if found else None


def _why_unjudged(record: Record, mask: Any, types: Tensor | None) -> str | None:
    """Why a record says too little, if so."""
    if _ran_several(record):
        return _ran_several(record)
    if not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        return "its attention mask is not [batch, length], so its padding is not known"
    if types is None:
        return (
            "the call does not tell the types of its tokens: pass `token_types` to watch(...), or "
            "`mm_token_type_ids` or `input_ids` to the model"
        )
    return None


def _ran_several(record: Record) -> str | None:
    first = record.seen[0]
    if any(ids.shape != first.shape or (ids != first).any() for ids in record.seen):
        return "its decoder ran several times in one forward: watch the module that runs it once"
    return None


def _token_types(inputs: dict[str, Any], known: Known) -> Tensor | None:
    types = inputs.get("mm_token_type_ids")
    token_ids = inputs.get("input_ids")
    if types is None and token_ids is not None and known.image_token_id is not None:
        types = _types_of(token_ids, known)
    return _rows(types)


def _types_of(token_ids: Tensor, known: Known) -> Tensor:
    """What token ids say of their types."""
    types = torch.zeros_like(token_ids)
    for kind, token_id in known.token_ids.items():
        types[token_ids == token_id] = kind
    return types


def _contradictions(call: Call, token_ids: Tensor, known: Known) -> tuple[Contradiction, ...]:
    """Rows with a token whose id is that of one kind, and whose type that of another."""
    if call.why_unjudged or token_ids.shape != call.types.shape:
        return ()
    said, types = _types_of(token_ids, known), call.types
    differs = (said != TEXT) & (said != types)
    for kind in known.token_ids:
        differs |= (types == kind) & (said != kind)
    differs &= call.real
    found = []
    for row in differs.any(1).nonzero()[:, 0].tolist():
        token = int(differs[row].nonzero()[0])
        by_id, by_type = int(said[row, token]), int(types[row, token])
        told = (
            f"row {row}, token {token}: its token id, {int(token_ids[row, token])}, is that of "
            f"{KINDS.get(by_id, 'text')}, its type in mm_token_type_ids, {by_type}, that of "
            f"{KINDS.get(by_type, 'text')}"
        )
        found.append(Contradiction(row, told))
    return tuple(found)


def _text_row(position_ids: Any) -> Tensor | None:
    """The row of ids `[N]` by which a decoder tells packed rows apart, if there can be any."""
    if not isinstance(position_ids, Tensor):
        return None
    ids = position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else position_ids
    return ids[0] if ids.ndim == 2 and len(ids) == 1 else None


def _offsets(record: Record, mask: Any) -> list[int] | None:
    """Where the rows of a packed call begin, and where the last ends; None if it is not packed."""
    if record.offsets is not None:
        return record.offsets.tolist()
    if record.text_ids is None or mask is not None:  # behind a mask, all is one row
        return None
    text = record.text_ids.cpu()
    bounds = [*(text == 0).nonzero()[:, 0].tolist(), len(text)]
    lengths = [end - begin for begin, end in pairwise(bounds)]
    # rows of one token may as well be padding without a mask, which is often given place 0
    if len(lengths) < 2 or min(lengths) < 2:
        return None
    counts = torch.cat([torch.arange(length) for length in lengths])
    return bounds if torch.equal(text.long(), counts) else None


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


def _rows(tokens: Tensor | None) -> Tensor | None:
    """Tokens as `[B, L]`, of a packed call `[1, N]`."""
    return tokens if tokens is None or tokens.ndim > 1 else tokens[None]


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
