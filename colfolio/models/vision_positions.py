"""Where patches lie: row and column, attention window, and place among learned embeddings."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import vision_utils

from colfolio.batch import offsets_of


def vision_position_ids(
    grid_thw: Int64[Tensor, "G 3"], spatial_merge_size: int
) -> Int64[Tensor, "P 2"]:
    """`(row, column)` of each patch of each grid, 2 x 2 neighbours behind one another.

    `transformers` computes the same inside the tower, in a loop over images that is slow for many
    small ones; it takes ours from the call where it finds them there.
    """
    grids = [tuple(grid) for grid in grid_thw.tolist()]
    return torch.cat([_of_grid(*grid, spatial_merge_size) for grid in grids])


def vision_windows(
    grid_thw: Int64[Tensor, "G 3"], spatial_merge_size: int, side: int
) -> tuple[Int64[Tensor, " V"], Int64[Tensor, "windows_and_one"]]:
    """Visual tokens in the order of attention windows, and where each window's patches begin.

    Windows do not reach over a frame's edge, where they are smaller. Within a frame those of equal
    size stand behind one another, so that they share a call; for attention their order is nothing.
    Source: Qwen2.5-VL, arXiv:2502.13923, section 2.1.

    Args:
        side: tokens along each side of a window.
    """
    merge = spatial_merge_size
    order, lengths, start = [], [], 0
    for frames, height, width in grid_thw.tolist():
        rows, columns = height // merge, width // merge
        in_frame, sizes = _windows_of_frame(rows, columns, side)
        starts = start + torch.arange(frames) * rows * columns
        order.append((starts.unsqueeze(1) + in_frame).flatten())
        lengths.append((sizes * merge**2).repeat(frames))
        start += frames * rows * columns
    return torch.cat(order), offsets_of(torch.cat(lengths))


def interpolation(
    visual: Any, grid_thw: Int64[Tensor, "G 3"], spatial_merge_size: int
) -> dict[str, Tensor]:
    """Which learned position embeddings of a tower, with which weights, make those of each patch.

    Returns:
        Keywords of a call of the tower.
    """
    side = visual.num_grid_per_side
    if not hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
        # named otherwise in the first versions of transformers 5
        bilinear: Any = vision_utils.get_vision_bilinear_indices_and_weights
        indices, weights = bilinear(grid_thw, side, spatial_merge_size)
        return {"bilinear_indices": indices, "bilinear_weights": weights}
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid_thw,
        side,
        visual.interpolation_mode,
        visual.interpolation_align_corners,
        spatial_merge_size,
    )
    return {"interp_indices": indices, "interp_weights": weights}


@functools.lru_cache(maxsize=1024)
def _windows_of_frame(
    rows: int, columns: int, side: int
) -> tuple[Int64[Tensor, " V"], Int64[Tensor, " windows"]]:
    """Tokens of a frame window by window, the largest windows first, and tokens of each."""
    down, across = torch.arange(rows) // side, torch.arange(columns) // side
    window = (down.unsqueeze(1) * (columns // side + 1) + across).flatten()  # [rows * columns]
    _, window, sizes = window.unique(return_inverse=True, return_counts=True)
    by_size = sizes.argsort(descending=True, stable=True)
    return by_size.argsort()[window].argsort(stable=True), sizes[by_size]


@functools.lru_cache(maxsize=1024)
def _of_grid(frames: int, height: int, width: int, merge: int) -> Int64[Tensor, "P 2"]:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    both = torch.stack([rows, columns], dim=-1)  # [height, width, 2]
    blocks = both.unflatten(0, (-1, merge)).unflatten(2, (-1, merge))
    ordered = blocks.transpose(1, 2).reshape(-1, 2)  # [height * width, 2]
    return ordered.repeat(frames, 1)
