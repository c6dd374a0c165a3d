"""Texts, images and clips to packed model inputs; positions are computed and passed explicitly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from colfolio.batch import Packed, offsets_of
from colfolio.data.patches import PixelBudget, target_size, to_patches
from colfolio.data.prompts import Prompter
from colfolio.data.video import Clip
from colfolio.mrope import IMAGE, TEXT, VIDEO, position_ids, scheme_of

# "_": images of one call may differ in size
Pixels = UInt8[np.ndarray, "_H _W 3"]


class Collator:
    """Packs queries and documents for one checkpoint.

    Args:
        prompter: templates and tokenizer.
        budget: how images are resized and cut.
        position_scheme: a name of `colfolio.mrope.SCHEMES`, or with settings as a contract has it.
    """

    def __init__(
        self,
        prompter: Prompter,
        budget: PixelBudget,
        position_scheme: str | Mapping[str, Any] = "qwen2_vl",
    ) -> None:
        self.prompter = prompter
        self.budget = budget
        self.scheme = scheme_of(position_scheme)

    def queries(self, texts: Sequence[str]) -> Packed:
        """One row a text."""
        patches, grids = to_patches([], self.budget)
        return self._packed(self.prompter.query_ids(texts), patches, grids, [])

    def documents(
        self, documents: Sequence[Pixels | Clip], behind: Sequence[list[int]] | None = None
    ) -> Packed:
        """One row an image or clip; `max_pixels` of the budget bounds each frame.

        Args:
            behind: token ids that each row goes on with, none of them visual.
        """
        clips = {row: each for row, each in enumerate(documents) if isinstance(each, Clip)}
        frames = [each.frames if isinstance(each, Clip) else each[None] for each in documents]
        patches, grids = to_patches(frames, self.budget)
        counts = (grids.prod(dim=1) // self.budget.merge**2).tolist()
        depth = self.budget.temporal_patch
        times = {row: _step_times(clip, depth) for row, clip in clips.items()}
        ids = self.prompter.document_ids(counts, times)
        if behind is not None:
            ids = [[*row, *more] for row, more in zip(ids, behind, strict=True)]
        seconds = [clip.seconds_per_frame * depth for clip in clips.values()]
        if not self.scheme.needs_seconds:
            seconds = []
        is_clip = torch.tensor([row in clips for row in range(len(documents))], dtype=torch.bool)
        return self._packed(ids, patches, grids, seconds, is_clip)

    def query_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text takes."""
        return [len(ids) for ids in self.prompter.query_ids(texts)]

    def document_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of so many pixels."""
        size = target_size(height, width, self.budget)
        return size[0] // self.budget.factor, size[1] // self.budget.factor

    def num_visual_tokens(self, document: Pixels | Clip) -> int:
        """Tokens that an image or clip takes, those of its template aside."""
        if isinstance(document, Clip):
            rows, columns = self.document_size(*document.frames.shape[1:3])
            return rows * columns * -(-len(document.frames) // self.budget.temporal_patch)
        rows, columns = self.document_size(*document.shape[:2])
        return rows * columns

    def _packed(
        self,
        rows: list[list[int]],
        patches: Tensor,
        grids: Int64[Tensor, "G 3"],
        seconds: list[float],
        is_clip: Bool[Tensor, " G"] | None = None,
    ) -> Packed:
        token_ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
        offsets = offsets_of([len(row) for row in rows])
        types = torch.where(token_ids == self.prompter.image_token_id, IMAGE, TEXT)
        if is_clip is not None and is_clip.any():
            types[token_ids == self.prompter.video_token_id] = VIDEO
        positions = position_ids(
            types,
            offsets,
            image_grid_thw=grids if is_clip is None else grids[~is_clip],
            video_grid_thw=None if is_clip is None else grids[is_clip],
            scheme=self.scheme,
            spatial_merge_size=self.budget.merge,
            second_per_grid_ts=seconds or None,
        )
        grids_of_rows = torch.arange(len(rows) + 1) if len(grids) else torch.zeros_like(offsets)
        return Packed(token_ids, offsets, positions, patches, grids, grids_of_rows)


def _step_times(clip: Clip, depth: int) -> list[float]:
    """Seconds in the middle of each step of `depth` frames; a step may end early with the clip."""
    last = len(clip.frames) - 1
    spans = [(first, min(first + depth - 1, last)) for first in range(0, last + 1, depth)]
    return [sum(frame * clip.seconds_per_frame for frame in span) / 2 for span in spans]
