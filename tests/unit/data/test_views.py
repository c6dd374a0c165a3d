import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from colfolio.data.documents import open_document
from colfolio.data.pages.views import (
    NATURAL,
    STRIP_HEIGHT,
    STRIP_MAX_WIDTH,
    Placement,
    find_strips,
    page_views,
    snap_to_ink,
    strip_image,
)

DPI = 144.0
LONG = (
    "the quick brown fox jumps over the lazy dog and then rests for a while under an old oak tree"
)


@pytest.fixture
def draw(make_pdf, page):
    def render(*pages, dpi=DPI):
        with open_document(make_pdf(*pages)) as document:
            return document.render(0, dpi=dpi)

    return render


def ink_rows(strip):
    return np.flatnonzero((strip.min(axis=2) < 128).any(axis=1))


def heights(views, page):
    return [round((view.box[3] - view.box[1]) * page.shape[0]) for view in views]


def tops(views):
    return [round(view.box[1], 3) for view in views]


def test_a_strip_is_28_pixels_high_black_on_white_with_a_margin(draw, page):
    pixels = draw(page(lines=[(72, 100, 30, "Typography")]))
    strip = strip_image(pixels, snap_to_ink(pixels, (0.0, 0.0, 1.0, 0.5)))
    assert strip.shape[0] == STRIP_HEIGHT
    assert strip.shape[1] % 28 == 0
    assert strip.min() == 0
    assert strip.max() == 255
    rows = ink_rows(strip)
    assert rows[0] == NATURAL.top
    assert rows[-1] == NATURAL.top + NATURAL.ink_height - 1
    assert (strip[:, :, 0] == strip[:, :, 2]).all()


def test_a_strip_keeps_the_aspect_of_the_ink(draw, page):
    pixels = draw(page(lines=[(72, 100, 30, "Typography")]))
    box = snap_to_ink(pixels, (0.0, 0.0, 1.0, 0.5))
    strip = strip_image(pixels, box)
    columns = np.flatnonzero((strip.min(axis=2) < 128).any(axis=0))
    width, height = (box[2] - box[0]) * pixels.shape[1], (box[3] - box[1]) * pixels.shape[0]
    assert columns[-1] + 1 - columns[0] == pytest.approx(width / height * 20, abs=1.5)


@pytest.mark.parametrize("size", [9, 14, 24, 40])
def test_the_size_of_the_type_hardly_matters(draw, page, size):
    inks = []
    for points in (18, size):
        pixels = draw(page(lines=[(72, 100, points, "Typography")]))
        strip = strip_image(pixels, snap_to_ink(pixels, (0.0, 0.0, 1.0, 0.5)))
        columns = np.flatnonzero((strip.min(axis=2) < 128).any(axis=0))
        inks.append(Image.fromarray(strip[:, columns[0] : columns[-1] + 1]))
    assert inks[0].width == pytest.approx(inks[1].width, rel=0.07)
    pictures = [np.asarray(ink.resize(inks[0].size), float).ravel() for ink in inks]
    assert np.corrcoef(*pictures)[0, 1] > 0.85


@pytest.mark.parametrize(
    ("paper", "type_colour"),
    [("0 0 0", "1 1 1"), ("1 1 0.8", "0 0 0.5"), ("0.1 0.2 0.5", "1 0.9 0.3"), ("1 1 1", "0.6 g")],
)
def test_dark_and_tinted_pages_give_the_strips_of_a_white_page(draw, page, paper, type_colour):
    line = [(72, 100, 20, "Typography matters")]
    colour = type_colour if type_colour.endswith("g") else f"{type_colour} rg"
    plain = draw(page(lines=line))
    tinted = draw(page(lines=line, operators=f"{paper} rg 0 0 612 792 re f {colour}"))
    expected, found = find_strips(plain), find_strips(tinted)
    assert len(expected) == len(found) == 1
    assert expected[0].image.shape == found[0].image.shape
    difference = np.abs(expected[0].image.astype(float) - found[0].image)
    assert difference.mean() < 12
    assert found[0].image.min() == 0
    assert found[0].image[0, 0, 0] == 255


def test_a_strip_too_wide_is_scaled_down_as_a_whole(draw, page):
    pixels = draw(page(lines=[(40, 100, 10, LONG)]))
    strip = strip_image(pixels, snap_to_ink(pixels, (0.0, 0.0, 1.0, 0.5)))
    rows = ink_rows(strip)
    assert strip.shape == (STRIP_HEIGHT, STRIP_MAX_WIDTH, 3)
    assert rows[-1] - rows[0] < 14
    assert rows.mean() == pytest.approx(STRIP_HEIGHT / 2, abs=1.5)


