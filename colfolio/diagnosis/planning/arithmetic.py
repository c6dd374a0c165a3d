"""Operations that rows take in a model, counted from its shape: two for a weight and a token.

Letters: L length of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from colfolio.diagnosis.planning.graph_memory import (
    Rows,
    attended_patches,
    first_above,
    vision_width,
)
from colfolio.models.border import frozen_border
from colfolio.models.generator import Generator
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.towers import exits


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of some rows.

    Args:
        below: of layers below the border, run once without a graph.
        forward: of all others.
        backward: of those, with recomputing where layers are checkpointed.
    """

    below: int
    forward: int
    backward: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.below + other.below, self.forward + other.forward, self.backward + other.backward
        )

    def times(self, count: int) -> Work:
        """So many of them."""
        return Work(self.below * count, self.forward * count, self.backward * count)


def work_of(model: ProjectedBackbone, rows: Rows) -> Work:
    """What rows cost in one pass, forward and backward."""
    visual, text = model.backbone.visual, model.backbone.language_model
    border = frozen_border(model.backbone, is_visual=bool(rows.patches))
    first_block, first_layer = first_above(model.backbone, border)
    tokens, patches = sum(rows.lengths), sum(rows.patches)
    attention = _attention(rows.lengths, text.config.hidden_size) // 2  # no token sees later ones
    total = _top(model, rows)
    for number, layer in enumerate(text.layers):
        total += _work(layer, tokens, attention, has_graph=number >= first_layer)
    if not patches:
        return total
    width = vision_width(visual.blocks[0])
    for number, block in enumerate(visual.blocks):
        attention = _attention(attended_patches(visual, number, rows.patches), width)
        total += _work(block, patches, attention, has_graph=number >= first_block)
    merged = patches // visual.config.spatial_merge_size**2
    is_open = border is None or border.tower == "vision"
    for merger in exits(visual):
        total += _work(merger, merged, 0, has_graph=is_open)
    embedding = 2 * visual.patch_embed.proj.weight.numel() * patches
    if border is None:
        return total + Work(0, embedding, embedding)
    return total + Work(embedding, 0, 0)


def _top(model: ProjectedBackbone, rows: Rows) -> Work:
    """The projection of all tokens, or the head of those of answers."""
    if not isinstance(model, Generator):
        return _work(model.projection, sum(rows.lengths), 0, has_graph=True)
    weight = model.projection.weight
    forward = 2 * weight.numel() * rows.answers
    return Work(0, forward, forward * (2 if weight.requires_grad else 1))


def _work(module: Any, places: int, attention: int, *, has_graph: bool) -> Work:
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    forward = 2 * sum(weight.numel() for weight in weights) * places + attention
    if not has_graph:
        return Work(forward, 0, 0)
    trained = 2 * sum(weight.numel() for weight in weights if weight.requires_grad) * places
    again = forward if getattr(module, "gradient_checkpointing", False) else 0
    return Work(0, forward, forward + attention + trained + again)


def _attention(lengths: Sequence[int], width: int) -> int:
    """Products of queries with keys, and of weights with values."""
    return sum(4 * length**2 * width for length in lengths)
