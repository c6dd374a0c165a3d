"""Row and column of each patch, in the order in which the vision tower reads them."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int64
from torch import Tensor


def vision_position_ids(
    grid_thw: Int64[Tensor, "G 3"], spatial_merge_size: int
) -> Int64[Tensor, "P 2"]:
    """`(row, column)` of each patch of each grid, 2 x 2 neighbours behind one another.

    `transformers` computes the same inside the tower, in a loop over images that is slow for many
    small ones; it takes ours from the call where it finds them there.
    """
    grids = [tuple(grid) for grid in grid_thw.tolist()]
    return torch.cat([_of_grid(*grid, spatial_merge_size) for grid in grids])


@functools.lru_cache(maxsize=1024)
def _of_grid(frames: int, height: int, width: int, merge: int) -> Int64[Tensor, "P 2"]:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    both = torch.stack([rows, columns], dim=-1)  # [height, width, 2]
    blocks = both.unflatten(0, (-1, merge)).unflatten(2, (-1, merge))
    ordered = blocks.transpose(1, 2).reshape(-1, 2)  # [height * width, 2]
    return ordered.repeat(frames, 1)
