import os

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from colfolio.data.documents import open_document
from colfolio.data.pages.views import STRIP_HEIGHT, find_strips
from colfolio.errors import IndexStoreError
from colfolio.search import IndexSettings, Searcher, SourcePage, build_index, heat_map, hit_image
from colfolio.search.heatmap import page_image
from colfolio.search.index import strip_region

GREEN = "0,200,0"


def page_with_green(row: int, column: int) -> np.ndarray:
    image = np.random.default_rng(0).integers(60, 80, (28 * 6, 28 * 4, 3), dtype=np.uint8)
    image[row * 28 : (row + 1) * 28, column * 28 : (column + 1) * 28] = (0, 200, 0)
    return image


@pytest.mark.parametrize("place", [(0, 0), (4, 1), (5, 3)])
def test_heat_peaks_where_the_query_matches(tmp_path, encoder, place):
    build_index(
        encoder, [SourcePage("a", 0, page_with_green(*place))], tmp_path / "i", IndexSettings()
    )
    searcher = Searcher(tmp_path / "i", encoder)
    (hit,) = searcher.search(GREEN)
    heat = heat_map(searcher, hit, GREEN)
    assert heat.shape == (6, 4)
    assert np.unravel_index(heat.argmax(), heat.shape) == place
    assert heat.max() == pytest.approx(1)
    assert heat.min() >= 0


@pytest.mark.parametrize("views", ["page", "tiles"])
def test_the_picture_is_changed_most_where_the_query_matches(tmp_path, encoder, views):
    # green as wide as two tokens, so that one lies in it wherever the tile begins
    page = np.random.default_rng(0).integers(60, 80, (560, 560, 3), dtype=np.uint8)
    page[28 * 14 : 28 * 16, 28 * 5 : 28 * 7] = (0, 200, 0)
    settings = IndexSettings(views=views)
    build_index(encoder, [SourcePage("a", 0, page)], tmp_path / "i", settings)
    searcher = Searcher(tmp_path / "i", encoder)
    (hit,) = searcher.search(GREEN)
    marked = hit_image(searcher, hit, GREEN)
    plain = page_image(searcher.store.page(0))
    assert marked.shape == plain.shape == page.shape
    change = (plain.astype(int) - marked).sum(axis=2)
    blocks = change.reshape(20, 28, 20, 28).sum(axis=(1, 3))
    row, column = np.unravel_index(blocks.argmax(), blocks.shape)
    assert row in (14, 15)
    assert column in (5, 6)


def test_pages_are_drawn_from_their_file_until_it_changes(tmp_path, encoder):
    source = tmp_path / "page.png"
    Image.fromarray(page_with_green(1, 1)).save(source)
    build_index(encoder, source, tmp_path / "kept", IndexSettings())
    build_index(encoder, source, tmp_path / "bare", IndexSettings(store_pages=False))
    kept, bare = (Searcher(tmp_path / name, encoder).store.page(0) for name in ("kept", "bare"))
    with open_document(source) as document:
        shown = document.render(0, dpi=110.0)
    np.testing.assert_array_equal(page_image(kept), shown)
    np.testing.assert_array_equal(page_image(bare), shown)
    Image.fromarray(page_with_green(5, 3)).save(source)
    os.utime(source, ns=(1, 1))
    stored = page_image(kept)
    assert (stored == stored[..., :1]).all()
    assert stored[40, 40, 0] > stored[150, 100, 0]
    with pytest.raises(IndexStoreError, match=r"page\.png: is gone or has changed"):
        page_image(bare)
    source.unlink()
    np.testing.assert_array_equal(page_image(kept), stored)


def test_the_region_of_a_strip_is_the_page_under_its_whole_image(tmp_path):
    page = Image.new("RGB", (900, 300), "white")
    font = ImageFont.load_default(30)
    ImageDraw.Draw(page).text((200, 100), "Hxg where it lies", fill="black", font=font)
    (strip,) = find_strips(np.asarray(page))
    region = strip_region(strip)
    pixels = [round(edge * side) for edge, side in zip(region, (900, 300) * 2, strict=True)]
    cut = page.crop(tuple(pixels)).resize((strip.image.shape[1], STRIP_HEIGHT))
    away = np.abs(np.asarray(cut).astype(int) - strip.image)
    assert away.mean() < 20
    shifted = np.abs(np.roll(np.asarray(cut), 3, axis=1).astype(int) - strip.image)
    assert shifted.mean() > 2 * away.mean()


def test_a_strip_of_a_crooked_page_covers_as_much_of_it_as_one_of_a_level_page():
    page = Image.new("RGB", (900, 300), "white")
    font = ImageFont.load_default(30)
    ImageDraw.Draw(page).text((200, 130), "A heading on a crooked scan", fill="black", font=font)
    crooked = page.rotate(-2.5, Image.Resampling.BICUBIC, fillcolor="white")
    scales = []
    for image in (page, crooked):
        (strip,) = find_strips(np.asarray(image))
        left, _, right, _ = strip_region(strip)
        scales.append((right - left) / strip.image.shape[1])
    assert scales[1] == pytest.approx(scales[0], rel=0.05)


def test_hits_on_strips_are_framed_where_the_strip_lies(tmp_path, encoder):
    page = Image.new("RGB", (900, 600), "white")
    font = ImageFont.load_default(30)
    for row in range(3):
        ImageDraw.Draw(page).text((200, 100 + 150 * row), f"line {row}", fill="black", font=font)
    image = np.asarray(page)
    build_index(encoder, [SourcePage("a", 0, image)], tmp_path / "i", IndexSettings(views="strips"))
    searcher = Searcher(tmp_path / "i", encoder)
    (hit,) = searcher.search("1,2,3")
    rows = np.abs(
        hit_image(searcher, hit, "1,2,3").astype(int) - page_image(searcher.store.page(0))
    )
    rows = np.flatnonzero(rows.sum(axis=(1, 2)))
    height = page_image(searcher.store.page(0)).shape[0]
    assert hit.box[1] - 0.03 < rows.min() / height <= rows.max() / height < hit.box[3] + 0.03
