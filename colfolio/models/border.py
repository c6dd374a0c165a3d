"""Where the trainable part of a model begins: what lies below has no gradient and need run once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int64
from torch import Tensor, nn

from colfolio.batch import Packed, offsets_of
from colfolio.models.towers import deepstack_blocks, entrances, exits


@dataclass(frozen=True, slots=True)
class Border:
    """So many layers of a tower, and all that runs before them, lie below.

    What comes out at the border of the vision tower is one row a patch; of the text tower one row a
    token, or, below its first layer, one row a visual token: what the vision tower made of it, with
    the features of deepstack. Where those are, a border lies below all or above all of them.
    """

    tower: Literal["vision", "text"]
    layers: int

    def lengths(self, packed: Packed, merge: int) -> Int64[Tensor, " rows"]:
        """Rows of output at the border that belong to each row of a batch."""
        if self.tower == "text" and self.layers:
            return packed.lengths
        ends = offsets_of(packed.grid_thw.prod(dim=1))
        patches = ends[packed.grid_offsets].diff()
        return patches if self.tower == "vision" else patches // merge**2


@dataclass(frozen=True, slots=True)
class BorderOutput:
    """What the frozen part made of a batch."""

    border: Border
    states: Float[Tensor, "states width"]


def frozen_border(backbone: Any, *, is_visual: bool) -> Border | None:
    """The border of rows that are visual or plain text; None if nothing below one is worth keeping.

    Of visual rows the whole vision tower comes first, then the embedding and the text layers; of
    text the embedding alone is no border, because looking it up costs nothing.
    """
    visual, text = backbone.visual, backbone.language_model
    if is_visual:
        blocks = _num_frozen(visual.blocks)
        if not all(map(_is_frozen, entrances(visual))):
            return None
        if blocks < len(visual.blocks) or not all(map(_is_frozen, exits(visual))):
            # what comes out of a deepstack block is still there at a border right behind it
            blocks = min([blocks, *(number + 1 for number in deepstack_blocks(visual))])
            return Border("vision", blocks) if blocks else None
    layers = _num_frozen(text.layers) if _is_frozen(text.embed_tokens) else 0
    if is_visual and layers < len(deepstack_blocks(visual)):
        layers = 0  # features would have to be added on both sides
    return Border("text", layers) if layers or is_visual else None


def frozen_parts(backbone: Any, border: Border) -> list[nn.Module]:
    """The modules below a border, in the order in which they run."""
    visual, text = backbone.visual, backbone.language_model
    if border.tower == "vision":
        return [*entrances(visual), visual.rotary_pos_emb, *visual.blocks[: border.layers]]
    if not border.layers:
        return [visual]
    return [visual, text.embed_tokens, text.rotary_emb, *text.layers[: border.layers]]


def _num_frozen(layers: nn.ModuleList) -> int:
    """Layers before the first that trains."""
    trains = [not _is_frozen(layer) for layer in layers]
    return trains.index(True) if any(trains) else len(trains)


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
