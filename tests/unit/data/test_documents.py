import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from colfolio.data.documents import (
    MAX_RENDERED_PIXELS,
    content_hash,
    find_documents,
    load_image,
    open_document,
)
from colfolio.errors import DocumentError


def ink_centre(pixels):
    rows, columns = np.nonzero(pixels.min(axis=2) < 128)
    return columns.mean() / pixels.shape[1], rows.mean() / pixels.shape[0]


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        parts += struct.pack(">I", len(body)) + kind + body
        parts += struct.pack(">I", zlib.crc32(kind + body))
    return parts


def test_documents_are_found_below_a_folder_in_sorted_order(tmp_path, make_pdf, page):
    (tmp_path / "b").mkdir()
    make_pdf(page(), name="b/z.PDF")
    make_pdf(page(), name="c.pdf")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no document")
    found = [path.relative_to(tmp_path).as_posix() for path in find_documents(tmp_path)]
    assert found == ["a.png", "b/z.PDF", "c.pdf"]
    assert find_documents(tmp_path / "c.pdf") == [tmp_path / "c.pdf"]


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt"])
def test_a_place_without_documents_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no document")
    with pytest.raises(DocumentError, match=name):
        find_documents(tmp_path / name)


def test_a_page_is_rendered_at_its_dpi_in_colour_and_grey(make_pdf, page):
    red = page(operators="1 0 0 rg 306 396 306 396 re f")
    with open_document(make_pdf(red)) as document:
        assert document.num_pages == 1
        assert document.page_size(0) == (612, 792)
        pixels = document.render(0, dpi=36.0)
        grey = document.render_grey(0, dpi=36.0)
    assert pixels.shape == (396, 306, 3)
    assert grey.shape == (396, 306)
    assert pixels[10, -10].tolist() == [255, 0, 0]
    assert pixels[-10, 10].tolist() == [255, 255, 255]
    assert grey[10, -10] < 128 < grey[-10, 10]


def test_a_giant_page_is_rendered_with_fewer_dpi(make_pdf, page):
    with open_document(make_pdf(page(size=(14400, 14400)))) as document:
        pixels = document.render_grey(0, dpi=600.0)
    assert 0.9 * MAX_RENDERED_PIXELS < pixels.size <= 1.01 * MAX_RENDERED_PIXELS


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_character_boxes_lie_on_the_ink_of_the_page_as_shown(make_pdf, page, rotate):
    path = make_pdf(page(lines=[(100, 200, 40, "x")], rotate=rotate))
    with open_document(path) as document:
        text, pixels = document.text_boxes(0), document.render(0, dpi=72.0)
    assert text.characters.strip() == "x"
    left, top, right, bottom = text.boxes[0]
    middle = (left + right) / 2, (top + bottom) / 2
    assert middle == pytest.approx(ink_centre(pixels), abs=0.005)


def test_outline_entries_name_page_and_height(make_pdf, page):
    outline = [("Größe  und\nMaß", 1, 198), ("Nowhere near", 0, None)]
    with open_document(make_pdf(page(), page(), outline=outline)) as document:
        entries = document.outline()
    assert [(entry.title, entry.page) for entry in entries] == [
        ("Größe und Maß", 1),
        ("Nowhere near", 0),
    ]
    assert entries[0].top_fraction == pytest.approx(0.25)
    assert entries[1].top_fraction is None


@pytest.mark.parametrize(
    ("mapped", "characters"),
    [
        ("00660069", "fi"),
        ("66006900", "fi"),  # bytes swapped, as some Ghostscript versions wrote them
        ("6600d200", "f\u00d2"),
        ("6f225b57", "\u6f22\u5b57"),
        ("66006f22", "\u6600\u6f22"),  # Chinese beside it: taken at its word
        ("0007", "\ufffd"),
        ("d800", "\ufffd"),
    ],
)
def test_characters_are_what_the_font_maps_them_to(make_pdf, page, mapped, characters):
    path = make_pdf(page(lines=[(72, 100, 20, "x")]), to_unicode=f"<78> <{mapped}>")
    with open_document(path) as document:
        assert document.text_boxes(0).characters.strip() == characters


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"%PDF-1.7\nnothing here", "damaged"),
        (b"\x00" * 2000, "damaged"),
    ],
)
def test_a_broken_pdf_is_refused_with_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "broken.pdf"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=f"broken.pdf.*{reason}"):
        open_document(path)


def test_a_pdf_without_pages_is_refused(make_pdf):
    with pytest.raises(DocumentError, match="no pages"):
        open_document(make_pdf())


@pytest.mark.parametrize("size", [(201, 1), (3, 900)])
def test_an_image_far_too_long_is_refused_by_name(tmp_path, size):
    path = tmp_path / "thread.png"
    Image.new("L", size).save(path)
    expected = rf"thread.png: has {size[0]} x {size[1]} pixels, one side over 200 times the other"
    for read in (load_image, open_document):
        with pytest.raises(DocumentError, match=expected):
            read(path)
    Image.new("L", (200, 1)).save(path)
    assert load_image(path).shape == (1, 200, 3)


def test_a_missing_image_is_not_called_damaged(tmp_path):
    with pytest.raises(DocumentError, match=r"none.png: does not exist$"):
        load_image(tmp_path / "none.png")


def test_a_pdf_with_damaged_bytes_is_read_or_refused(make_pdf, page):
    outline = [("First steps", 0, 100), ("Second steps", 1, 200)]
    path = make_pdf(*[page(lines=[(72, 100, 20, "First steps")])] * 2, outline=outline)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    num_read = 0
    for _ in range(200):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), 12):
            content[place] = generator.integers(0, 256)
        path.write_bytes(content)
        try:
            with open_document(path) as document:
                document.outline()
                for row in range(document.num_pages):
                    document.text_boxes(row)
                    document.render_grey(row, dpi=20.0)
            num_read += 1
        except DocumentError:
            continue
    assert 20 < num_read < 200


