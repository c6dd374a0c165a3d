"""Selectors of parts: the words by which a recipe names parameters, without a model to look at.

`vision` and `layers` stand in layers, counted from 0 at the end where a page comes in, and a cut in
brackets takes some of them: `[4]` one, `[0:4]` those before layer 4, `[top 8]` and `[bottom 8]` so
many, `[top 25%]` a share, rounded up.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from colfolio.errors import RecipeError

LAYERED = ("vision", "layers")
PARTS = ("vision", "merger", "embedding", "layers", "norm", "projection", "adapters")
ALL = "all"

_SELECTOR = re.compile(r"([a-z]+)(?:\[([^\[\]]*)\])?")
_ONE = re.compile(r"([0-9]{1,9})")
_RANGE = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")
_END = re.compile(r"(top|bottom) (?:([0-9]{1,9})|([0-9]{1,9}(?:\.[0-9]{1,9})?)%)")
_FORMS = (
    f"a selector is {', '.join(PARTS)} or {ALL}; {' and '.join(LAYERED)} may have one of [4], "
    "[0:4], [4:], [:4], [top 8], [bottom 8], [top 25%], [bottom 25%] behind them"
)


@dataclass(frozen=True, slots=True)
class Span:
    """Layers from `first` up to but without `end`; with `end` None, all from there."""

    first: int
    end: int | None

    def of(self, count: int) -> range:
        """Those of so many layers; some of them may not be there."""
        return range(self.first, count if self.end is None else self.end)


@dataclass(frozen=True, slots=True)
class End:
    """So many layers at one end.

    Args:
        is_top: the end where vectors come out.
        size: how many, or with `is_share` how many of a hundred, rounded up.
    """

    is_top: bool
    size: Fraction
    is_share: bool

    def of(self, count: int) -> range:
        """Those of so many layers; some of them may not be there."""
        size = math.ceil(self.size * count / 100) if self.is_share else int(self.size)
        return range(count - size, count) if self.is_top else range(size)


@dataclass(frozen=True, slots=True)
class Selector:
    """A part, or some of its layers.

    Args:
        text: as written.
        part: one of `PARTS`, or `ALL`.
        cut: None takes the whole part.
    """

    text: str
    part: str
    cut: Span | End | None = None

    def layers(self, count: int) -> range:
        """The layers that are meant, of so many that the part has.

        Raises:
            RecipeError: some, or all, are not there.

        >>> list(parse_selector("layers[top 25%]").layers(6))
        [4, 5]
        """
        chosen = range(count) if self.cut is None else self.cut.of(count)
        if not chosen or chosen.start < 0 or chosen.stop > count:
            raise RecipeError(
                f"{self.text!r} reaches beyond what is there: {self.part} has {count} layers, "
                f"{self.part}[0:{count}]"
            )
        return chosen


def parse_selector(text: str) -> Selector:
    """What a selector says; whether a model has it, `Inventory.select` finds.

    Raises:
        RecipeError: it is none, or takes no layer of any model.
    """
    found = _SELECTOR.fullmatch(text)
    if found is None or found[1] not in (*PARTS, ALL):
        raise RecipeError(f"{text!r} is no selector: {_FORMS}")
    part, cut = found[1], found[2]
    if cut is None:
        return Selector(text, part)
    if part not in LAYERED:
        raise RecipeError(
            f"{text!r}: {part} has no layers to choose from, only {' and '.join(LAYERED)} have; "
            f"write {part!r} alone"
        )
    return Selector(text, part, _cut(cut, text))


def _cut(written: str, text: str) -> Span | End:
    """What stands in the brackets."""
    if found := _ONE.fullmatch(written):
        return Span(int(found[1]), int(found[1]) + 1)
    if found := _RANGE.fullmatch(written):
        cut = Span(int(found[1] or 0), int(found[2]) if found[2] else None)
        is_empty = cut.end is not None and cut.first >= cut.end
    elif found := _END.fullmatch(written):
        cut = End(found[1] == "top", Fraction(found[2] or found[3]), found[2] is None)
        is_empty = cut.size == 0
        if cut.is_share and cut.size > 100:
            raise RecipeError(f"{text!r}: a share is at most 100%")
    else:
        raise RecipeError(f"{text!r} is no selector: {_FORMS}")
    if is_empty:
        raise RecipeError(
            f"{text!r} takes no layer: a range ends above its beginning, as [0:4] or [4:5] does, "
            "and a number of layers is 1 or more"
        )
    return cut
