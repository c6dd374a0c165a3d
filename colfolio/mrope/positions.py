"""Multimodal rotary positions (M-RoPE): three position ids a token, from token types and grids.

Text advances all three rows together, one a token. The tokens of an image or clip take coordinates
relative to where they start, and move what follows, as a scheme says (`schemes.py`). Every sequence
starts at 0. Source: Qwen2-VL, arXiv:2409.12191, section 2.1, and `get_rope_index` of its family.

The coordinates of each grid are made once and kept. A batch is then a few cumulative sums and one
gather: no loop over tokens, and nothing that waits for a device.

Letters: N tokens of all sequences, B sequences, L padded length, G grids, S spans, V visual tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .misfits import Visuals, first_misfit, row_of_placeholder
from .schemes import IMAGE, KINDS, TEXT, VIDEO, Scheme, Span, scheme_of


def position_ids(
    token_types: Tensor,
    offsets: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    scheme: str | Scheme = "qwen2_vl",
    spatial_merge_size: int = 2,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Position ids of a packed batch.

    Args:
        token_types: int `[N]`: 0 text, 1 image placeholder, 2 video placeholder.
        offsets: int64 `[B + 1]`, where each sequence begins, and N.
        image_grid_thw: int64 `[G, 3]`: patches in time, height and width of each image, in the
            order of their placeholders. On the CPU; from a device they are copied first.
        video_grid_thw: the same for clips.
        scheme: a name in `SCHEMES`, or a scheme.
        spatial_merge_size: patches merged into one token along height, and along width.
        second_per_grid_ts: seconds between the temporal steps of each clip, for schemes of absolute
            time; 1 if unset.

    Returns:
        int64 `[3, N]`, on the device of `token_types`: temporal, height and width positions.

    Raises:
        ValueError: grids and placeholders do not fit each other; names the row. A misfit of token
            types on a CUDA device stops the kernel instead: to name it would wait for the device.
    """
    if offsets.device.type == "cpu" and not _cover(offsets, len(token_types)):
        raise ValueError(
            f"offsets must start at 0, never fall, and end at the number of tokens, "
            f"{len(token_types)}; received {offsets.tolist()}"
        )
    tokens = _Tokens(token_types, None, offsets)
    grids = (image_grid_thw, video_grid_thw)
    visuals = _visuals(tokens, grids, scheme_of(scheme), spatial_merge_size, second_per_grid_ts)
    return _placed(tokens, visuals)


