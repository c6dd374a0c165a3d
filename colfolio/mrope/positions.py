"""Multimodal rotary positions (M-RoPE): three position ids a token, from token types and grids.

Text advances all three rows together, one a token. The tokens of an image or clip take coordinates
relative to where they start, and move what follows, as a scheme says (`schemes.py`). Every sequence
starts at 0. Source: Qwen2-VL, arXiv:2409.12191, section 2.1, and `get_rope_index` of its family.

The coordinates of each grid are made once and kept. A batch is then a few cumulative sums and one
gather: no loop over tokens, and nothing that waits for a device.

Letters: N tokens of all sequences, B sequences, L padded length, G grids, S spans, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .grids import GridError, Tokens, Visuals, check_tokens, visuals_of
from .misfits import first_misfit, row_of_next_grid
from .schemes import TEXT, Scheme, scheme_of


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
    check_tokens(token_types, offsets)
    tokens = Tokens(token_types, None, offsets)
    grids = (image_grid_thw, video_grid_thw)
    visuals = _fitting(tokens, grids, scheme, spatial_merge_size, second_per_grid_ts)
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
    types, real = mm_token_type_ids.flatten(), None  # [B * L]
    if attention_mask is not None:
        real = attention_mask.flatten().to(types.device, torch.bool, non_blocking=True)
    offsets = torch.arange(rows + 1, device="cpu") * length
    tokens = Tokens(types, real, offsets)
    grids = (image_grid_thw, video_grid_thw)
    visuals = _fitting(tokens, grids, scheme, spatial_merge_size, second_per_grid_ts)
    return _placed(tokens, visuals).unflatten(1, (rows, length))


def _fitting(
    tokens: Tokens,
    grids: tuple[Tensor | None, Tensor | None],
    scheme: str | Scheme,
    merge: int,
    second_per_grid_ts: Tensor | Sequence[float] | None,
) -> list[Visuals]:
    """The spans of all grids; a grid that cannot be cut is refused with the row it stands in."""
    try:
        return visuals_of(grids, scheme_of(scheme), merge, second_per_grid_ts)
    except GridError as bad:
        if tokens.types.device.type == "meta":
            raise
        row = row_of_next_grid(tokens.kept(), tokens.offsets.tolist(), bad.before)
        raise ValueError(f"{row}: {bad}") from None


def _placed(tokens: Tokens, visuals: list[Visuals]) -> Tensor:
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


def _stop_at_misfit(fits: Tensor, tokens: Tokens, visuals: list[Visuals]) -> None:
    device = tokens.types.device.type
    if device == "cuda":
        told = "token types and grids do not fit: call with token types on the CPU to see the row"
        torch._assert_async(fits, told)  # pyright: ignore[reportPrivateImportUsage]
    elif device != "meta" and not fits:
        raise ValueError(first_misfit(tokens.kept(), tokens.offsets.tolist(), visuals))
