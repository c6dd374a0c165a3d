"""Multimodal rotary positions (M-RoPE): three position ids a token, from token types and grids.

Text advances all three rows together, one a token. An image or clip of a grid of `T x H x W` merged
tokens takes the positions `start + (t, h, w)`; the text behind it goes on at one more than the
largest position so far. Every sequence of a packed batch starts at 0. Source: Qwen2-VL,
arXiv:2409.12191, section 2.1 (figure 3), and `get_rope_index` of its published code.

Letters: N tokens of all sequences, G grids, V visual tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2


def position_ids(
    token_types: Tensor,
    offsets: Tensor,
    grid_thw: Tensor,
    spatial_merge_size: int = 2,
) -> Tensor:
    """Position ids of a packed batch, by the scheme of Qwen2-VL.

    Args:
        token_types: int `[N]`: 0 text, 1 image placeholder, 2 video placeholder.
        offsets: int64 `[rows + 1]`, where each sequence begins.
        grid_thw: int64 `[G, 3]`: patches in time, height and width of each image or clip, in the
            order in which their placeholders stand; on the device of `token_types`.
        spatial_merge_size: patches merged into one token along height, and along width.

    Returns:
        int64 `[3, N]`: temporal, height and width positions.

    Raises:
        ValueError: a grid does not divide by the merge size, or the placeholders of a sequence do
            not add up to its grids.
    """
    merge = torch.tensor([1, spatial_merge_size, spatial_merge_size], device=grid_thw.device)
    misfit = (grid_thw % merge).any(dim=1) | (grid_thw < 1).any(dim=1)
    if misfit.any():
        grid = int(misfit.nonzero()[0])
        raise ValueError(
            f"grid {grid} is {grid_thw[grid].tolist()}: its sides must be positive, height and "
            f"width multiples of the merge size {spatial_merge_size}"
        )
    merged = grid_thw // merge  # [G, 3]
    visual = token_types != TEXT  # [N]
    sizes = merged.prod(dim=1)  # [G]
    first = _first_tokens(visual, sizes, offsets)  # [G]
    # A token advances its sequence by 1 if it is text, a grid by its longest side if it is visual:
    # the advance of a grid is booked on its first token, and the other visual tokens add nothing.
    advance = (~visual).long()
    advance[first] = merged.amax(dim=1)
    so_far = torch.cat([advance.new_zeros(1), advance.cumsum(0)])  # [N + 1], over the whole batch
    lengths = offsets.diff().to(advance.device)
    start = so_far[:-1] - so_far[offsets[:-1].to(advance.device)].repeat_interleave(lengths)  # [N]
    positions = start.expand(3, -1).clone()
    positions[:, visual] = start[first].repeat_interleave(sizes) + _grid_coordinates(merged, sizes)
    return positions


def _grid_coordinates(merged: Tensor, sizes: Tensor) -> Tensor:
    """`(t, h, w)` of each token of each grid, row-major: int64 `[3, V]`."""
    begin = sizes.cumsum(0) - sizes
    index = torch.arange(int(sizes.sum()), device=merged.device) - begin.repeat_interleave(sizes)
    height, width = merged[:, 1].repeat_interleave(sizes), merged[:, 2].repeat_interleave(sizes)
    return torch.stack([index // (height * width), index // width % height, index % width])


def _first_tokens(visual: Tensor, sizes: Tensor, offsets: Tensor) -> Tensor:
    """Index of the first placeholder of each grid: int64 `[G]`."""
    where = visual.nonzero()[:, 0]  # [V]
    rows = torch.searchsorted(offsets.to(where.device), where, right=True) - 1  # [V]
    if len(where) != int(sizes.sum()):
        raise ValueError(_misfit(where.tolist(), rows.tolist(), sizes.tolist()))
    begin = sizes.cumsum(0) - sizes
    first, last = begin, begin + sizes - 1
    if ((where[last] - where[first] + 1 != sizes) | (rows[first] != rows[last])).any():
        raise ValueError(_misfit(where.tolist(), rows.tolist(), sizes.tolist()))
    return where[first]


def _misfit(where: list[int], rows: list[int], sizes: list[int]) -> str:
    """The first grid whose placeholders do not stand in one run of one row, or what is left."""
    begin = 0
    for grid, size in enumerate(sizes):
        if begin == len(where):
            return f"grid {grid} needs {size} placeholder tokens, but all are taken"
        token, row, found = where[begin], rows[begin], 0
        while (
            begin < len(where)
            and found < size
            and (where[begin], rows[begin])
            == (
                token + found,
                row,
            )
        ):
            begin, found = begin + 1, found + 1
        if found < size:
            return (
                f"row {row}: grid {grid} needs {size} placeholder tokens in one run from token "
                f"{token} on, found {found}"
            )
    return f"row {rows[begin]}: placeholder token {where[begin]} belongs to no grid"
