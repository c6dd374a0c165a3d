"""The guard: which positions reached a model's rotary embedding, and whether they were right.

Letters: B rows, L padded length, N tokens of all rows of a packed call, G grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .faults import Verdict, judge
from .recording import Known, Recorder, call_of, kept
from .schemes import KINDS, TEXT, Qwen2_5VL, Qwen2VL, Qwen3VL, Scheme, scheme_of

_BEFORE = 4  # tokens of text that a table shows before the first visual one
_SCHEME_OF: dict[str, Callable[[Any], Scheme]] = {
    "qwen2_vl": lambda _: Qwen2VL(),
    "qwen2_5_vl": lambda config: Qwen2_5VL(
        tokens_per_second=config.vision_config.tokens_per_second
    ),
    "qwen3_vl": lambda _: Qwen3VL(),
    "qwen3_vl_moe": lambda _: Qwen3VL(),
}


@contextmanager
def watch(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    spatial_merge_size: int | None = None,
    token_types: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
) -> Iterator[Watch]:
    """A watch over the position ids of each forward of a model, for a `with` block.

    The model is any that holds one text decoder of `transformers`: Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
    a retriever built on them, a grafted decoder. It is not changed, and works as before.

    Each call is judged when it is asked for, on the CPU: that waits for the device, and what was
    seen is kept until then. So do not leave the guard on in training.

    Steps of text behind a cache are judged if the call that began the cache was seen and judged.

    Args:
        model: whose forward is watched.
        scheme: that it was trained with. None: that of the grafted decoder, or of `config`.
        spatial_merge_size: None: that of `config.vision_config`, or else 2.
        token_types: int `[B, L]` (`[1, N]` packed): 0 text, 1 image, 2 video. None: what the call
            passes as `mm_token_type_ids`, or else what its token ids say.
        image_grid_thw, video_grid_thw: `[G, 3]`, in the order of the placeholders of all rows.
            None: those of the call. What is given here holds against the call. Of rows that a
            search repeats, those of each row once.
        second_per_grid_ts: seconds a temporal step of each clip. None: those of the call.

    Raises:
        ValueError: the model has no rotary text decoder, or several, or no scheme is known for it;
            or an argument is not of its form.

    Example:
        >>> with watch(model) as watched:  # doctest: +SKIP
        ...     model(**batch)
        >>> print(watched.verdict)  # doctest: +SKIP
        Positions are right in all 4 rows.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"watch needs a model, an nn.Module, not {model!r}")
    decoder = _decoder_of(model)
    truth = {
        "mm_token_type_ids": token_types,
        "image_grid_thw": image_grid_thw,
        "video_grid_thw": video_grid_thw,
        "second_per_grid_ts": second_per_grid_ts,
    }
    merge = _merge_size(model) if spatial_merge_size is None else spatial_merge_size
    _check(truth, merge)
    known = Known(
        _scheme_for(model, decoder) if scheme is None else scheme_of(scheme),
        merge,
        *_visual_token_ids(model),
        {name: kept(value) for name, value in truth.items() if value is not None},
    )
    recorder = Recorder(model)
    rotary: Any = decoder.rotary_emb
    handles = []
    try:
        handles += [
            model.register_forward_pre_hook(recorder.begin, with_kwargs=True),
            model.register_forward_hook(recorder.end),
            decoder.register_forward_pre_hook(recorder.decoder, with_kwargs=True),
            decoder.register_forward_hook(recorder.decoded),
            rotary.register_forward_pre_hook(recorder.rotary, with_kwargs=True),
        ]
        yield Watch(recorder, known)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Place:
    """One token of a table.

    Args:
        index: in its row, padding counted.
        kind: `text`, `image`, `video`, or `unknown`.
        seen, expected: temporal, height and width position; none expected if none is known.
    """

    index: int
    kind: str
    seen: tuple[int | float, ...]
    expected: tuple[int | float, ...]


