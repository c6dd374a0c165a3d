import numpy as np
import pytest
from PIL import Image

from colfolio.data.documents import open_document
from colfolio.data.pages.views import STRIP_HEIGHT, STRIP_MAX_WIDTH, find_strips, snap_to_ink
from colfolio.data.pairs import PageTitle, StripSettings, page_titles, strip_pairs
from colfolio.errors import DocumentError

SETTINGS = StripSettings()
WORDS = [
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india"),
    *("juliet", "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo"),
    *("sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
]


def headings(path):
    return [pair for pair in strip_pairs(path, SETTINGS, False) if pair.kind == "heading"]


def words(path, settings=SETTINGS):
    return [pair for pair in strip_pairs(path, settings, True) if pair.kind == "words"]


def body(num_lines, num_words=12, top=150):
    lines = []
    for row in range(num_lines):
        chosen = [WORDS[(row + 5 * place) % len(WORDS)] for place in range(num_words)]
        lines.append((72, top + 14 * row, 10, " ".join(chosen)))
    return lines


def test_a_heading_is_cropped_where_its_title_stands(make_pdf, page):
    lines = [(72, 100, 18, "First steps"), (72, 130, 10, "Some text about other things.")]
    path = make_pdf(page(lines=lines), outline=[("First steps", 0, 80)])
    (pair,) = headings(path)
    assert (pair.text, pair.kind, pair.page) == ("First steps", "heading", 0)
    assert pair.image.shape[0] == STRIP_HEIGHT
    left, top, right, bottom = pair.box
    assert left == pytest.approx(72 / 612, abs=0.005)
    assert 80 / 792 < top < 100 / 792 < bottom < 108 / 792
    assert 0.2 < right < 0.4


def test_a_heading_crop_is_the_strip_that_is_found_in_the_pixels(make_pdf, page):
    lines = [(72, 100, 18, "First steps"), (72, 130, 10, "Some text about other things.")]
    path = make_pdf(page(lines=lines), outline=[("First steps", 0, 80)])
    (pair,) = headings(path)
    with open_document(path) as document:
        views = find_strips(document.render_grey(0, dpi=SETTINGS.dpi))
    (same,) = [view for view in views if view.box == pair.box]
    np.testing.assert_array_equal(same.image, pair.image)


@pytest.mark.parametrize(
    ("title", "line", "found"),
    [
        ("2.3 First steps", "2.3  First steps", "2.3 First steps"),
        ("2.3 First steps", "First steps", "First steps"),
        ("Chapter 4: First steps", "First steps", "First steps"),
        ("FIRST  STEPS", "First steps", "First steps"),
        ("A.1 “First” steps", '"First" steps', '"First" steps'),
        ("First — steps", "First - steps", "First - steps"),
        ("ﬁrst steps", "first steps", "first steps"),
        ("First steps", "7 First steps", "First steps"),
        ("Largest", "The largest of all", "largest"),
    ],
)
def test_titles_are_found_however_they_are_spelled(make_pdf, page, title, line, found):
    path = make_pdf(page(lines=[(72, 100, 18, line)]), outline=[(title, 0, None)])
    assert page_titles(path) == [PageTitle(found, 0)]
    assert [pair.text for pair in headings(path)] == [found]


@pytest.mark.parametrize(
    ("title", "line"),
    [
        ("First steps", "Second steps"),
        ("steps", "Firststeps"),
        ("2.3", "2.3"),
        ("Use", "Use"),
        ("First steps", "First steps . . . . . . . . 12"),
        ("First steps", "First steps     12"),
        ("First steps", ""),
        ("First steps", "First steps" + " " * 60 + "iv"),
    ],
)
def test_a_title_that_does_not_stand_on_its_page_is_left_out(make_pdf, page, title, line):
    path = make_pdf(page(lines=[(72, 100, 12, line)]), outline=[(title, 0, None)])
    assert page_titles(path) == []
    assert headings(path) == []


def test_of_several_occurrences_the_one_at_the_destination_counts(make_pdf, page):
    lines = [(72, 100, 20, "Results"), (72, 300, 12, "Results"), (72, 500, 12, "Results")]
    near = make_pdf(page(lines=lines), outline=[("Results", 0, 285)])
    assert headings(near)[0].box[1] == pytest.approx(291 / 792, abs=0.005)
    anywhere = make_pdf(page(lines=lines), outline=[("Results", 0, None)])
    assert headings(anywhere)[0].box[1] == pytest.approx(86 / 792, abs=0.005)


def test_of_a_title_over_two_lines_the_longer_first_part_is_taken(make_pdf, page):
    title = "A rather long title about the first steps in a new field"
    lines = [(72, 100, 18, "A rather long title about the first"), (72, 122, 18, title[36:])]
    path = make_pdf(page(lines=lines), outline=[(title, 0, 80)])
    assert [pair.text for pair in headings(path)] == ["A rather long title about the first"]
    lines = [(72, 100, 18, "A rather long"), (72, 122, 18, title[14:])]
    path = make_pdf(page(lines=lines), outline=[(title, 0, 80)])
    assert headings(path) == []


def test_a_title_in_invisible_ink_has_no_crop(make_pdf, page):
    hidden = "BT 3 Tr /F1 18 Tf 72 600 Td (First steps) Tj ET"
    path = make_pdf(page(operators=hidden), outline=[("First steps", 0, None)])
    assert headings(path) == []
    assert page_titles(path) == [PageTitle("First steps", 0)]


def test_the_same_title_twice_in_the_outline_counts_once(make_pdf, page):
    path = make_pdf(
        page(lines=[(72, 100, 18, "First steps")]), outline=[("First steps", 0, 80)] * 2
    )
    assert len(headings(path)) == 1
    assert len(page_titles(path)) == 1


def test_strips_of_words_show_the_words_that_they_name(make_pdf, page):
    """Each word has a place of its own, so a strip's box says which words it shows."""
    rows = [WORDS[5 * row : 5 * row + 5] for row in range(5)]
    operators = " ".join(  # one text object a row, so that the words of a row are one line
        f"BT /F1 20 Tf 20 {692 - 40 * row} Td ({') Tj 110 0 Td ('.join(names)}) Tj ET"
        for row, names in enumerate(rows)
    )
    pairs = words(make_pdf(page(operators=operators)))
    assert len(pairs) > 8
    assert any(len(pair.text.split()) > 1 for pair in pairs)
    for pair in pairs:
        names = rows[round((pair.box[3] * 792 - 101) / 40)]
        chosen = pair.text.split()
        first = names.index(chosen[0])
        assert names[first : first + len(chosen)] == chosen
        assert pair.box[0] * 612 == pytest.approx(20 + 110 * first, abs=3)
        place = 20 + 110 * (first + len(chosen) - 1)
        assert place + 20 < pair.box[2] * 612 < place + 100


def test_strips_of_words_are_consecutive_words_of_one_line(make_pdf, page):
    lines = body(40)
    pairs = words(make_pdf(page(lines=lines)))
    assert len(pairs) == SETTINGS.strips_per_page
    for pair in pairs:
        assert any(pair.text in text for _, _, _, text in lines)
        assert pair.image.shape[0] == STRIP_HEIGHT
        assert pair.image.shape[1] <= STRIP_MAX_WIDTH
    rows = {round(pair.box[3] * 792) for pair in pairs}
    assert len(rows) > 20


def test_lengths_of_strips_are_those_of_headings(make_pdf, page):
    lines = [
        (72, 60 + 14 * row, 10, "it was an old oak in a far off place " * 2) for row in range(50)
    ]
    pairs = words(make_pdf(*[page(lines=lines)] * 4), StripSettings(strips_per_page=400))
    counts = np.array([len(pair.text.split()) for pair in pairs])
    assert counts.min() == 1 or counts.min() == 2
    assert counts.max() == 8
    assert 2.8 < counts.mean() < 4.2


def test_words_per_strip_and_strips_per_page_are_limits(make_pdf, page):
    path = make_pdf(page(lines=body(40)), page(lines=body(40)))
    pairs = words(path, StripSettings(strips_per_page=7, words_per_strip=2))
    assert [sum(pair.page == row for pair in pairs) for row in (0, 1)] == [7, 7]
    assert max(len(pair.text.split()) for pair in pairs) <= 2
    assert words(path, StripSettings(strips_per_page=0)) == []


def test_the_seed_and_the_content_decide_everything(make_pdf, page):
    path = make_pdf(page(lines=body(20)), name="first.pdf")
    copy = make_pdf(page(lines=body(20)), name="second.pdf")
    first, second = words(path), words(copy)
    assert [pair.text for pair in first] == [pair.text for pair in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    changed = words(path, StripSettings(seed=1))
    assert [pair.text for pair in first] != [pair.text for pair in changed]


def test_jitter_moves_the_ink_of_words_and_never_of_headings(make_pdf, page):
    lines = [(72, 100, 18, "First steps"), *body(20)]
    path = make_pdf(page(lines=lines), outline=[("First steps", 0, 80)])
    still = StripSettings(jitter=False)
    tops = {}
    for name, settings in (("moved", SETTINGS), ("still", still)):
        pairs = strip_pairs(path, settings, True)
        ink = [np.flatnonzero((pair.image[:, :, 0] < 200).any(axis=1)) for pair in pairs]
        assert ink[0][0] == 4
        tops[name] = {int(rows[0]) for rows in ink[1:]}
    assert len(tops["moved"]) > 3
    assert len(tops["still"] - {4, 5}) <= 3


def test_text_that_is_not_level_or_not_readable_gives_no_strips(make_pdf, page):
    operators = " ".join(
        [
            "BT /F1 10 Tf 0 1 -1 0 300 300 Tm (upwards along the margin of the page) Tj ET",
            "BT /F1 10 Tf 0.7 0.7 -0.7 0.7 100 100 Tm (slanting across all of the page) Tj ET",
            "BT /F1 10 Tf -1 0 0 -1 500 500 Tm (standing on the head here) Tj ET",
            "BT /F1 10 Tf 72 700 Td (12 + 34 = 46; 7.8 9.0 = {} 1234) Tj ET",
            "BT /F1 10 Tf 720 700 Td (beside the page altogether) Tj ET",
        ]
    )
    assert words(make_pdf(page(operators=operators))) == []


@pytest.mark.parametrize("rotate", [90, 180, 270])
def test_turned_pages_are_read_as_they_are_shown(make_pdf, page, rotate):
    matrix = {90: "0 1 -1 0 300 100", 180: "-1 0 0 -1 500 500", 270: "0 -1 1 0 300 700"}[rotate]
    operators = f"BT /F1 20 Tf {matrix} Tm (Turned heading) Tj ET"
    path = make_pdf(page(operators=operators, rotate=rotate), outline=[("Turned heading", 0, None)])
    (pair,) = headings(path)
    with open_document(path) as document:
        pixels = document.render_grey(0, dpi=SETTINGS.dpi)
    assert pair.box == pytest.approx(snap_to_ink(pixels, (0.0, 0.0, 1.0, 1.0)), abs=0.002)
    assert pair.image.shape[1] > 4 * STRIP_HEIGHT


def test_words_far_apart_are_not_one_line(make_pdf, page):
    rows = [
        line
        for row in range(20)
        for line in ((72, 100 + 20 * row, 10, "left"), (140, 100 + 20 * row, 10, "right"))
    ]
    assert {pair.text for pair in words(make_pdf(page(lines=rows)))} == {"left", "right"}


def test_documents_without_text_have_no_pairs(tmp_path, make_pdf, page):
    Image.new("RGB", (200, 300), "white").save(tmp_path / "scan.png")
    assert strip_pairs(tmp_path / "scan.png", SETTINGS, True) == []
    assert page_titles(tmp_path / "scan.png") == []
    assert strip_pairs(make_pdf(page()), SETTINGS, True) == []


def test_headings_alone_are_the_headings_among_all_pairs(make_pdf, page):
    lines = [(72, 100, 18, "First steps"), *body(5)]
    path = make_pdf(page(lines=lines), outline=[("First steps", 0, 80)])
    alone, all_pairs = strip_pairs(path, SETTINGS, False), strip_pairs(path, SETTINGS, True)
    assert [pair.text for pair in alone] == ["First steps"]
    assert [pair.text for pair in all_pairs if pair.kind == "heading"] == ["First steps"]


def test_a_damaged_document_is_named(tmp_path):
    path = tmp_path / "broken.pdf"
    path.write_bytes(b"%PDF-1.7 and no more")
    for read in (lambda: strip_pairs(path, SETTINGS, True), lambda: page_titles(path)):
        with pytest.raises(DocumentError, match=r"broken\.pdf"):
            read()
