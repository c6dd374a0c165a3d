"""Schemes of positions: where the tokens of an image or clip lie, and which frequencies read what.

A scheme is one small class. It cuts a grid into spans, each a run of visual tokens with coordinates
relative to where the run starts and a number by which it moves what follows, and it gives each
frequency of the rotation one of the three axes. Text is the same in all: one step a token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .rotary import interleaved, sectioned, spatial_first

TEXT, IMAGE, VIDEO = 0, 1, 2
KINDS = {IMAGE: "image", VIDEO: "video"}
Sections = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of visual tokens that lie behind one another without text between.

    Args:
        coordinates: int64 `[3, tokens]`, added to the position at which the run starts.
        advance: how far behind its start what follows goes on.
    """

    coordinates: Tensor
    advance: int

    @property
    def size(self) -> int:
        """Tokens in the run."""
        return self.coordinates.shape[1]


@dataclass(frozen=True)
class Scheme(ABC):
    """How visual tokens get positions, and which frequencies those turn."""

    @abstractmethod
    def spans(
        self, kind: int, frames: int, height: int, width: int, seconds: float | None
    ) -> tuple[Span, ...]:
        """The spans of one image or clip.

        Args:
            kind: `IMAGE` or `VIDEO`.
            frames: temporal steps of the grid; one may hold several pictures of a clip.
            height, width: its sides in merged tokens.
            seconds: between two temporal steps; None if not known.
        """

    @abstractmethod
    def axes(self, sections: Sequence[int]) -> Tensor:
        """Axis of each frequency, int64 `[sum(sections)]`: 0 temporal, 1 height, 2 width."""

    @abstractmethod
    def sections(self, num_frequencies: int) -> Sections:
        """The published share of each axis, scaled to so many frequencies (half a head).

        Raises:
            ValueError: fewer than three frequencies.
        """

    @property
    def needs_seconds(self) -> bool:
        """Whether `seconds` of a clip means anything to it."""
        return False


@dataclass(frozen=True)
class Qwen2VL(Scheme):
    """Qwen2-VL: a grid takes `start + (t, h, w)`.

    Source: arXiv:2409.12191, section 2.1 and figure 3; `Qwen2VLModel.get_rope_index`.

    Args:
        behind_time: where text goes on behind a clip. False: behind the longer of height and
            width, as in `transformers` since 5.0. True: behind the largest position of all three,
            as in the paper, in `transformers` 4 and wherever the published weights were trained.
            They differ only if the temporal positions reach beyond both sides.
    """

    behind_time: bool = False

    def spans(
        self, kind: int, frames: int, height: int, width: int, seconds: float | None
    ) -> tuple[Span, ...]:
        times = self._times(kind, frames, seconds)
        reach = int(times[-1]) + 1 if self.behind_time else 0
        return (Span(_coordinates(times, height, width), max(height, width, reach)),)

    def axes(self, sections: Sequence[int]) -> Tensor:
        return sectioned(sections)

    def sections(self, num_frequencies: int) -> Sections:
        return _shared(num_frequencies, temporal=16 / 64)

    def _times(self, kind: int, frames: int, seconds: float | None) -> Tensor:
        return torch.arange(frames)


@dataclass(frozen=True)
class Qwen2_5VL(Qwen2VL):  # noqa: N801
    """Qwen2.5-VL: as Qwen2-VL, with temporal positions of clips in absolute time.

    Source: arXiv:2502.13923, section 2.1; `Qwen2_5_VLModel.get_rope_index`.

    Args:
        tokens_per_second: temporal positions a second, `vision_config.tokens_per_second`: 2 in the
            published models, 4 in the library's default configuration. Times are rounded down.
    """

    tokens_per_second: int | float = 2

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_second < math.inf:
            raise ValueError(
                f"tokens_per_second must be above 0 and finite, not {self.tokens_per_second!r}"
            )

    @property
    def needs_seconds(self) -> bool:
        return True

    def _times(self, kind: int, frames: int, seconds: float | None) -> Tensor:
        if kind != VIDEO:
            return torch.arange(frames)
        interval = self.tokens_per_second * (1.0 if seconds is None else seconds)
        if frames * interval >= 2**53:
            raise ValueError(f"{frames} steps of {interval:g} positions each are out of range")
        # in float32, as get_rope_index does, whatever the default dtype is
        return (torch.arange(frames, dtype=torch.float32) * interval).long()


@dataclass(frozen=True)
class Qwen3VL(Scheme):
    """Qwen3-VL: every frame is an image of its own, and text between the frames tells the time.

    Source: arXiv:2511.21631, section 2; `Qwen3VLModel.get_rope_index`. The prompt puts a timestamp
    before each frame; two frames of a clip without text between are refused.
    """

    def spans(
        self,
        kind: int,
        frames: int,
        height: int,
        width: int,
        seconds: float | None,
    ) -> tuple[Span, ...]:
        times = torch.arange(frames if kind == IMAGE else 1)
        span = Span(_coordinates(times, height, width), max(height, width))
        return (span,) * (1 if kind == IMAGE else frames)

    def axes(self, sections: Sequence[int]) -> Tensor:
        return interleaved(sections)

    def sections(self, num_frequencies: int) -> Sections:
        return _shared(num_frequencies, temporal=24 / 64)


