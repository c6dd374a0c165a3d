"""Why token types and grids do not fit each other, in words that name the row.

Slow and plain, for the moment after a check has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from .schemes import IMAGE, KINDS, TEXT, VIDEO, Span


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


def first_misfit(types: list[int | None], offsets: list[int], visuals: list[Visuals]) -> str:
    """The first token that no grid explains, or else the first grid that no token is left for.

    Args:
        types: token types, None where there is padding.
        offsets: where each row begins, and where the last ends.
    """
    waiting = {kind.kind: _Waiting(kind) for kind in visuals}
    for row, (begin, end) in enumerate(pairwise(offsets)):
        place = begin
        while place < end:
            kind = types[place]
            if kind in (IMAGE, VIDEO):
                if kind not in waiting:
                    return (
                        f"row {row}: token {place - begin} is a placeholder of {KINDS[kind]}s, but "
                        f"{KINDS[kind]}_grid_thw is missing"
                    )
                size, misfit = waiting[kind].take(types, place, begin, end)
                if misfit:
                    return f"row {row}: {misfit}"
                place += size
            elif kind in (TEXT, None):
                place += 1
            else:
                return (
                    f"row {row}: token {place - begin} has type {kind}; known are 0 (text), "
                    "1 (image) and 2 (video)"
                )
    left = [kind.leftover() for kind in waiting.values() if kind.leftover()]
    return left[0] if left else f"token types and offsets {offsets} do not fit"


def row_of_placeholder(is_kind: Tensor, offsets: Tensor, number: int) -> str:
    """`row r` of the placeholder of a kind with this number, or why there is none.

    Args:
        is_kind: bool `[tokens]`, the placeholders of the kind.
    """
    if is_kind.device.type == "meta":
        return "a row whose tokens cannot be read"
    places = is_kind.nonzero()[:, 0].tolist()
    if number >= len(places):
        return "no row has placeholders left for it"
    rows = [row for row, begin in enumerate(offsets[:-1].tolist()) if begin <= places[number]]
    return f"row {rows[-1]}"


class _Waiting:
    """The spans of one kind that no tokens have been found for yet."""

    def __init__(self, visuals: Visuals) -> None:
        self.visuals = visuals
        self.next = 0
        self.last_end: int | None = None

    def take(self, types: list[int | None], place: int, begin: int, end: int) -> tuple[int, str]:
        """Tokens that the next span takes from `place` on, and what is wrong with them, if so."""
        visuals, name = self.visuals, KINDS[self.visuals.kind]
        if self.next == len(visuals.spans):
            return 0, (
                f"token {place - begin} is a placeholder of {name}s, but belongs to no grid: "
                f"all {len(visuals.sides)} of {name}_grid_thw are taken"
            )
        grid, size = visuals.grids[self.next], visuals.sizes[self.next]
        run = 0
        while place + run < end and run < size and types[place + run] == visuals.kind:
            run += 1
        told = f"{name} grid {grid} ({visuals.sides[grid]})"
        if run < size:
            return 0, (
                f"{told} needs {size} placeholder tokens in one run from token {place - begin} on, "
                f"found {run}"
            )
        if self.next and visuals.grids[self.next - 1] == grid and self.last_end is not None:
            if self.last_end <= begin:
                return 0, f"{told} has frames in this row and in one before it"
            if self.last_end == place:
                return 0, (
                    f"{told} has two frames without text between at token {place - begin}; its "
                    "scheme tells their time by text"
                )
        self.next, self.last_end = self.next + 1, place + size
        return size, ""

    def leftover(self) -> str:
        visuals, name = self.visuals, KINDS[self.visuals.kind]
        if self.next == len(visuals.spans):
            return ""
        grid = visuals.grids[self.next]
        num_found = visuals.grids[: self.next].count(grid)
        if num_found:
            return (
                f"{name} grid {grid} ({visuals.sides[grid]}) has placeholders for {num_found} of "
                f"its {visuals.grids.count(grid)} frames"
            )
        return (
            f"{name} grid {grid} ({visuals.sides[grid]}) is left over: the placeholders of all "
            f"rows are taken by the {grid} grids before it"
        )