class Watch:
    """What a `watch` saw: one call and one verdict a forward."""

    def __init__(self, recorder: Recorder, known: Known) -> None:
        self._recorder = recorder
        self._known = known
        self._calls: list[Call] = []
        self._verdicts: list[Verdict] = []
        self._begun: dict[int, Call] = {}  # by the number of the cache

    @property
    def calls(self) -> tuple[Call, ...]:
        """The forwards that ended well and reached the rotary embedding, on the CPU."""
        while self._recorder.records:
            record = self._recorder.records.pop(0)
            self._calls.append(call_of(record, self._known, self._begun))
        return tuple(self._calls)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on each call."""
        calls = self.calls
        for number in range(len(self._verdicts), len(calls)):
            self._verdicts.append(judge(calls[number], calls[:number]))
        return tuple(self._verdicts)

    @property
    def verdict(self) -> Verdict:
        """The first verdict that is not right, or else the last; it tells how many calls have none.

        Steps behind a cache that could not be judged are passed over.

        Raises:
            ValueError: there is none.
        """
        number = self._decisive()
        verdict = self.verdicts[number]
        unjudged = [
            call.is_step
            for other, call in enumerate(self.calls)
            if other != number and self.verdicts[other].unjudged is not None
        ]
        remarks = []
        for is_step, what in ((True, "step{} behind a cache"), (False, "other call{}")):
            count = unjudged.count(is_step)
            plural = ("s", "were") if count > 1 else ("", "was")
            if count:
                remarks.append(f"{count} {what.format(plural[0])} {plural[1]} not judged")
        return replace(verdict, remarks=(*verdict.remarks, *remarks)) if remarks else verdict

    def table(self, call: int = -1, row: int = 0, tokens: int = 24) -> list[Place]:
        """Seen and expected positions of a row, from just before its first visual token on.

        Args:
            call: its number, from the end if negative.
            row: in the call.
            tokens: at most so many; padding is left out.

        Raises:
            ValueError: there is no such call or row, or a number is none.
        """
        if not all(type(number) is int for number in (call, row, tokens)) or tokens < 0:
            raise ValueError(
                "call, row and tokens must be whole numbers, and tokens at least 0, not "
                f"{call!r}, {row!r} and {tokens!r}"
            )
        if not -len(self.calls) <= call < len(self.calls):
            raise ValueError(f"call {call} of {len(self.calls)} calls. {self._why_empty()}".strip())
        chosen, verdict = self.calls[call], self.verdicts[call]
        if not 0 <= row < verdict.num_rows:
            raise ValueError(f"row {row} of {verdict.num_rows} rows")
        if verdict.unjudged is not None:
            seen = chosen.seen[:, row].T.tolist()[:tokens]
            return [Place(k, "unknown", tuple(ids), ()) for k, ids in enumerate(seen)]
        return _places(chosen, row)[:tokens]

    def __str__(self) -> str:
        verdict, number = self.verdict, self._decisive()
        before = f"Call {number} of {len(self.verdicts)}: " if len(self.verdicts) > 1 else ""
        return f"{before}{verdict}"

    def _decisive(self) -> int:
        """The number of the call whose verdict holds for all."""
        verdicts = self.verdicts
        if not verdicts:
            raise ValueError(self._why_empty())
        judged = [
            number
            for number, call in enumerate(self.calls)
            if verdicts[number].unjudged is None or not call.is_step
        ]
        wrong = [number for number in judged if not verdicts[number].is_right]
        return [len(verdicts) - 1, *judged, *reversed(wrong)][-1]

    def _why_empty(self) -> str:
        if self._calls:
            return ""
        if self._recorder.num_unreached:
            return (
                "no forward of the watched model reached the rotary embedding of its text decoder, "
                f"in {self._recorder.num_unreached} that ran: watch the model that runs it"
            )
        return (
            "no forward of the watched model has ended inside the `with` block: call the very "
            "module that was passed to watch(...), as model(...)"
        )


def _check(truth: dict[str, Any], merge: Any) -> None:
    """Refuse what is given to a watch and is not of its form."""
    if type(merge) is not int or merge < 1:
        raise ValueError(f"spatial_merge_size must be a whole number of at least 1, not {merge!r}")
    _check_types(truth["mm_token_type_ids"])
    for name in ("image_grid_thw", "video_grid_thw"):
        _check_grids(name, truth[name], merge)
    _check_seconds(truth["second_per_grid_ts"], truth["video_grid_thw"])


def _check_types(types: Any) -> None:
    if types is None:
        return
    shape = _shape_of_whole_numbers("token_types", types, "[batch, length]")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"token_types must be [batch, length], received {shape}")
    if types.min() < TEXT or types.max() > max(KINDS):
        raise ValueError(
            "token_types must be 0 (text), 1 (image) or 2 (video), received "
            f"{types.unique().tolist()}"
        )


def _check_grids(name: str, grid_thw: Any, merge: int) -> None:
    if grid_thw is None:
        return
    shape = _shape_of_whole_numbers(name, grid_thw, "[grids, 3]")
    if len(shape) != 2 or shape[1] != 3:
        raise ValueError(f"{name} must be [grids, 3], received {shape}")
    for grid, sides in enumerate(grid_thw.tolist()):
        if min(sides) < 1 or sides[1] % merge or sides[2] % merge:
            raise ValueError(
                f"{name}: grid {grid} is {sides}: its sides must be positive, height and width "
                f"multiples of the merge size {merge}"
            )


def _shape_of_whole_numbers(name: str, given: Any, rule: str) -> list[int]:
    """The shape of a tensor that says something."""
    if not isinstance(given, Tensor) or given.is_meta:
        received = "a tensor on the meta device" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"{name} must be a tensor {rule} with values, not {received}")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(
            f"{name} must be whole numbers {rule}, received {given.dtype} {list(given.shape)}: "
            f"pass {name}.long()"
        )
    return list(given.shape)


def _check_seconds(given: Any, video_grid_thw: Tensor | None) -> None:
    if given is None:
        return
    is_tensor = isinstance(given, Tensor)
    if is_tensor and (given.is_meta or given.ndim != 1):
        received = "a tensor on the meta device" if given.is_meta else f"{list(given.shape)}"
        raise ValueError(f"second_per_grid_ts must be [clips], with values, received {received}")
    seconds = given.tolist() if is_tensor else given
    is_list = isinstance(seconds, Sequence) and not isinstance(seconds, str)
    if not is_list or not all(
        isinstance(time, int | float) and 0 <= time < math.inf for time in seconds
    ):
        raise ValueError(
            "second_per_grid_ts must hold a time in seconds, at least 0, for each clip, not "
            f"{given!r}"
        )
    if video_grid_thw is not None and len(seconds) != len(video_grid_thw):
        raise ValueError(
            f"second_per_grid_ts must hold a time for each of {len(video_grid_thw)} clips of "
            f"video_grid_thw, received {len(seconds)}"
        )


def _places(call: Call, row: int) -> list[Place]:
    """The tokens of a row from just before its first visual one on, without padding."""
    real = call.real[row].nonzero()[:, 0].tolist()
    kinds = [KINDS.get(kind, "text") for kind in call.types[row].tolist()]
    visual = [number for number, index in enumerate(real) if kinds[index] != "text"]
    first = max(0, visual[0] - _BEFORE) if visual else 0
    seen = call.seen[:, row].T.tolist()
    expected = [()] * len(seen) if call.expected is None else call.expected[:, row].T.tolist()
    return [
        Place(index, kinds[index], tuple(seen[index]), tuple(expected[index]))
        for index in real[first:]
    ]


def _decoder_of(model: nn.Module) -> nn.Module:
    """The one module with `rotary_emb` and `layers`."""
    named = dict(model.named_modules())
    fitting = {
        name: module
        for name, module in named.items()
        if all(
            isinstance(getattr(module, part, None), nn.Module) for part in ("rotary_emb", "layers")
        )
    }
    if len(fitting) > 1:
        fitting = {
            name: module for name, module in fitting.items() if "embed_tokens" in _children(module)
        } or fitting
    if len(fitting) != 1:
        found = ", ".join(name or type(model).__name__ for name in fitting) or "none"
        raise ValueError(
            "watch needs a model with one text decoder, a module with `rotary_emb` and `layers`; "
            f"found in {type(model).__name__}: {found}"
        )
    return next(iter(fitting.values()))


def _children(module: nn.Module) -> set[str]:
    # by name, not as attributes: wrappers such as those of peft pass attributes on
    return {name for name, _ in module.named_children()}


def _scheme_for(model: nn.Module, decoder: nn.Module) -> Scheme:
    grafted = getattr(decoder.rotary_emb, "scheme", None)
    if isinstance(grafted, Scheme):
        return grafted
    types = []
    for config in _configs(model):
        types.append(getattr(config, "model_type", None))
        if types[-1] in _SCHEME_OF:
            return _SCHEME_OF[types[-1]](config)
    raise ValueError(
        f"no scheme is known for {type(model).__name__} (model_type "
        f"{', '.join(str(name) for name in dict.fromkeys(types)) or 'missing'}), only for "
        f"{', '.join(_SCHEME_OF)}: pass scheme=, a name in SCHEMES or a Scheme"
    )


def _merge_size(model: nn.Module) -> int:
    visions = [getattr(config, "vision_config", None) for config in _configs(model)]
    sizes = [getattr(vision, "spatial_merge_size", None) for vision in visions]
    return next((size for size in sizes if size is not None), 2)


def _visual_token_ids(model: nn.Module) -> tuple[int | None, int | None]:
    for config in _configs(model):
        if getattr(config, "image_token_id", None) is not None:
            return config.image_token_id, getattr(config, "video_token_id", None)
    return None, None


def _configs(model: nn.Module) -> list[Any]:
    """Configurations of a model and of what it holds, outermost first."""
    configs = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        configs += [config, getattr(config, "vlm_config", None)]
    return [config for config in configs if config is not None]
