"""Why token types and grids do not fit each other, in words that name the row.

Slow and plain, for the moment after a check has failed.
"""

from __future__ import annotations

from itertools import pairwise

from .grids import Visuals
from .schemes import IMAGE, KINDS, TEXT, VIDEO


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
                size, misfit = waiting[kind].take(types, row, place, begin, end)
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


def row_of_next_grid(types: list[int | None], offsets: list[int], visuals: Visuals) -> str:
    """`row r` in which the placeholders of the next grid of a kind stand, or that there are none.

    Raises:
        ValueError: the grids before it do not fit; names that row.
    """
    waiting = _Waiting(visuals)
    for row, (begin, end) in enumerate(pairwise(offsets)):
        place = begin
        while place < end:
            if types[place] != visuals.kind:
                place += 1
                continue
            if waiting.is_done:
                return f"row {row}"
            size, misfit = waiting.take(types, row, place, begin, end)
            if misfit:
                raise ValueError(f"row {row}: {misfit}")
            place += size
    if waiting.leftover():
        raise ValueError(waiting.leftover())
    return "no row has placeholders left for it"


class _Waiting:
    """The spans of one kind that no tokens have been found for yet."""

    def __init__(self, visuals: Visuals) -> None:
        self.visuals = visuals
        self.next = 0
        self.last_end = -1
        self.last_row = -1

    @property
    def is_done(self) -> bool:
        return self.next == len(self.visuals.spans)

    def take(
        self, types: list[int | None], row: int, place: int, begin: int, end: int
    ) -> tuple[int, str]:
        """Tokens that the next span takes from `place` on, and what is wrong with them, if so."""
        visuals, name = self.visuals, KINDS[self.visuals.kind]
        if self.is_done:
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
        if self.next and visuals.grids[self.next - 1] == grid:
            if self.last_row != row:
                return 0, f"{told} has frames in this row and in row {self.last_row}"
            if self.last_end == place:
                return 0, (
                    f"{told} has two frames without text between at token {place - begin}; its "
                    "scheme tells their time by text"
                )
        self.next, self.last_end, self.last_row = self.next + 1, place + size, row
        return size, ""

    def leftover(self) -> str:
        """Which grid no placeholders are left for, and behind which row; nothing if none is."""
        visuals, name = self.visuals, KINDS[self.visuals.kind]
        if self.is_done:
            return ""
        grid = visuals.grids[self.next]
        told = f"{name} grid {grid} ({visuals.sides[grid]})"
        num_found = visuals.grids[: self.next].count(grid)
        if num_found:
            num_frames = visuals.grids.count(grid)
            return (
                f"row {self.last_row}: {told} has placeholders for {num_found} of its "
                f"{num_frames} frames"
            )
        if self.last_row < 0:
            return (
                f"{told} is left over: no row has placeholders of {name}s (token type "
                f"{self.visuals.kind})"
            )
        return (
            f"{told} is left over: behind row {self.last_row}, with grid {grid - 1}, no row has "
            f"placeholders of {name}s"
        )
