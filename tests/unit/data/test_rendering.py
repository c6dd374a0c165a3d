import numpy as np
import pytest

from colfolio.data.rendering import FONTS, rendered_pairs
from colfolio.data.views import STRIP_HEIGHT, STRIP_MAX_WIDTH

TEXTS = ["Installation", "how to begin", "Größe und Maß", "x < y", "Results of 2019", "naïve café"]


def test_every_text_becomes_a_strip_of_the_usual_form():
    pairs = rendered_pairs(TEXTS * 10, seed=0)
    assert [pair.text for pair in pairs] == TEXTS * 10
    for pair in pairs:
        assert pair.kind == "rendered"
        assert pair.image.shape[0] == STRIP_HEIGHT
        assert pair.image.shape[1] % 28 == 0
        assert pair.image.shape[1] <= STRIP_MAX_WIDTH
        assert pair.image.min() == 0
        assert pair.image[0, -1, 0] == 255


def test_the_seed_decides_fonts_and_places():
    first, again, other = (rendered_pairs(TEXTS, seed) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, two.image)
    assert any(
        one.image.shape != two.image.shape or (one.image != two.image).any()
        for one, two in zip(first, other, strict=True)
    )


def test_one_text_is_set_in_many_ways():
    pictures = {pair.image.tobytes() for pair in rendered_pairs(["Introduction"] * 60, seed=0)}
    assert len(pictures) > 50


@pytest.mark.parametrize("text", ["", "   ", "\u6f22\u5b57", "letters and \u6f22"])
def test_a_text_without_glyphs_is_left_out(text):
    assert rendered_pairs([text], seed=0) == []


def test_longer_texts_give_wider_strips():
    short = np.mean([pair.image.shape[1] for pair in rendered_pairs(["word"] * 30, seed=0)])
    long = np.mean([pair.image.shape[1] for pair in rendered_pairs(["word by word"] * 30, seed=0)])
    assert long > 1.7 * short


def test_all_fonts_are_there():
    assert len(set(FONTS)) == len(FONTS)
    assert len(rendered_pairs(["plain"] * len(FONTS), seed=0)) == len(FONTS)
