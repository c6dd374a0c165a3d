"""Texts and images to packed model inputs, with their positions computed and passed explicitly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from colfolio.batch import Packed, offsets_of
from colfolio.data.patches import PixelBudget, target_size, to_patches
from colfolio.data.prompts import Prompter
from colfolio.mrope import IMAGE, TEXT, position_ids

# "_": images of one call may differ in size
Pixels = UInt8[np.ndarray, "_H _W 3"]


class Collator:
    """Packs queries and documents for one checkpoint.

    Args:
        prompter: templates and tokenizer.
        budget: how images are resized and cut.
        position_scheme: a name of `colfolio.mrope.SCHEMES`.
    """

    def __init__(
        self, prompter: Prompter, budget: PixelBudget, position_scheme: str = "qwen2_vl"
    ) -> None:
        self.prompter = prompter
        self.budget = budget
        self.position_scheme = position_scheme

    def queries(self, texts: Sequence[str]) -> Packed:
        """One row a text."""
        none = torch.zeros(0, 3, dtype=torch.int64)
        return self._packed(
            self.prompter.query_ids(texts), torch.empty(0, self.budget.patch_dim), none
        )

    def documents(self, images: Sequence[Pixels]) -> Packed:
        """One row an image."""
        patches, grids = to_patches([image[None] for image in images], self.budget)
        counts = (grids.prod(dim=1) // self.budget.merge**2).tolist()
        return self._packed(self.prompter.document_ids(counts), patches, grids)

    def query_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text takes."""
        return [len(ids) for ids in self.prompter.query_ids(texts)]

    def document_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of so many pixels."""
        size = target_size(height, width, self.budget)
        return size[0] // self.budget.factor, size[1] // self.budget.factor

    def _packed(
        self, rows: list[list[int]], patches: Tensor, grids: Int64[Tensor, "G 3"]
    ) -> Packed:
        token_ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
        offsets = offsets_of([len(row) for row in rows])
        types = torch.where(token_ids == self.prompter.image_token_id, IMAGE, TEXT)
        positions = position_ids(
            types,
            offsets,
            image_grid_thw=grids,
            scheme=self.position_scheme,
            spatial_merge_size=self.budget.merge,
        )
        grids_of_rows = torch.arange(len(rows) + 1) if len(grids) else torch.zeros_like(offsets)
        return Packed(token_ids, offsets, positions, patches, grids, grids_of_rows)