@given(
    height=st.integers(4, 28),
    top=st.integers(0, 28),
    left=st.integers(0, 40),
    size=st.integers(1, 60),
)
def test_any_placement_gives_a_whole_strip(height, top, left, size):
    page = np.full((80, 90, 3), 255, np.uint8)
    page[5 : 5 + size, 10 : 10 + size] = 0
    box = (10 / 90, 5 / 80, (10 + size) / 90, (5 + size) / 80)
    strip = strip_image(page, box, Placement(height, min(top, 28 - height), left))
    assert strip.shape[0] == STRIP_HEIGHT
    assert strip.shape[1] % 28 == 0
    assert (strip == 0).any()


def test_a_box_without_pixels_is_refused():
    with pytest.raises(ValueError, match="holds no pixel"):
        strip_image(np.zeros((10, 10, 3), np.uint8), (0.5, 0.5, 0.5, 0.6))


def test_snapping_finds_the_ink_or_nothing():
    page = np.full((100, 200), 255, np.uint8)
    page[40:50, 60:90] = 0
    assert snap_to_ink(page, (0.2, 0.3, 0.8, 0.8)) == (0.3, 0.4, 0.45, 0.5)
    assert snap_to_ink(page, (0.6, 0.3, 0.8, 0.8)) is None


def test_every_line_becomes_a_strip_whose_box_is_tight(draw, page):
    lines = [(72, 100 + 14 * row, 10, f"line number {row} of the page") for row in range(40)]
    pixels = draw(page(lines=lines))
    views = find_strips(pixels)
    assert len(views) == 40
    for view, (x, y, _, _) in zip(views, lines, strict=True):
        assert snap_to_ink(pixels, view.box) == pytest.approx(view.box)
        assert view.box[0] == pytest.approx(x / 612, abs=0.004)
        assert view.box[1] * 792 < y < view.box[3] * 792 + 1


def test_a_strip_found_in_pixels_equals_the_crop_of_the_same_line(draw, page):
    pixels = draw(page(lines=[(72, 100, 16, "Heading of a section"), (72, 130, 10, "and text")]))
    found = find_strips(pixels)[0]
    crop = strip_image(pixels, snap_to_ink(pixels, (72 / 612, 80 / 792, 0.9, 106 / 792)))
    np.testing.assert_array_equal(found.image, crop)


@pytest.mark.parametrize("shift", [0, 5])
def test_columns_are_read_one_by_one(draw, page, shift):
    left = [(72, 100 + 12 * row, 10, "words in the left column") for row in range(30)]
    right = [(330, 100 + shift + 12 * row, 10, "words of the right column") for row in range(30)]
    views = find_strips(draw(page(lines=left + right)))
    assert len(views) == 60
    assert sum(view.box[2] < 0.5 for view in views) == 30
    assert sum(view.box[0] > 0.5 for view in views) == 30


def test_words_in_large_type_stay_on_one_line(draw, page):
    views = find_strips(draw(page(lines=[(72, 200, 36, "2  Features and - Syntax")], font="F2")))
    assert len(views) == 1


def test_lines_that_touch_each_other_are_parted(draw, page):
    lines = [(72, 100 + 8.6 * row, 11, "gypsy (jelly) query") for row in range(12)]
    lines += [(72, 300 + 15 * row, 11, "lines set in the usual way") for row in range(12)]
    views = find_strips(draw(page(lines=lines)))
    assert len(views) == 24


def test_rules_dots_and_large_figures_are_no_strips(draw, page):
    drawing = (
        "72 400 400 1 re f 72 200 0.5 150 re f 300 300 3 3 re f "  # rules and a dot
        "200 500 200 150 re f 5 w 100 600 m 500 780 l S"  # a filled figure, and a long stroke
    )
    assert find_strips(draw(page(operators=drawing))) == []


def test_text_in_frames_tables_and_panels_is_found(draw, page):
    lines = [(80, 120, 10, "inside of a frame"), (80, 134, 10, "with two lines")]
    lines += [(80, 220, 10, "left cell"), (300, 220, 10, "right cell")]
    frame = "1 w 70 640 300 60 re S 70 560 400 25 re S 270 560 m 270 585 l S "
    panel = "0.2 0.2 0.6 rg 70 400 400 40 re f 1 g BT /F1 10 Tf 80 415 Td (on a panel) Tj ET 0 g"
    pixels = draw(page(lines=lines, operators=frame + panel))
    views = find_strips(pixels)
    assert len(views) == 5
    assert all(5 <= height <= 30 for height in heights(views, pixels))


def test_any_phrase_of_up_to_half_a_strip_lies_whole_in_one_piece(draw, page):
    words = LONG.split()
    pixels = draw(page(lines=[(30, 100, 12, LONG)]))
    views = find_strips(pixels)
    assert 3 < len(views) < 12
    with_box = snap_to_ink(pixels, (0.0, 0.0, 1.0, 0.5))
    height, width = pixels.shape[:2]
    strip_span = NATURAL.ink_width / 20 * (with_box[3] - with_box[1]) * height / width
    scale = (with_box[2] - with_box[0]) / len(LONG)
    for first in range(len(words)):
        start = with_box[0] + scale * (len(" ".join(words[:first])) + (first > 0))
        end = start + 0.4 * strip_span
        if end > with_box[2]:
            break
        assert any(view.box[0] <= start + 0.01 and end <= view.box[2] + 0.01 for view in views)
    assert views[0].box[0] == pytest.approx(with_box[0])
    assert max(view.box[2] for view in views) == pytest.approx(with_box[2])
    assert all(view.image.shape[1] <= STRIP_MAX_WIDTH for view in views)


