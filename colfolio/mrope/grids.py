"""What a caller gives, checked: tokens, and grids with their times, cut into the spans of a scheme.

All of this is on the host. Letters: N tokens of all sequences, B sequences, G grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .schemes import IMAGE, KINDS, VIDEO, Scheme, Span

# Coordinates are kept for grids seen before: of pages, and of a few clips, which are larger.
_PAGE_TOKENS = 4096
_SECONDS_LIMIT = 1e9


@dataclass(frozen=True, slots=True)
class Tokens:
    """Types int `[N]`, which of them are real (None: all), and where each sequence begins."""

    types: Tensor
    real: Tensor | None
    offsets: Tensor

    def of_kind(self, kind: int) -> Tensor:
        """Which tokens are real and of this type: bool `[N]`."""
        found = self.types == kind
        return found if self.real is None else found.logical_and_(self.real)

    def num_real(self) -> Tensor | int:
        """How many tokens there are, padding left out."""
        return len(self.types) if self.real is None else self.real.sum()

    def kept(self) -> list[int | None]:
        """The types, None where no token is real."""
        types = self.types.tolist()
        real = [True] * len(types) if self.real is None else self.real.tolist()
        return [kind if is_real else None for kind, is_real in zip(types, real, strict=True)]


@dataclass(frozen=True, slots=True)
class Visuals:
    """The grids of one kind and the spans they are cut into, in the order of their placeholders.

    Args:
        kind: `IMAGE` or `VIDEO`.
        sides: patches in time, height and width of each grid.
        spans: of all grids, behind one another.
        sizes: tokens of each span.
        grids: which grid each span belongs to.
    """

    kind: int
    sides: list[list[int]]
    spans: list[Span] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    grids: list[int] = field(default_factory=list)

    def add(self, grid: int, spans: tuple[Span, ...]) -> None:
        """Put the spans of the next grid behind those that are there."""
        self.spans.extend(spans)
        self.sizes.extend([span.size for span in spans])
        self.grids.extend([grid] * len(spans))

    @property
    def num_tokens(self) -> int:
        """Placeholders that all spans need."""
        return sum(self.sizes)


class GridError(ValueError):
    """A grid that no placeholders can fit, and the grids of its kind before it."""

    def __init__(self, before: Visuals, told: str) -> None:
        super().__init__(told)
        self.before = before


def check_tokens(token_types: Tensor, offsets: Tensor) -> None:
    """Refuse what is no packed batch; the values of offsets on a device are not looked at.

    Raises:
        ValueError: names the argument.
    """
    for name, given in (("token_types", token_types), ("offsets", offsets)):
        if given.ndim != 1 or given.is_floating_point() or given.is_complex():
            raise ValueError(
                f"{name} must be whole numbers in one dimension, received {given.dtype} "
                f"{list(given.shape)}"
            )
    if offsets.device.type != "cpu":
        return
    size = len(token_types)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != size or (offsets.diff() < 0).any():
        raise ValueError(
            f"offsets must start at 0, never fall, and end at the number of tokens, {size}; "
            f"received {offsets.tolist()}"
        )


def visuals_of(
    grids: tuple[Tensor | None, Tensor | None],
    scheme: Scheme,
    merge: int,
    second_per_grid_ts: Tensor | Sequence[float] | None,
) -> list[Visuals]:
    """The spans of images and of clips, of kinds that have any.

    Raises:
        GridError: a grid has no area, or does not divide by the merge size.
        ValueError: grids, merge size or seconds are not of the form that they must have.
    """
    if type(merge) is not int or merge < 1:
        raise ValueError(f"spatial_merge_size must be a whole number of at least 1, not {merge!r}")
    sides = [_sides(grid_thw, kind) for kind, grid_thw in zip(KINDS, grids, strict=True)]
    seconds = _seconds(second_per_grid_ts, len(sides[1]), scheme)
    found = [Visuals(IMAGE, sides[0]), Visuals(VIDEO, sides[1])]
    for visuals, times in zip(found, ([None] * len(sides[0]), seconds), strict=True):
        for grid, (of_grid, time) in enumerate(zip(visuals.sides, times, strict=True)):
            frames, height, width = of_grid
            if frames < 1 or min(height, width) < merge or height % merge or width % merge:
                raise GridError(
                    visuals,
                    f"{KINDS[visuals.kind]} grid {grid} is {of_grid}: its sides must be positive, "
                    f"height and width multiples of the merge size {merge}",
                )
            merged = (frames, height // merge, width // merge)
            visuals.add(grid, _spans(scheme, visuals.kind, merged, time))
    return [visuals for visuals in found if visuals.sides]


def forget_grids() -> None:
    """Free the coordinates that are kept for grids seen before."""
    _spans_of_page.cache_clear()
    _spans_of_clip.cache_clear()


def _sides(grid_thw: Tensor | None, kind: int) -> list[list[int]]:
    if grid_thw is None:
        return []
    if not isinstance(grid_thw, Tensor) or grid_thw.device.type == "meta":
        raise ValueError(
            f"{KINDS[kind]}_grid_thw must be a tensor with values, not {type(grid_thw).__name__}"
        )
    if len(grid_thw) and (
        grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point()
    ):
        raise ValueError(
            f"{KINDS[kind]}_grid_thw must be whole numbers [grids, 3], received "
            f"{grid_thw.dtype} {list(grid_thw.shape)}"
        )
    return grid_thw.tolist()


def _seconds(
    given: Tensor | Sequence[float] | None, num_clips: int, scheme: Scheme
) -> Sequence[float | None]:
    """Seconds a temporal step of each clip."""
    if given is None or (not num_clips and not isinstance(given, float) and not len(given)):
        return [None] * num_clips
    seconds = given.tolist() if isinstance(given, Tensor) else given
    if (
        not isinstance(seconds, list | tuple)
        or len(seconds) != num_clips
        or not all(isinstance(time, int | float) and 0 <= time < _SECONDS_LIMIT for time in seconds)
    ):
        raise ValueError(
            f"second_per_grid_ts must hold the seconds of each of {num_clips} clips, at least 0 "
            f"and below {_SECONDS_LIMIT:g}, received {seconds}"
        )
    if not scheme.needs_seconds:
        raise ValueError(f"second_per_grid_ts is set, but {scheme} has no use for time in seconds")
    return [float(time) for time in seconds]


def _spans(
    scheme: Scheme, kind: int, merged: tuple[int, int, int], seconds: float | None
) -> tuple[Span, ...]:
    keeping = _spans_of_page if math.prod(merged) <= _PAGE_TOKENS else _spans_of_clip
    return keeping(scheme, kind, merged, seconds)


def _made(
    scheme: Scheme, kind: int, merged: tuple[int, int, int], seconds: float | None
) -> tuple[Span, ...]:
    with torch.device("cpu"):  # whatever the caller's default is: spans outlive it
        spans = scheme.spans(kind, *merged, seconds)
    forms = [(span.coordinates.dtype, tuple(span.coordinates.shape)) for span in spans]
    sizes = [shape[-1] for _, shape in forms]
    if sum(sizes) != math.prod(merged) or forms != [(torch.int64, (3, size)) for size in sizes]:
        raise ValueError(
            f"{scheme} must give int64 coordinates [3, tokens] for the {math.prod(merged)} tokens "
            f"of a grid of {merged} merged tokens; it gives {forms}"
        )
    return spans


_spans_of_page = lru_cache(maxsize=256)(_made)
_spans_of_clip = lru_cache(maxsize=16)(_made)