@dataclass(frozen=True)
class VideoRoPE(Scheme):
    """VideoRoPE: frames lie on the diagonal, their centre where text of that time would be.

    A token of step `t` takes `(s t, s t + h - (H - 1) // 2, s t + w - (W - 1) // 2)` behind the
    start, `s` the temporal spacing; text goes on one behind the last step. Source:
    arXiv:2502.05173, section 4, and `get_t_scale_rope_index` of its published code.

    Args:
        temporal_spacing: positions between two steps, a whole number of at least 1 (the published
            code also runs halves, in floating point; these ids are int64).
    """

    temporal_spacing: int = 2

    def __post_init__(self) -> None:
        if type(self.temporal_spacing) is not int or self.temporal_spacing < 1:
            raise ValueError(
                "temporal_spacing must be a whole number of at least 1, so that no two steps "
                f"share a position, not {self.temporal_spacing!r}"
            )

    def spans(
        self,
        kind: int,
        frames: int,
        height: int,
        width: int,
        seconds: float | None,
    ) -> tuple[Span, ...]:
        coordinates = _coordinates(torch.arange(frames) * self.temporal_spacing, height, width)
        centre = torch.tensor([[0], [(height - 1) // 2], [(width - 1) // 2]])
        time = coordinates[0] * torch.tensor([[0], [1], [1]])  # [3, tokens]
        last = self.temporal_spacing * (frames - 1)
        return (Span(coordinates + time - centre, last + 1),)

    def axes(self, sections: Sequence[int]) -> Tensor:
        return spatial_first(sections)

    def sections(self, num_frequencies: int) -> Sections:
        return _shared(num_frequencies, temporal=16 / 64)


SCHEMES: dict[str, Scheme] = {
    "qwen2_vl": Qwen2VL(),
    "qwen2_vl_published": Qwen2VL(behind_time=True),
    "qwen2_5_vl": Qwen2_5VL(),
    "qwen2_5_vl_published": Qwen2_5VL(behind_time=True),
    "qwen3_vl": Qwen3VL(),
    "videorope": VideoRoPE(),
}


def scheme_of(scheme: str | Scheme | Mapping[str, Any]) -> Scheme:
    """A scheme by its name in `SCHEMES`, by what `described` said of it, or the scheme itself.

    Raises:
        ValueError: no scheme has this name, or it has no such setting.
    """
    if isinstance(scheme, Scheme):
        # schemes of equal fields share what is kept for a grid
        hidden = vars(scheme).keys() - {field.name for field in fields(scheme)}
        if hidden:
            raise ValueError(
                f"{type(scheme).__name__} keeps {sorted(hidden)} beside its fields: make it a "
                "frozen dataclass with a field for each setting"
            )
        return scheme
    settings = dict(scheme) if isinstance(scheme, Mapping) else {"scheme": scheme}
    name = settings.pop("scheme", None)
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"scheme {name!r} is none of {', '.join(SCHEMES)}")
    known = {field.name for field in fields(SCHEMES[name])}
    if settings.keys() - known:
        raise ValueError(
            f"scheme {name!r} has no settings {sorted(settings.keys() - known)}, only "
            f"{sorted(known)}"
        )
    return replace(SCHEMES[name], **settings)


def described(scheme: Scheme) -> dict[str, Any]:
    """Name and settings of a scheme, fit for JSON; `scheme_of` reads it back.

    >>> described(VideoRoPE(temporal_spacing=3))
    {'scheme': 'videorope', 'temporal_spacing': 3}

    Raises:
        ValueError: no entry of `SCHEMES` is of its class.
    """
    names = [name for name, known in SCHEMES.items() if type(known) is type(scheme)]
    if not names:
        raise ValueError(f"{scheme} has no name: enter one of its class into SCHEMES first")
    named = SCHEMES[names[0]]
    settings = {
        field.name: getattr(scheme, field.name)
        for field in fields(scheme)
        if getattr(scheme, field.name) != getattr(named, field.name)
    }
    return {"scheme": names[0], **settings}


def _coordinates(times: Tensor, height: int, width: int) -> Tensor:
    """`(time, row, column)` of each token, row-major: int64 `[3, times * height * width]`."""
    grid = torch.meshgrid(times, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid).flatten(1)


def _shared(num_frequencies: int, temporal: float) -> Sections:
    """Height and width alike, and about `temporal` of all frequencies for time: at least one.

    Raises:
        ValueError: fewer frequencies than axes.
    """
    if num_frequencies < 3:
        raise ValueError(
            f"{num_frequencies} frequencies (twice as many dimensions) cannot turn by three "
            "positions: at least 3 are needed"
        )
    spatial = min(round(num_frequencies * (1 - temporal) / 2), (num_frequencies - 1) // 2)
    return num_frequencies - 2 * spatial, spatial, spatial
