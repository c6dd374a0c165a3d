"""Further pairs: given texts set in the free fonts that ship with matplotlib, as strips.

They go through the same normalisation as crops of pages, and add fonts that few documents use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from colfolio.data.pairs import Pair
from colfolio.data.views import WHOLE_PAGE, snap_to_ink, strip_image, varied_placement

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)

_MISSING = "\uffff"
_SIZES = (26, 30, 36, 44, 52)  # pixels; strips scale them down, which hides the hinting
_MARGIN = 8
_TEX_FONTS = frozenset({"cmr10", "cmb10", "cmss10", "cmti10"})
_OTHERWISE_IN_TEX = frozenset('"$<>\\^_`{|}~')


def rendered_pairs(texts: Sequence[str], seed: int) -> list[Pair]:
    """Each text in a font and size drawn at random, with the jitter of strips of words.

    Texts that no font can set, and those without ink, are left out. The same texts and seed give
    the same pairs.
    """
    generator = np.random.default_rng(seed)
    pairs = []
    for text in texts:
        fonts = sorted(frozenset(FONTS).intersection(*map(_fonts_with, set(text))))
        if not fonts or not text.strip():
            continue
        name, size = fonts[generator.integers(len(fonts))], _SIZES[generator.integers(len(_SIZES))]
        pixels = _set_text(text, _font(name, size))
        box = snap_to_ink(pixels, WHOLE_PAGE)
        if box is not None:
            image = strip_image(pixels, box, varied_placement(generator))
            pairs.append(Pair(text, "rendered", 0, WHOLE_PAGE, image))
    return pairs


def _set_text(text: str, font: ImageFont.FreeTypeFont) -> UInt8[np.ndarray, "height width"]:
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    size = (right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN)
    image = Image.new("L", size, 255)
    ImageDraw.Draw(image).text((_MARGIN - left, _MARGIN - top), text, fill=0, font=font)
    return np.asarray(image)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _fonts_with(character: str) -> frozenset[str]:
    """The fonts that draw a character as itself, and a space as nothing."""
    return frozenset(name for name in FONTS if _has_glyph(name, character))


def _has_glyph(name: str, character: str) -> bool:
    if name in _TEX_FONTS and (character in _OTHERWISE_IN_TEX or not character.isascii()):
        return False
    drawn, missing = (_set_text(text, _font(name, 20)) for text in (character, _MISSING))
    if character.isspace():
        return bool((drawn == 255).all())
    return bool((drawn < 255).any()) and not np.array_equal(drawn, missing)
