"""Runs a tower of a backbone wholly, or only its layers on one side of a border.

The towers are the library's own modules and stay so: for the length of a call, what lies on the
other side is replaced by a module that hands its input on, at the same place in the list, because
families look up by a layer's number what it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from colfolio.batch import Packed
from colfolio.models.vision_positions import vision_position_ids


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layers `[first, end)` of a tower; with `end` None all that follow, and its closing module."""

    first: int = 0
    end: int | None = None


WHOLE = Stretch()


def run_vision(
    visual: Any, states: Float[Tensor, "P _"], packed: Packed, merge: int, stretch: Stretch = WHOLE
) -> Float[Tensor, "_ width"]:
    """Visual features of patches; or what a stretch of the blocks makes of what it is given.

    Args:
        visual: the vision tower.
        states: patches `[P, patch_dim]`, or what came out before block `first`.
        packed: whose grids these are.
        merge: patches along each side of a visual token.
    """
    opening = {"patch_embed": _HandOn()} if stretch.first else {}
    closing = {"merger": _HandOn()} if stretch.end is not None else {}
    with _replaced(visual, _outside(visual.blocks, "blocks", stretch) | opening | closing):
        return visual(
            states.to(visual.dtype) if not stretch.first else states,
            packed.grid_thw,
            position_ids=vision_position_ids(packed.grid_thw, merge).to(states.device),
        ).pooler_output


def run_text(
    text: Any, states: Float[Tensor, "N H"], packed: Packed, stretch: Stretch = WHOLE
) -> Float[Tensor, "N H"]:
    """Hidden states behind the norm; or what a stretch of the layers makes of what it is given."""
    closing = {"norm": _HandOn()} if stretch.end is not None else {}
    with _replaced(text, _outside(text.layers, "layers", stretch) | closing):
        return text(
            inputs_embeds=states.unsqueeze(0),
            position_ids=packed.position_ids.unsqueeze(1),
            cu_seq_lens_q=packed.offsets,
            use_cache=False,
        ).last_hidden_state[0]


class _HandOn(nn.Module):
    """Stands where nothing is to be computed."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What was given."""
        return states


def _outside(layers: nn.ModuleList, name: str, stretch: Stretch) -> dict[str, nn.Module]:
    """The list of layers in which only a stretch computes."""
    if stretch == WHOLE:
        return {}
    end = len(layers) if stretch.end is None else stretch.end
    chosen = [
        layer if stretch.first <= number < end else _HandOn() for number, layer in enumerate(layers)
    ]
    return {name: nn.ModuleList(chosen)}


@contextmanager
def _replaced(tower: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    before = {name: getattr(tower, name) for name in modules}
    try:
        for name, module in modules.items():
            setattr(tower, name, module)
        yield
    finally:
        for name, module in before.items():
            setattr(tower, name, module)
