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

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from colfolio.batch import Packed
from colfolio.models.vision_positions import interpolation, vision_position_ids, vision_windows


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layers `[first, end)` of a tower; with `end` None all that follow, and its closing module."""

    first: int = 0
    end: int | None = None


WHOLE = Stretch()


@dataclass(frozen=True, slots=True)
class Deepstack:
    """Visual features that the first text layers add to their output (arXiv:2406.04334).

    Args:
        is_visual: where they are added.
        features: of the visual tokens, for each of those layers.
    """

    is_visual: Bool[Tensor, " N"]
    features: tuple[Float[Tensor, "V H"], ...]


def entrances(visual: Any) -> list[nn.Module]:
    """What makes the first state of a patch."""
    return [visual.patch_embed] + ([visual.pos_embed] if hasattr(visual, "pos_embed") else [])


def exits(visual: Any) -> list[nn.Module]:
    """What makes visual features of the states of patches, those of deepstack last."""
    return [visual.merger, *getattr(visual, "deepstack_merger_list", [])]


def deepstack_blocks(visual: Any) -> list[int]:
    """The blocks whose output is also given to text layers, one layer each from the first on."""
    return list(getattr(visual, "deepstack_visual_indexes", []))


def run_vision(
    visual: Any, states: Float[Tensor, "P _"], packed: Packed, merge: int, stretch: Stretch = WHOLE
) -> Float[Tensor, "_ width"]:
    """Visual features of patches; or what a stretch of the blocks makes of what it is given.

    Features of deepstack stand beside those of the tower's end, in the same row.

    Args:
        visual: the vision tower.
        states: patches `[P, patch_dim]`, or what came out before block `first`; patches always
            stand in the order of their grids, whatever order the tower has inside.
        packed: whose grids these are.
        merge: patches along each side of a visual token.
    """
    opening = _opening(visual) if stretch.first else {}
    closing = _closing(visual, merge) if stretch.end is not None else {}
    with _replaced(visual, _outside(visual.blocks, "blocks", stretch) | opening | closing):
        output = visual(
            states.to(visual.dtype) if not stretch.first else states,
            packed.grid_thw,
            **_places(visual, packed.grid_thw, merge, states.device),
        )
    if stretch.end is not None:
        return output.pooler_output.unflatten(1, (merge**2, -1)).flatten(0, 1)
    deepstack = output.deepstack_features if deepstack_blocks(visual) else []
    features = [output.pooler_output, *deepstack]
    return torch.cat(features, dim=1) if deepstack else features[0]


def run_text(
    text: Any,
    states: Float[Tensor, "N H"],
    packed: Packed,
    stretch: Stretch = WHOLE,
    deepstack: Deepstack | None = None,
) -> Float[Tensor, "N H"]:
    """Hidden states behind the norm; or what a stretch of the layers makes of what it is given.

    Args:
        deepstack: None if there is nothing visual, or the stretch begins above its layers.
    """
    closing = {"norm": _HandOn()} if stretch.end is not None else {}
    added: dict[str, Any] = {}
    if deepstack is not None:
        added["visual_pos_masks"] = deepstack.is_visual.unsqueeze(0)
        added["deepstack_visual_embeds"] = list(deepstack.features)
    with _replaced(text, _outside(text.layers, "layers", stretch) | closing):
        return text(
            inputs_embeds=states.unsqueeze(0),
            position_ids=packed.position_ids.unsqueeze(1),
            cu_seq_lens_q=packed.offsets,
            use_cache=False,
            **added,
        ).last_hidden_state[0]


def _places(
    visual: Any, grids: Int64[Tensor, "G 3"], merge: int, device: torch.device
) -> dict[str, Tensor]:
    """What a tower computes of grids alone, made here without a wait for the device."""
    places = {"position_ids": vision_position_ids(grids, merge)}
    bounds = {}
    if hasattr(visual, "fullatt_block_indexes"):
        side = visual.window_size // visual.patch_size // merge
        order, begins = vision_windows(grids, merge, side)
        places["window_index"], bounds["cu_window_seqlens"] = order, begins  # the latter on the CPU
    if hasattr(visual, "pos_embed"):
        places |= interpolation(visual, grids, merge)
    return {name: place.to(device) for name, place in places.items()} | bounds


def _opening(visual: nn.Module) -> dict[str, nn.Module]:
    """Patches are embedded already, and so are their positions."""
    opening: dict[str, nn.Module] = {"patch_embed": _HandOn()}
    return opening | ({"pos_embed": _Zero()} if hasattr(visual, "pos_embed") else {})


def _closing(visual: Any, merge: int) -> dict[str, nn.Module]:
    """Patches are not merged, and no features are made for deepstack."""
    closing: dict[str, nn.Module] = {"merger": _Together(merge**2)}
    for_text = [_HandOn() for _ in deepstack_blocks(visual)]
    return closing | ({"deepstack_merger_list": nn.ModuleList(for_text)} if for_text else {})


class _HandOn(nn.Module):
    """Stands where nothing is to be computed."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What was given."""
        return states


class _Zero(nn.Module):
    """Stands where nothing is to be added."""

    def forward(self, indices: Tensor) -> Tensor:
        """One zero for each index."""
        return indices.new_zeros((*indices.shape, 1), dtype=torch.float32)


class _Together(nn.Module):
    """Stands where patches would be merged: a tower that reorders tokens behind it still can."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, states: Float[Tensor, "P width"]) -> Float[Tensor, "V _"]:
        """The patches of each visual token in one row."""
        return states.unflatten(0, (-1, self.size)).flatten(1)


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
