"""Equal and nearly equal images are found, others are not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from colfolio.data.pages.views import Placement, snap_to_ink, strip_image
from colfolio.data.preparing.deduplicate import (
    PAGE_CELLS,
    STRIP_CELLS,
    Hashes,
    difference_hash,
    near_duplicates,
    pixel_digest,
)

FONT = font_manager.findfont("DejaVu Serif")


def draw(text, size=40.0, shift=0.0, width=1200):
    """A page with one line of text, placed to a fraction of a pixel."""
    scale = 4
    image = Image.new("L", (width * scale, 120 * scale), 255)
    pen = ImageDraw.Draw(image)
    pen.text(
        (40 * scale + shift * scale, 30 * scale), text, 0, ImageFont.truetype(FONT, size * scale)
    )
    return np.asarray(image.resize((width, 120), Image.Resampling.BOX))


def strip_of(text, size=40.0, shift=0.0, placement=None):
    page = draw(text, size, shift)
    box = snap_to_ink(page, (0.0, 0.0, 1.0, 1.0))
    image = strip_image(page, box, *([placement] if placement else []))
    return np.ascontiguousarray(image[..., 0])


def hashes_of(images, cells=STRIP_CELLS, is_cropped=True):
    found = [difference_hash(image, cells, is_cropped) for image in images]
    words = np.frombuffer(b"".join(packed for packed, _ in found), np.uint64)
    lengths = np.array([length for _, length in found], np.float32)
    return Hashes(words.reshape(len(images), -1), lengths)


def is_near(left, right, share=0.2):
    return bool(near_duplicates(hashes_of([left]), hashes_of([right]), share)[0])


TEXTS = ["Introduction", "Getting started", "Alignment of equations in a display", "Index"]


def test_a_digest_tells_apart_one_pixel_and_the_shape():
    image = np.zeros((28, 56), np.uint8)
    other = image.copy()
    other[3, 5] = 1
    digests = {
        pixel_digest(each) for each in (image, other, image.reshape(56, 28), image[..., None])
    }
    assert len(digests) == 4
    assert pixel_digest(image[::1].copy()) == pixel_digest(image)
    assert pixel_digest(np.zeros((28, 112), np.uint8)[:, ::2]) == pixel_digest(image)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("size", "shift"), [(40.0, 0.5), (40.4, 0.0), (37.0, 0.25), (31.0, 0.0)])
def test_another_rendering_of_a_text_is_near(text, size, shift):
    assert is_near(strip_of(text), strip_of(text, size, shift))


@pytest.mark.parametrize("text", TEXTS)
def test_another_placement_of_the_ink_is_near(text):
    assert is_near(strip_of(text), strip_of(text, placement=Placement(20, 6, 9)))


def test_padding_does_not_count():
    strip = strip_of("Introduction")
    padded = np.pad(strip, ((0, 0), (5, 80)), constant_values=255)
    assert difference_hash(strip, STRIP_CELLS, True) == difference_hash(padded, STRIP_CELLS, True)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("other", ["Installation", "Getting stuffed", "Bibliography", "Chapter 12"])
def test_other_texts_are_not_near(text, other):
    assert not is_near(strip_of(text), strip_of(other))


def test_a_page_with_another_number_is_near_and_another_page_is_not():
    def page(number, seed):
        image = Image.new("L", (612, 792), 255)
        pen = ImageDraw.Draw(image)
        font = ImageFont.truetype(FONT, 11)
        words = np.random.default_rng(seed).permutation(" ".join(TEXTS).split() * 40)
        for line in range(40):
            pen.text((72, 72 + 16 * line), " ".join(words[line * 8 : line * 8 + 8]), 0, font)
        pen.text((300, 740), str(number), 0, font)
        return np.asarray(image)

    pages = [page(3, 0), page(14, 0), page(3, 1), np.full((792, 612), 255, np.uint8)]
    hashes = hashes_of(pages, PAGE_CELLS, is_cropped=False)
    first = Hashes(hashes.words[:1], hashes.lengths[:1])
    assert near_duplicates(hashes, first, 0.35).tolist() == [True, True, False, False]
    blank = Hashes(hashes.words[3:], hashes.lengths[3:])
    assert near_duplicates(hashes, blank, 0.35).tolist() == [False, False, False, True]


def plainly(candidates, references, share, tolerance):
    """The definition, pair by pair."""
    found = []
    for words, length in zip(candidates.words, candidates.lengths, strict=True):
        bits = np.unpackbits(words.view(np.uint8)).astype(int)
        near = False
        for other, other_length in zip(references.words, references.lengths, strict=True):
            other_bits = np.unpackbits(other.view(np.uint8)).astype(int)
            differing = np.abs(bits - other_bits).sum()
            near |= bool(
                differing <= share * max(1, bits.sum() + other_bits.sum())
                and abs(length - other_length) <= tolerance * other_length
            )
        found.append(near)
    return found


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 40))
def test_blocks_find_what_the_definition_finds(seed, num_candidates, num_references):
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2, (3, 128))

    def some(count):
        bits = centres[generator.integers(0, 3, count)] ^ (generator.random((count, 128)) < 0.12)
        lengths = generator.choice([1.0, 1.125, 1.25, 4.0], count).astype(np.float32)
        words = np.packbits(bits.astype(np.uint8), axis=1).view(np.uint64).reshape(count, 2)
        return Hashes(words, lengths)

    candidates, references = some(num_candidates), some(num_references)
    found = near_duplicates(candidates, references, 0.24, 0.15)
    assert found.tolist() == plainly(candidates, references, 0.24, 0.15)


def test_more_images_than_a_block_are_compared_to_the_last():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**63, (1500, 8)).astype(np.uint64)
    lengths = generator.uniform(1, 10, 1500).astype(np.float32)
    everything = Hashes(words, lengths)
    some = Hashes(words[::7], lengths[::7])
    expected = np.zeros(1500, bool)
    expected[::7] = True
    np.testing.assert_array_equal(near_duplicates(everything, some, 0.05), expected)