def test_a_title_of_half_a_surrogate_pair_is_left_out(make_pdf, page):
    path = make_pdf(page(), outline=[("AB", 0, 10), ("whole", 0, 20)])
    path.write_bytes(path.read_bytes().replace(b"<FEFF00410042>", b"<FEFF0041D800>"))
    with open_document(path) as document:
        assert [entry.title for entry in document.outline()] == ["whole"]


def test_an_encrypted_pdf_is_refused(make_pdf, page):
    key = "00" * 32
    encrypt = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{key}> /U <{key}> >>"
    path = make_pdf(page(), trailer=f"{encrypt} /ID [<00> <00>]")
    with pytest.raises(DocumentError, match=r"document\.pdf.*password"):
        open_document(path)


def test_a_damaged_page_is_named_and_the_others_stay_readable(make_pdf, page):
    path = make_pdf(page(), page())
    content = path.read_bytes()
    start = content.rindex(b"/Type /Page ")
    path.write_bytes(content[:start] + b"/Type /Lost " + content[start + 12 :])
    with open_document(path) as document:
        document.render(0, dpi=20.0)
        with pytest.raises(DocumentError, match=r"document\.pdf.*page 2"):
            document.render(1, dpi=20.0)


def test_a_page_that_does_not_exist_is_refused(make_pdf, page):
    with open_document(make_pdf(page())) as document:
        for call in (document.page_size, document.text_boxes):
            with pytest.raises(DocumentError, match="no page 2"):
                call(1)


@pytest.mark.parametrize("name", ["folder.pdf", "missing.pdf", "letter.docx"])
def test_what_is_no_document_is_refused(tmp_path, name):
    (tmp_path / "folder.pdf").mkdir()
    (tmp_path / "letter.docx").write_bytes(b"PK")
    with pytest.raises(DocumentError, match=name):
        open_document(tmp_path / name)


def test_the_size_of_an_image_bomb_is_read_from_its_header_only(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(DocumentError, match=r"bomb\.png.*pixels"):
        open_document(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_just_over_the_limit_is_refused_with_its_size():
    with pytest.raises(DocumentError, match="12000 x 10000"):
        load_image(png_header(12_000, 10_000))


@pytest.mark.parametrize("content", [b"no image", png_header(30, 30), b"\xff\xd8\xff\xe0garbage"])
def test_an_unreadable_image_is_refused(tmp_path, content):
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=r"scan\.png"):
        open_document(path)


def test_truncated_images_are_refused_or_whole(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "webp", "tiff", "bmp", "gif"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind)
        content = stream.getvalue()
        for length in range(0, len(content), max(1, len(content) // 25)):
            try:
                assert load_image(content[:length]).shape == (40, 60, 3)
            except DocumentError:
                continue


def test_alpha_lies_on_white_and_grey_and_deep_images_become_rgb():
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert (load_image(clear) == 255).all()
    deep = Image.fromarray(np.full((2, 3), 32768, np.uint16))
    assert (load_image(deep) == 127).all()
    assert load_image(Image.new("L", (3, 2), 9)).tolist() == [[[9, 9, 9]] * 3] * 2
    assert load_image(Image.new("CMYK", (3, 2))).shape == (2, 3, 3)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "white")
    exif = image.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "jpeg", exif=exif)
    assert load_image(stream.getvalue()).shape == (40, 20, 3)


def test_an_image_is_a_page_eleven_inches_long_and_never_scaled_up(tmp_path):
    Image.new("L", (500, 1100), 255).save(tmp_path / "scan.png")
    with open_document(tmp_path / "scan.png") as document:
        assert document.num_pages == 1
        assert document.page_size(0) == pytest.approx((360, 792))
        assert document.render(0, dpi=50.0).shape == (550, 250, 3)
        assert document.render(0, dpi=300.0).shape == (1100, 500, 3)
        assert document.render_grey(0, dpi=50.0).shape == (550, 250)
        assert document.outline() == []
        assert document.text_boxes(0).characters == ""


def test_a_tiff_has_a_page_for_each_of_its_images(tmp_path):
    images = [Image.new("L", (20, 20), grey) for grey in (10, 20, 30)]
    images[0].save(tmp_path / "fax.tiff", save_all=True, append_images=images[1:])
    with open_document(tmp_path / "fax.tiff") as document:
        assert document.num_pages == 3
        greys = [int(document.render(page, dpi=300.0)[0, 0, 0]) for page in (2, 0, 1)]
    assert greys == [30, 10, 20]


def test_the_content_hash_depends_on_bytes_alone(tmp_path):
    for name, content in (("a.pdf", b"1"), ("b.pdf", b"1"), ("c.pdf", b"2")):
        (tmp_path / name).write_bytes(content)
    first, second, third = (content_hash(tmp_path / name) for name in ("a.pdf", "b.pdf", "c.pdf"))
    assert first == second != third


def test_threads_may_read_documents_at_the_same_time(make_pdf, page):
    paths = [
        make_pdf(page(lines=[(72, 100, 20, f"thread {row}")]), name=f"{row}.pdf")
        for row in range(4)
    ]
    found = {}

    def read(row):
        for _ in range(20):
            with open_document(paths[row]) as document:
                document.render(0, dpi=40.0)
                found.setdefault(row, set()).add(document.text_boxes(0).characters.strip())

    threads = [threading.Thread(target=read, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {row: {f"thread {row}"} for row in range(4)}
