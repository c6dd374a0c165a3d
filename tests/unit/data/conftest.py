"""PDFs written byte by byte, so that each test knows what stands where on a page."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

_FONTS = {"F1": "Helvetica", "F2": "Times-Roman", "F3": "Helvetica-Bold", "F4": "Courier"}


@dataclass
class PdfPage:
    """One page: lines of `(x, y from the top, size, text)`, and raw drawing operators."""

    lines: list = field(default_factory=list)
    operators: str = ""
    size: tuple = (612, 792)
    rotate: int = 0
    font: str = "F1"

    def content(self) -> bytes:
        parts = [self.operators]
        for x, y, size, text in self.lines:
            escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
            parts.append(f"BT /{self.font} {size} Tf {x} {self.size[1] - y} Td ({escaped}) Tj ET")
        return "\n".join(parts).encode("latin-1")


def pdf_bytes(pages, outline=(), trailer="", to_unicode="") -> bytes:
    """A PDF of these pages; outline entries are `(title, page, y from the top or None)`.

    `to_unicode` maps codes of the fonts, as in `<78> <00660069>`.
    """
    num, first_page = len(pages), 3 + len(_FONTS)
    kids = " ".join(f"{first_page + 2 * row} 0 R" for row in range(num))
    bodies = {
        1: f"<< /Type /Catalog /Pages 2 0 R /Outlines {first_page + 2 * num} 0 R >>",
        2: f"<< /Type /Pages /Count {num} /Kids [{kids}] >>",
    }
    for row, name in enumerate(_FONTS.values()):
        bodies[3 + row] = (
            f"<< /Type /Font /Subtype /Type1 /BaseFont /{name} /Encoding /WinAnsiEncoding >>"
        )
    fonts = " ".join(f"/{key} {3 + row} 0 R" for row, key in enumerate(_FONTS))
    for row, page in enumerate(pages):
        number, content = first_page + 2 * row, page.content()
        bodies[number] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {page.size[0]} {page.size[1]}] "
            f"/Rotate {page.rotate} /Resources << /Font << {fonts} >> >> "
            f"/Contents {number + 1} 0 R >>"
        )
        bodies[number + 1] = b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)
    root = first_page + 2 * num
    bodies[root] = _outline_root(root, len(outline))
    for row, (title, target, top) in enumerate(outline):
        height = "null" if top is None else str(pages[target].size[1] - top)
        siblings = f"/Next {root + row + 2} 0 R " if row + 1 < len(outline) else ""
        bodies[root + row + 1] = (
            f"<< /Title <FEFF{title.encode('utf-16-be').hex()}> /Parent {root} 0 R {siblings}"
            f"/Dest [{first_page + 2 * target} 0 R /XYZ null {height} null] >>"
        )
    if to_unicode:
        _add_map(bodies, to_unicode)
    return _assembled(bodies, trailer)


def _add_map(bodies, to_unicode):
    number = max(bodies) + 1
    codes = "1 begincodespacerange <00> <ff> endcodespacerange"
    content = f"begincmap {codes} 1 beginbfchar {to_unicode} endbfchar endcmap"
    bodies[number] = f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"
    for row in range(len(_FONTS)):
        bodies[3 + row] = bodies[3 + row].removesuffix(">>") + f"/ToUnicode {number} 0 R >>"


def _outline_root(root, num_entries):
    if not num_entries:
        return "<< /Type /Outlines /Count 0 >>"
    return (
        f"<< /Type /Outlines /First {root + 1} 0 R /Last {root + num_entries} 0 R "
        f"/Count {num_entries} >>"
    )


def _assembled(bodies, trailer):
    written, offsets = b"%PDF-1.7\n", {}
    for number in sorted(bodies):
        body = bodies[number]
        offsets[number] = len(written)
        body = body if isinstance(body, bytes) else body.encode("latin-1")
        written += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(written)
    written += b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    for number in sorted(bodies):
        written += b"%010d 00000 n \n" % offsets[number]
    closing = f"trailer\n<< /Size {len(bodies) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n"
    return written + closing.encode("latin-1") + b"%%EOF\n"


@pytest.fixture
def page():
    return PdfPage


@pytest.fixture
def make_pdf(tmp_path):
    def make(*pages, outline=(), name="document.pdf", trailer="", to_unicode="") -> Path:
        path = tmp_path / name
        path.write_bytes(pdf_bytes(pages, outline, trailer, to_unicode))
        return path

    return make
