"""One forward as the guard saw it: its inputs, the ids that were used, and the ids expected.

Letters: B rows, L padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .positions import padded_position_ids
from .schemes import IMAGE, TEXT, VIDEO, Scheme, Span


class Contradiction(NamedTuple):
    """A row whose token ids and token types do not agree, and where first, in words."""

    row: int
    told: str


@dataclass(frozen=True, eq=False)
class Past:
    """What a call of text finds in a cache of keys and values.

    Args:
        length: tokens in each row of the cache, padding counted.
        num_real: int64 `[B]`, those of them that are no padding.
        next: `[3, B]`, where the scheme puts the text that follows. Where all ids in the cache are
            off by a constant, so is this.
        deltas: int64 `[B]`, by how much that differs from `num_real`, such a constant apart.
    """

    length: int
    num_real: Tensor
    next: Tensor
    deltas: Tensor

    def row(self, number: int) -> Past:
        """That of one row."""
        at = slice(number, number + 1)
        return Past(self.length, self.num_real[at], self.next[:, at], self.deltas[at])


@dataclass(frozen=True, eq=False)
class Call:
    """What one forward was given, and the position ids that reached its rotary embedding.

    Args:
        seen: `[3, B, L]`, the ids that were used.
        token_types: int `[B, L]`: 0 text, 1 image, 2 video; None if not known.
        scheme: that the model was trained with.
        attention_mask: `[B, L]`, 0 at padding; None if there is none.
        image_grid_thw, video_grid_thw, spatial_merge_size, second_per_grid_ts: as in
            `padded_position_ids`.
        rope_deltas: what the model itself kept from before this call.
        past: what is in the cache of keys and values that a call of text goes on behind.
        unjudged: why this call cannot be judged, if so.
        is_step: the call goes on behind a cache, its past known or not.
        contradictions: rows whose token ids say other types than `token_types`.
        is_told: its grids were given to the guard, and may be those of another call.
        premise: what was taken for granted about the call, as a sentence without its full stop.
    """

    seen: Tensor
    token_types: Tensor | None
    scheme: Scheme
    attention_mask: Tensor | None = None
    image_grid_thw: Tensor | None = None
    video_grid_thw: Tensor | None = None
    spatial_merge_size: int = 2
    second_per_grid_ts: Tensor | Sequence[float] | None = None
    rope_deltas: Tensor | None = None
    past: Past | None = None
    unjudged: str | None = None
    is_step: bool = False
    contradictions: tuple[Contradiction, ...] = ()
    is_told: bool = False
    premise: str = ""

    @cached_property
    def types(self) -> Tensor:
        """Token types int64 `[B, L]`, those of padding as text."""
        if self.token_types is None:
            raise ValueError(f"a call without token types cannot be judged: {self.unjudged}")
        return self.token_types.long().where(self.real, TEXT)

    @cached_property
    def real(self) -> Tensor:
        """Bool `[B, L]`: what is no padding."""
        if self.attention_mask is None:
            return torch.ones(self.seen.shape[1:], dtype=torch.bool)
        return self.attention_mask.bool()

    @property
    def seconds(self) -> list[float] | None:
        """Seconds a temporal step of each clip, where the scheme has a use for them."""
        given = self.second_per_grid_ts
        if given is None or not self.scheme.needs_seconds:
            return None
        return [float(step) for step in given]

    @property
    def expected(self) -> Tensor | None:
        """Position ids `[3, B, L]` of the scheme; None if the call does not fit itself."""
        return self._computed[0]

    @property
    def why_unjudged(self) -> str | None:
        """Why this call cannot be judged, if so."""
        if self.unjudged:
            return self.unjudged
        if self.token_types is None:
            return "the token types of the call are not known"
        for name, given in (("token types", self.token_types), ("mask", self.attention_mask)):
            if given is not None and given.shape != self.seen.shape[1:]:
                return (
                    f"{name} must be [batch, length] as the ids that reached the rotary embedding, "
                    f"{list(self.seen.shape[1:])}, received {list(given.shape)}"
                )
        return None

    @property
    def misfit(self) -> str:
        """Why there are no expected ids, or nothing."""
        return self._computed[1]

    @cached_property
    def deltas(self) -> list[int]:
        """The rope delta of each row that has any: what text behind it adds to its place."""
        if self.why_unjudged or self.past is not None or self.expected is None:
            return []
        rows = zip(self.expected.unbind(1), self.real, strict=True)
        return [
            int(ids[:, real].max()) + 1 - int(real.sum()) if real.any() else 0 for ids, real in rows
        ]

    @cached_property
    def right_rows(self) -> Tensor:
        """Bool `[B]`: rows whose ids are those expected."""
        if self.why_unjudged or self.expected is None:
            return torch.zeros(self.seen.shape[1], dtype=torch.bool)
        return ((self.seen == self.expected) | ~self.real).all(-1).all(0)

    def followed(self, length: int, mask: Tensor | None) -> Past | None:
        """What a call finds in the cache that this one began, if only text was added since.

        Args:
            length: of the cache by then.
            mask: `[B, length or more]`, 0 at padding, if it is known.
        """
        num_rows, own = self.seen.shape[1:]
        if self.why_unjudged or self.contradictions or self.expected is None or length < own:
            return None
        if not self.real.any(1).all():
            return None
        since = torch.full((num_rows,), length - own)
        if mask is not None and len(mask) == num_rows and mask.shape[1] >= length:
            since = mask[:, own:length].bool().sum(1)
        starts = []
        for ids, seen, real in zip(
            self.expected.unbind(1), self.seen.unbind(1), self.real, strict=True
        ):
            off = (seen - ids)[:, real]  # [3, tokens]
            shift = off[:, 0] if (off == off[:, :1]).all() else torch.zeros_like(off[:, 0])
            starts.append(ids[:, real].max() + 1 + shift)
        return Past(
            length,
            self.real.sum(1) + since,
            torch.stack(starts, dim=1) + since,
            torch.tensor(self.deltas),
        )

    def rows(self) -> list[Call]:
        """Each row as a call of its own, with its own grids; without any if they do not fit."""
        images = self._grids_of_rows(IMAGE, self.image_grid_thw)
        videos = self._grids_of_rows(VIDEO, self.video_grid_thw)
        seconds, begun, calls = self.seconds, 0, []
        for row in range(len(self.types)):
            at, end = slice(row, row + 1), begun + len(videos[row])
            calls.append(
                replace(
                    self,
                    seen=self.seen[:, at],
                    token_types=self.types[at],
                    attention_mask=self.real[at],
                    image_grid_thw=images[row],
                    video_grid_thw=videos[row],
                    second_per_grid_ts=None if seconds is None else seconds[begun:end],
                    past=None if self.past is None else self.past.row(row),
                )
            )
            begun = end
        return calls

    def fitted(self) -> Call:
        """This call; with its grids repeated if its rows are, as the beams of a search are."""
        if self.why_unjudged or self.expected is not None:
            return self
        num_rows = len(self.types)
        for count in (count for count in range(2, num_rows + 1) if num_rows % count == 0):
            seen, types, real = self.seen[:, ::count], self.types[::count], self.real[::count]
            alike = ((types, self.types), (real, self.real))
            if not all(torch.equal(a.repeat_interleave(count, 0), b) for a, b in alike):
                continue
            once = replace(self, seen=seen, token_types=types, attention_mask=real)
            if once.expected is None:
                continue
            rows = [row for row in once.rows() for _ in range(count)]
            seconds = [step for row in rows for step in row.seconds or []]
            names = ("image_grid_thw", "video_grid_thw")
            grids = {name: torch.cat([getattr(row, name) for row in rows]) for name in names}
            return replace(self, **grids, second_per_grid_ts=seconds or None)
        return self

    def spans(self) -> list[tuple[Tensor, Span]]:
        """Where each span of a call of one row stands, in order: its tokens' places, and itself."""
        found, merge = [], self.spatial_merge_size
        for kind, grid_thw in ((IMAGE, self.image_grid_thw), (VIDEO, self.video_grid_thw)):
            places = (self.types[0] == kind).nonzero()[:, 0]
            sides = [] if grid_thw is None else grid_thw.tolist()
            seconds = (self.seconds if kind == VIDEO else None) or [None] * len(sides)
            for (frames, height, width), step in zip(sides, seconds, strict=True):
                for span in self.scheme.spans(kind, frames, height // merge, width // merge, step):
                    found.append((places[: span.size], span))
                    places = places[span.size :]
        return sorted(found, key=lambda run: int(run[0][0]))

    def _grids_of_rows(self, kind: int, grid_thw: Tensor | None) -> list[Tensor]:
        """The grids of each row, by the number of its placeholders."""
        num_rows = len(self.types)
        if grid_thw is None or self.expected is None:
            return [torch.zeros(0, 3, dtype=torch.int64)] * num_rows
        ends = (grid_thw.prod(1) // self.spatial_merge_size**2).cumsum(0)
        rows = torch.searchsorted((self.types == kind).sum(1).cumsum(0), ends)
        return [grid_thw[rows == row] for row in range(num_rows)]

    @cached_property
    def _computed(self) -> tuple[Tensor | None, str]:
        if self.past is not None:
            places = self.real.cumsum(1) - 1  # [B, L]
            return (self.past.next[..., None] + places).where(self.real, 0), ""
        try:
            ids = padded_position_ids(
                *(self.types, self.attention_mask, self.image_grid_thw, self.video_grid_thw),
                *(self.scheme, self.spatial_merge_size, self.seconds),
            )
        except ValueError as error:
            return None, str(error)
        return ids, ""