def padded_position_ids(
    mm_token_type_ids: Tensor,
    attention_mask: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    scheme: str | Scheme = "qwen2_vl",
    spatial_merge_size: int = 2,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Position ids of a padded batch, as `get_rope_index` of `transformers` returns them.

    Args:
        mm_token_type_ids: int `[B, L]`: 0 text, 1 image placeholder, 2 video placeholder.
        attention_mask: `[B, L]`, 0 at padding, on either side; None if there is none.
        image_grid_thw, video_grid_thw, scheme, spatial_merge_size, second_per_grid_ts: as in
            `position_ids`.

    Returns:
        int64 `[3, B, L]`; 0 at padding.

    Raises:
        ValueError: as in `position_ids`.
    """
    mask_shape = None if attention_mask is None else attention_mask.shape
    if mm_token_type_ids.ndim != 2 or mask_shape not in {None, mm_token_type_ids.shape}:
        raise ValueError(
            "mm_token_type_ids must be [batch, length] and attention_mask alike, received "
            f"{list(mm_token_type_ids.shape)} and {mask_shape and list(mask_shape)}"
        )
    rows, length = mm_token_type_ids.shape
    types = mm_token_type_ids.flatten()  # [B * L]
    offsets = torch.arange(rows + 1, device="cpu") * length
    real = (
        None
        if attention_mask is None
        else attention_mask.flatten().to(types.device, torch.bool, non_blocking=True)
    )
    tokens = _Tokens(types, real, offsets)
    grids = (image_grid_thw, video_grid_thw)
    visuals = _visuals(tokens, grids, scheme_of(scheme), spatial_merge_size, second_per_grid_ts)
    return _placed(tokens, visuals).unflatten(1, (rows, length))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Types int `[N]`, which of them are real (None: all), and where each sequence begins."""

    types: Tensor
    real: Tensor | None
    offsets: Tensor

    def of_kind(self, kind: int) -> Tensor:
        """Which tokens are real and of this type: bool `[N]`."""
        found = self.types == kind
        return found if self.real is None else found.logical_and_(self.real)

    def num_real(self) -> Tensor | int:
        return len(self.types) if self.real is None else self.real.sum()

    def kept(self) -> list[int | None]:
        """The types, None where no token is real."""
        types = self.types.tolist()
        real = [True] * len(types) if self.real is None else self.real.tolist()
        return [kind if is_real else None for kind, is_real in zip(types, real, strict=True)]


def _cover(offsets: Tensor, num_tokens: int) -> bool:
    return (
        len(offsets) > 0
        and bool(offsets[0] == 0)
        and bool(offsets[-1] == num_tokens)
        and not (offsets.diff() < 0).any()
    )


def _placed(tokens: _Tokens, visuals: list[Visuals]) -> Tensor:
    """Positions int64 `[3, N]`: where each token's sequence stands, and its place in its grid."""
    if visuals and len(tokens.types) == 0:
        raise ValueError(first_misfit([], tokens.offsets.tolist(), visuals))
    device = tokens.types.device
    bounds = tokens.offsets.to(device, non_blocking=True)
    num_visual = sum(kind.num_tokens for kind in visuals)
    text = tokens.of_kind(TEXT)
    advance = text.long()  # by how much each token moves what stands behind it
    fits = text.sum() + num_visual == tokens.num_real()
    place: Tensor | int = num_visual  # each token's column in the coordinates: that of no place
    begun = 0
    for kind in visuals:
        is_kind = tokens.of_kind(kind.kind)
        count = is_kind.cumsum(0)  # [N]
        last, moves, stand_well = _ends(kind, count, bounds)
        advance[last] = moves  # that of a span is booked on its last token
        fits = fits & stand_well
        place = torch.where(is_kind, count.add_(begun - 1), place)
        begun += kind.num_tokens
    _stop_at_misfit(fits, tokens, visuals)
    start = _starts(advance, bounds)
    if tokens.real is not None:
        start.masked_fill_(~tokens.real, 0)
    if isinstance(place, int):
        return start.expand(3, -1).contiguous()
    return _coordinates(visuals, device).gather(1, place.expand(3, -1)).add_(start)


def _starts(advance: Tensor, bounds: Tensor) -> Tensor:
    """How far what stands before each token has moved its sequence: int64 `[N]`."""
    so_far = advance.new_zeros(len(advance) + 1)  # over all sequences
    torch.cumsum(advance, 0, out=so_far[1:])
    at_first = so_far[bounds[:-1]].repeat_interleave(bounds.diff(), output_size=len(advance))
    return so_far[:-1] - at_first


def _coordinates(visuals: list[Visuals], device: torch.device) -> Tensor:
    """Coordinates of all visual tokens, and zeros for what is not visual: int64 `[3, V + 1]`."""
    columns = [span.coordinates for kind in visuals for span in kind.spans]
    columns.append(torch.zeros(3, 1, dtype=torch.int64, device="cpu"))
    return torch.cat(columns, dim=1).to(device, non_blocking=True)


def _ends(kind: Visuals, count: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Last token `[S]` and advance `[S]` of each span of a kind, and whether all stand well.

    They stand well if each is one run of tokens in one row, and if the spans of one grid share a
    row and have text between. Where they do not, the token numbers are still valid ones.

    Args:
        count: int64 `[N]`, tokens of this kind up to and including each.
    """
    ends, sizes = list(accumulate(kind.sizes)), kind.sizes
    begins = [end - size + 1 for end, size in zip(ends, sizes, strict=True)]
    numbers = [begins, ends, sizes, [span.advance for span in kind.spans]]
    table = torch.tensor(numbers, device="cpu").to(count.device, non_blocking=True)  # [4, S]
    places = torch.searchsorted(count, table[:2])  # of each span's first and last token
    first, last = places[0], places[1]
    rows = torch.searchsorted(bounds, places, right=True)
    one_run = (last - first < table[2]) & (rows[0] == rows[1])
    stand_well = one_run.all() & (count[-1] == ends[-1])
    if len(kind.spans) > len(kind.sides):  # some grid has several
        same_grid = torch.tensor(kind.grids, device="cpu").diff() == 0
        same_grid = same_grid.to(count.device, non_blocking=True)
        apart = (first[1:] > last[:-1] + 1) & (rows[0, 1:] == rows[0, :-1])
        stand_well = stand_well & (apart | ~same_grid).all()
    return last.clamp(max=len(count) - 1), table[3], stand_well


def _stop_at_misfit(fits: Tensor, tokens: _Tokens, visuals: list[Visuals]) -> None:
    device = tokens.types.device.type
    if device == "cuda":
        told = "token types and grids do not fit: call with token types on the CPU to see the row"
        torch._assert_async(fits, told)  # pyright: ignore[reportPrivateImportUsage]
    elif device != "meta" and not fits:
        raise ValueError(first_misfit(tokens.kept(), tokens.offsets.tolist(), visuals))


def _visuals(
    tokens: _Tokens,
    grids: tuple[Tensor | None, Tensor | None],
    scheme: Scheme,
    merge: int,
    second_per_grid_ts: Tensor | Sequence[float] | None,
) -> list[Visuals]:
    """The spans of images and of clips, of kinds that have any."""
    num_clips = 0 if grids[1] is None else len(grids[1])
    if second_per_grid_ts is not None and len(second_per_grid_ts) and not num_clips:
        raise ValueError(f"second_per_grid_ts is set ({second_per_grid_ts}), but there is no clip")
    found = []
    for kind, grid_thw in zip((IMAGE, VIDEO), grids, strict=True):
        if grid_thw is None or len(grid_thw) == 0:
            continue
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
            raise ValueError(
                f"{KINDS[kind]}_grid_thw must be whole numbers [grids, 3], received "
                f"{grid_thw.dtype} {list(grid_thw.shape)}"
            )
        visuals = Visuals(kind, grid_thw.tolist())
        times = _seconds(second_per_grid_ts, len(grid_thw), kind, scheme)
        for grid, ((frames, height, width), seconds) in enumerate(
            zip(visuals.sides, times, strict=True)
        ):
            if frames < 1 or min(height, width) < merge or height % merge or width % merge:
                where = row_of_placeholder(tokens.of_kind(kind), tokens.offsets, visuals.num_tokens)
                raise ValueError(
                    f"{where}: {KINDS[kind]} grid {grid} is {visuals.sides[grid]}: its sides must "
                    f"be positive, height and width multiples of the merge size {merge}"
                )
            spans = _spans(scheme, kind, frames, height // merge, width // merge, seconds)
            visuals.add(grid, spans)
        found.append(visuals)
    return found


@lru_cache(maxsize=256)
def _spans(
    scheme: Scheme, kind: int, frames: int, height: int, width: int, seconds: float | None
) -> tuple[Span, ...]:
    with torch.device("cpu"):  # whatever the caller's default is: spans outlive it
        return scheme.spans(kind, frames, height, width, seconds)


def forget_grids() -> None:
    """Free the coordinates that are kept for grids seen before."""
    _spans.cache_clear()


def _seconds(
    given: Tensor | Sequence[float] | None, num_grids: int, kind: int, scheme: Scheme
) -> list[float] | list[None]:
    """Seconds a temporal step of each grid of a kind."""
    if given is None or kind != VIDEO:
        return [None] * num_grids
    seconds = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(seconds) != num_grids or not all(0 <= time < math.inf for time in seconds):
        raise ValueError(
            f"second_per_grid_ts must hold a time of at least 0 for each of {num_grids} clips, "
            f"received {seconds}"
        )
    if not scheme.needs_seconds:
        raise ValueError(f"second_per_grid_ts is set, but {scheme} has no use for time in seconds")
    return seconds
