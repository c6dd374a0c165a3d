"""Frames to the flat patches and grids that a vision tower of the Qwen-VL families reads.

Equal to `Qwen2VLImageProcessorPil` of `transformers` for images. Letters: T frames, H x W pixels,
P patches of 14 x 14 or 16 x 16 pixels and 2 frames, in the order in which 2 x 2 of them merge into
one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from colfolio.config import Settings
from colfolio.data.pages.images import MAX_ASPECT
from colfolio.errors import DocumentError

Channels = tuple[float, float, float]

# "_": clips of one call may differ in every size
Frames = UInt8[np.ndarray, "_T _H _W 3"]


class PixelBudget(Settings):
    """How large an image enters the model: its sides become multiples of `patch * merge` pixels.

    Pixel counts bound height times width; a token covers `(patch * merge) ** 2` of them. Of each
    channel, in 0..1, `mean` is taken away, and the rest divided by `std`; as a rule those of
    OpenAI's CLIP, which Qwen2-VL and Qwen2.5-VL keep.
    """

    min_pixels: int = Field(default=56 * 56, ge=1)
    max_pixels: int = 768 * 28 * 28
    patch: int = Field(default=14, ge=1)
    merge: int = Field(default=2, ge=1)
    temporal_patch: int = Field(default=2, ge=1)
    mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    std: Channels = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _check_order(self) -> PixelBudget:
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        if not all(map(math.isfinite, self.mean)) or not all(
            0 < one < math.inf for one in self.std
        ):
            raise ValueError(
                "mean must be finite and std above 0 and finite, received "
                f"mean {self.mean} and std {self.std}"
            )
        return self

    @property
    def factor(self) -> int:
        """Pixels along the side of one token."""
        return self.patch * self.merge

    @property
    def patch_dim(self) -> int:
        """Numbers in one flat patch of three channels."""
        return 3 * self.temporal_patch * self.patch * self.patch


def target_size(height: int, width: int, budget: PixelBudget) -> tuple[int, int]:
    """Height and width, multiples of the budget's factor, nearest to the given ones in the budget.

    Raises:
        DocumentError: the image has no area, or one side is over 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise DocumentError(
            f"image of {height} x {width} pixels",
            f"it has no area, or one side is over {MAX_ASPECT} times the other; cut it first",
        )
    factor = budget.factor
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > budget.max_pixels:
        shrink = math.sqrt(height * width / budget.max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def to_patches(
    clips: Sequence[Frames], budget: PixelBudget
) -> tuple[Float[Tensor, "patches patch_dim"], Int64[Tensor, "clips 3"]]:
    """Resize, normalise and cut clips (an image is a clip of one frame) into flat patches.

    Returns:
        float32 patches of all clips in order, and `grid_thw` int64, one row a clip.
    """
    sized = [_resized(clip, budget) for clip in clips]
    cut: list[np.ndarray] = [np.empty(0)] * len(sized)
    grids = np.zeros((len(sized), 3), dtype=np.int64)
    for shape in {clip.shape for clip in sized}:  # images of one size are cut in one go
        rows = [row for row, clip in enumerate(sized) if clip.shape == shape]
        together, grid = _cut(np.stack([sized[row] for row in rows]), budget)
        for row, patches in zip(rows, together, strict=True):
            cut[row], grids[row] = patches, grid
    patches = np.concatenate(cut) if cut else np.empty((0, budget.patch_dim), dtype=np.float32)
    return torch.from_numpy(patches), torch.from_numpy(grids)


def _resized(clip: Frames, budget: PixelBudget) -> Frames:
    height, width = target_size(clip.shape[1], clip.shape[2], budget)
    if clip.shape[1:3] != (height, width):
        size = (width, height)
        frames = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in clip]
        clip = np.stack([np.asarray(frame) for frame in frames])
    missing = -len(clip) % budget.temporal_patch
    return np.concatenate([clip, clip[-1:].repeat(missing, 0)]) if missing else clip


def _cut(clips: np.ndarray, budget: PixelBudget) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Clips `[n, T, H, W, 3]` of one size to patches `[n, P, patch_dim]` and their common grid."""
    count, frames, height, width, _ = clips.shape
    patch, merge, depth = budget.patch, budget.merge, budget.temporal_patch
    grid = (frames // depth, height // patch, width // patch)
    blocks = clips.reshape(
        count, grid[0], depth, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3
    )
    # [n, t, h_block, w_block, h_in_block, w_in_block, channel, frame, y, x]
    blocks = blocks.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    mean, std = (
        np.array(each, dtype=np.float32).reshape(3, 1, 1, 1) for each in (budget.mean, budget.std)
    )
    scale, shift = 1 / (255 * std), -mean / std
    pixels = blocks.astype(np.float32, order="C")
    pixels *= scale
    pixels += shift
    return pixels.reshape(count, grid[0] * grid[1] * grid[2], budget.patch_dim), grid
