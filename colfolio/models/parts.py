"""Every parameter of a model in exactly one named part, and sets of parameters by such names.

In the order in which a page goes through them: `vision` by block, `merger`, `embedding`, `layers`
by index, `norm`, `projection`. Beside these `adapters`: every LoRA tensor, in whatever layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from colfolio.errors import ColfolioError, RecipeError
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.selectors import ALL, LAYERED, PARTS, Selector, parse_selector
from colfolio.models.towers import entrances, exits
from colfolio.models.weights import listed

_LORA = "lora_"  # what peft's own modules and parameters in an adapted layer are named after


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies.

    Args:
        part: one of `PARTS`.
        layer: its number in a part that stands in layers, else None. What embeds patches and their
            positions counts with block 0.
        depth: 0 is the block into which patches come. Merger and embedding, which both make what
            the first text layer reads, have the same; the projection lies on top. A tensor of an
            adapter has that of the layer it is in.
    """

    part: str
    layer: int | None
    depth: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """The place of each parameter, by its name in `named_parameters()`."""

    places: Mapping[str, Place]

    def select(self, selectors: Sequence[str]) -> frozenset[str]:
        """Names of all parameters that any of the selectors takes; of no selector, none.

        Raises:
            RecipeError: one is no selector, or takes what the model does not have; it lists what
                there is.
        """
        chosen: set[str] = set()
        for text in selectors:
            try:
                chosen |= self._taken_by(parse_selector(text))
            except RecipeError as error:
                raise RecipeError(f"{error}. This model has {self.existing()}") from None
        return frozenset(chosen)

    def label(self, names: Collection[str]) -> str:
        """What a set of parameters is, in the words of selectors.

        A part or layer of which only some parameters are in the set is said to be so `in part`.

        >>> places = {f"{n}.weight": Place("layers", n, n) for n in range(4)}
        >>> Inventory(places).label(["0.weight", "2.weight", "3.weight"])
        'layers[0], layers[2:4]'
        """
        unknown = sorted(set(names) - self.places.keys())
        if unknown:
            raise ValueError(f"no parameters of this model: {listed(unknown)}")
        pieces = [piece for part in PARTS for piece in self._pieces(part, frozenset(names))]
        return ", ".join(pieces) or "nothing"

    def existing(self) -> str:
        """The parts that there are, with the range of their layers."""
        present = {place.part for place in self.places.values()}
        return ", ".join(
            f"{part}[0:{self._num_layers(part)}]" if part in LAYERED else part
            for part in PARTS
            if part in present
        )

    def _taken_by(self, selector: Selector) -> set[str]:
        if selector.part == ALL:
            return set(self.places)
        part = {name: at for name, at in self.places.items() if at.part == selector.part}
        if not part:
            raise RecipeError(f"{selector.text!r} takes nothing: there are no {selector.part}")
        if selector.cut is None:
            return set(part)
        layers = selector.layers(self._num_layers(selector.part))
        return {name for name, at in part.items() if at.layer in layers}

    def _num_layers(self, part: str) -> int:
        layers = [at.layer for at in self.places.values() if at.part == part]
        return 1 + max((layer for layer in layers if layer is not None), default=-1)

    def _pieces(self, part: str, names: frozenset[str]) -> list[str]:
        """A part in the words of a label; of layers those that are taken wholly come first."""
        mine = {name: at for name, at in self.places.items() if at.part == part}
        inside = mine.keys() & names
        if not inside:
            return []
        if inside == mine.keys():
            return [part]
        if part not in LAYERED:
            return [f"{part} in part"]
        left = {mine[name].layer for name in mine.keys() - inside}
        some = {layer for name in inside if (layer := mine[name].layer) is not None}
        whole = [f"{part}[{text}]" for text in ranges(some - left)]
        return whole + [f"{part}[{text}] in part" for text in ranges(some & left)]


def inventory(model: ProjectedBackbone) -> Inventory:
    """The place of every parameter of a model, on whatever device; adapters may be in it.

    The head of a generator is its projection; one that is the embedding has no parameters.

    Raises:
        ColfolioError: a parameter belongs to no part.
    """
    places: dict[int, Place] = {}
    for module, place in _homes(model):
        for name, weight in module.named_parameters():
            is_lora = any(piece.startswith(_LORA) for piece in name.split("."))
            places[id(weight)] = Place("adapters", None, place.depth) if is_lora else place
    named = dict(model.named_parameters())
    homeless = [name for name, weight in named.items() if id(weight) not in places]
    if homeless:
        raise ColfolioError(
            f"every parameter belongs to a part of the model, {', '.join(PARTS)}, but these to "
            f"none: {listed(homeless)}; what lies neither in the known modules of a tower nor in "
            "the projection cannot be frozen or trained by name, so leave it out of the model"
        )
    return Inventory({name: places[id(weight)] for name, weight in named.items()})


def ranges(layers: Iterable[int]) -> list[str]:
    """Layers as the fewest ranges, written as in a selector.

    >>> ranges([7, 1, 2, 3])
    ['1:4', '7']
    """
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([layer, layer + 1])
    return [f"{first}:{end}" if end > first + 1 else str(first) for first, end in found]


def _homes(model: ProjectedBackbone) -> Iterator[tuple[nn.Module, Place]]:
    """The modules that hold all parameters, in the order in which a page goes through them."""
    visual, text = model.backbone.visual, model.backbone.language_model
    for module in entrances(visual):
        yield module, Place("vision", 0, 0)
    for number, block in enumerate(visual.blocks):
        yield block, Place("vision", number, number)
    below = len(visual.blocks)
    for module in exits(visual):
        yield module, Place("merger", None, below)
    yield text.embed_tokens, Place("embedding", None, below)
    for number, layer in enumerate(text.layers):
        yield layer, Place("layers", number, below + 1 + number)
    top = below + 1 + len(text.layers)
    yield text.norm, Place("norm", None, top)
    yield model.projection, Place("projection", None, top + 1)