def test_a_long_heading_is_also_kept_whole(draw, page):
    pixels = draw(
        page(lines=[(72, 100, 10, "Guessing at the outcome of an experiment on the dark moon")])
    )
    line = snap_to_ink(pixels, (0.0, 0.0, 1.0, 0.5))
    assert any(view.box == pytest.approx(line) for view in find_strips(pixels))


@pytest.mark.parametrize("dpi", [100.0, 144.0, 220.0])
def test_the_resolution_does_not_change_which_lines_are_found(draw, page, dpi):
    lines = [(72, 100 + 14 * row, 10, f"line number {row} of the page") for row in range(20)]
    lines.append((72, 600, 24, "A large heading"))
    assert len(find_strips(draw(page(lines=lines), dpi=dpi))) == 21


def test_noise_of_a_scan_changes_no_line(draw, page):
    lines = [(72, 100 + 14 * row, 10, f"line number {row} of the page") for row in range(20)]
    pixels = draw(page(lines=lines))
    noise = np.random.default_rng(0).normal(0, 8, pixels.shape)
    noisy = np.clip(pixels * 0.85 + 20 + noise, 0, 255).astype(np.uint8)
    assert tops(find_strips(noisy)) == pytest.approx(tops(find_strips(pixels)), abs=0.0015)


@pytest.mark.parametrize("degrees", [-2.5, -0.8, 0.4, 2.5])
def test_a_crooked_scan_gives_level_strips_whose_boxes_lie_on_its_lines(draw, page, degrees):
    lines = [(72, 100 + 14 * row, 10, f"line number {row} of the page") for row in range(20)]
    lines += [(330, 100 + 14 * row, 10, "and more to the right") for row in range(20)]
    pixels = draw(page(lines=lines))
    turned = np.asarray(
        Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=(255,) * 3)
    )
    straight, crooked = find_strips(pixels), find_strips(turned)
    assert len(straight) == len(crooked) == 40
    for level, view in zip(straight, crooked, strict=True):
        x, y = (level.box[0] + level.box[2] - 1) / 2, (level.box[1] + level.box[3] - 1) / 2
        angle, aspect = np.radians(degrees), pixels.shape[0] / pixels.shape[1]
        place = y * np.cos(angle) - x / aspect * np.sin(angle) + 0.5
        assert (view.box[1] + view.box[3]) / 2 == pytest.approx(place, abs=0.006)
        assert abs(view.image.shape[1] - level.image.shape[1]) <= 28


@given(
    hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=60).map(
            lambda shape: (*shape[:2], 3)
        ),
        elements=st.sampled_from([0, 40, 128, 200, 255]),
        fill=st.just(255),
    )
)
def test_any_picture_gives_strips_within_the_page(pixels):
    for view in find_strips(pixels):
        left, top, right, bottom = view.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert view.image.shape[0] == STRIP_HEIGHT


def test_an_empty_page_has_no_strips():
    for grey in (0, 128, 255):
        assert find_strips(np.full((300, 200, 3), grey, np.uint8)) == []


def test_a_page_rendered_in_grey_gives_the_strips_of_its_colours(make_pdf, page):
    path = make_pdf(page(lines=[(72, 100, 12, "black on white")]))
    with open_document(path) as document:
        (colour,) = find_strips(document.render(0, dpi=DPI))
        (grey,) = find_strips(document.render_grey(0, dpi=DPI))
    assert colour.box == pytest.approx(grey.box, abs=0.001)
    pictures = [view.image.astype(float).ravel() for view in (colour, grey)]
    assert np.corrcoef(*pictures)[0, 1] > 0.85  # PDFium places glyphs a third of a pixel apart


def test_page_views_are_the_page_its_strips_or_four_overlapping_tiles(draw, page):
    pixels = draw(page(lines=[(72, 100, 12, "one line")]))
    (whole,) = page_views(pixels, "page")
    assert whole.box == (0.0, 0.0, 1.0, 1.0)
    assert whole.image is pixels
    assert len(page_views(pixels, "strips")) == 1
    covered = np.zeros(pixels.shape[:2], int)
    for tile in page_views(pixels, "tiles"):
        left, top, right, bottom = tile.box
        rows = slice(round(top * len(pixels)), round(bottom * len(pixels)))
        columns = slice(round(left * pixels.shape[1]), round(right * pixels.shape[1]))
        np.testing.assert_array_equal(tile.image, pixels[rows, columns])
        covered[rows, columns] += 1
    assert covered.min() == 1
    assert covered.max() == 4
