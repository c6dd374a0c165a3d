"""PDFs and images as documents of pages: size, pixels, outline, and characters with their boxes.

Boxes are `(left, top, right, bottom)` as fractions of the page as it is shown (rotation and crop
box applied), with the origin at the top left. Pages are counted from 0, and from 1 in messages.
PDFium is not thread-safe, so every call into it holds one lock: threads take turns, and work that
should run in parallel belongs into processes.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium
from jaxtyping import UInt8
from PIL import Image

from colfolio.data.pages.images import IMAGE_SUFFIXES, load_image, num_images
from colfolio.data.pages.text_layer import PageText, read_page_text
from colfolio.errors import DocumentError

MAX_RENDERED_PIXELS = 32_000_000
IMAGE_LONG_SIDE_PT = 792.0

_PDFIUM = threading.RLock()
_REASONS = {
    pdfium.FPDF_ERR_FILE: "cannot be read",
    pdfium.FPDF_ERR_FORMAT: "is damaged, has no pages, or is no PDF",
    pdfium.FPDF_ERR_PASSWORD: "is encrypted with a password; save a copy without one",
    pdfium.FPDF_ERR_SECURITY: "is encrypted in a way that PDFium does not know",
    pdfium.FPDF_ERR_PAGE: "has a damaged page tree",
}


@dataclass(frozen=True, slots=True)
class OutlineEntry:
    """One entry of a document's outline, and where it points.

    Args:
        level: 0 for a chapter, 1 for what stands below it, and so on.
        page: the page it points to, from 0.
        top_fraction: height on the page, 0 at the top; None where the entry names the page only.
    """

    title: str
    level: int
    page: int
    top_fraction: float | None


def find_documents(root: Path) -> list[Path]:
    """The PDFs and images below a folder in sorted order, or the one file itself.

    Raises:
        DocumentError: the path does not exist, or holds no PDF and no image.
    """
    if root.is_file():
        if _is_document(root):
            return [root]
        raise DocumentError(root, f"is of an unknown kind; expected {_KINDS}")
    if not root.is_dir():
        raise DocumentError(root, "does not exist")
    found = sorted(path for path in root.rglob("*") if _is_document(path) and path.is_file())
    if not found:
        raise DocumentError(root, f"holds no document; expected {_KINDS}")
    return found


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DocumentError(path, f"cannot be read ({error.strerror})") from None


def open_document(path: Path) -> Document:
    """Open a PDF or an image; close it, or use it in a `with` block.

    Raises:
        DocumentError: missing, empty, damaged, encrypted, too large, or of an unknown kind.
    """
    if path.is_dir():
        raise DocumentError(path, "is a folder; name a file, or list it with find_documents")
    if not path.is_file():
        raise DocumentError(path, "does not exist")
    if not _is_document(path):
        raise DocumentError(path, f"is of an unknown kind; expected {_KINDS}")
    if path.stat().st_size == 0:
        raise DocumentError(path, "is empty (0 bytes)")
    return PdfDocument(path) if path.suffix.lower() == ".pdf" else ImageDocument(path)


class Document(ABC):
    """Pages that can be measured and rendered; the base of PDFs and images."""

    path: Path
    num_pages: int

    @abstractmethod
    def page_size(self, page: int) -> tuple[float, float]:
        """Width and height of a page as shown, in points (1/72 inch)."""

    @abstractmethod
    def render(self, page: int, *, dpi: float) -> UInt8[np.ndarray, "height width 3"]:
        """A page as RGB pixels on white; a huge page gets fewer dpi (`MAX_RENDERED_PIXELS`)."""

    @abstractmethod
    def render_grey(self, page: int, *, dpi: float) -> UInt8[np.ndarray, "height width"]:
        """A page as grey pixels, in less time than `render` takes."""

    def outline(self) -> list[OutlineEntry]:
        """The entries that point to a page of the document, in order; empty where none do."""
        return []

    def text_boxes(self, page: int) -> PageText:
        """The characters of a page's text layer; empty where there is none, as in an image."""
        self._check_page(page)
        return PageText("", np.zeros((0, 4), np.float32))

    @abstractmethod
    def close(self) -> None:
        """Release the file; the document cannot be used afterwards."""

    def __enter__(self) -> Document:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_page(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise DocumentError(self.path, f"has {self.num_pages} pages, no page {page + 1}")


class ImageDocument(Document):
    """An image as a document; the longer side of a page is taken to be 11 inches.

    A TIFF has as many pages as it holds images; of an animation the first image counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_pages = num_images(path)
        self._last: tuple[int, UInt8[np.ndarray, "height width 3"]] | None = None
        self._pixels(0)

    def close(self) -> None:
        """Release the decoded image."""
        self._last = None

    def page_size(self, page: int) -> tuple[float, float]:
        """Width and height in points, as if the longer side measured 11 inches."""
        height, width = self._pixels(page).shape[:2]
        scale = IMAGE_LONG_SIDE_PT / max(height, width)
        return width * scale, height * scale

    def render(self, page: int, *, dpi: float) -> UInt8[np.ndarray, "height width 3"]:
        """The image, scaled down to the dpi; never scaled up."""
        pixels = self._pixels(page)
        width, height = _pixel_size(self.path, self.page_size(page), dpi)
        if width >= pixels.shape[1]:
            return pixels.copy()
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        return np.array(resized)

    def render_grey(self, page: int, *, dpi: float) -> UInt8[np.ndarray, "height width"]:
        """The image in grey, scaled down to the dpi; never scaled up."""
        return np.array(Image.fromarray(self.render(page, dpi=dpi)).convert("L"))

    def _pixels(self, page: int) -> UInt8[np.ndarray, "height width 3"]:
        self._check_page(page)
        if self._last is None or self._last[0] != page:
            self._last = page, load_image(self.path, page)
        return self._last[1]


class PdfDocument(Document):
    """A PDF behind PDFium."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _PDFIUM:
            try:
                self._pdf = pypdfium2.PdfDocument(path)
            except pypdfium2.PdfiumError as error:
                reason = _REASONS.get(error.err_code or 0, "cannot be read by PDFium")
                raise DocumentError(path, reason) from None
            self.num_pages = len(self._pdf)
        self._upright_edges: dict[int, tuple[float, float, float, float] | None] = {}

    def close(self) -> None:
        """Release the file; the document cannot be used afterwards."""
        with _PDFIUM:
            self._pdf.close()

    def page_size(self, page: int) -> tuple[float, float]:
        """Width and height of a page as shown, in points (1/72 inch)."""
        self._check_page(page)
        with self._page_errors(page):
            return self._pdf.get_page_size(page)

    def render(self, page: int, *, dpi: float) -> UInt8[np.ndarray, "height width 3"]:
        """A page as RGB pixels on white; a huge page gets fewer dpi (`MAX_RENDERED_PIXELS`)."""
        return self._render(page, dpi, grey=False)

    def render_grey(self, page: int, *, dpi: float) -> UInt8[np.ndarray, "height width"]:
        """A page as grey pixels on white, in about half the time of `render`."""
        return self._render(page, dpi, grey=True)

    def outline(self) -> list[OutlineEntry]:
        """The entries that point to a page of the document, in order; empty where none do."""
        entries = []
        with _PDFIUM:
            for bookmark in self._pdf.get_toc():
                title = _title_of(bookmark)
                dest = bookmark.get_dest()
                page = dest.get_index() if dest else None
                if title and dest and page is not None and page < self.num_pages:
                    place = self._top_fraction(page, _top_of(dest))
                    entries.append(OutlineEntry(title, bookmark.level, page, place))
        return entries

    def text_boxes(self, page: int) -> PageText:
        """The characters of a page's text layer, in the order of the file."""
        with self._opened(page) as handle:
            return read_page_text(handle)

    def _render(self, page: int, dpi: float, grey: bool) -> UInt8[np.ndarray, "height width *rgb"]:
        width, height = self.page_size(page)
        columns, _ = _pixel_size(self.path, (width, height), dpi)
        with self._opened(page) as handle:
            scale: Any = columns / width  # pypdfium2 declares an int, and means any number
            bitmap = handle.render(scale=scale, grayscale=grey, rev_byteorder=True)
            pixels = bitmap.to_numpy().copy()
            bitmap.close()
        return pixels[..., 0] if grey and pixels.ndim == 3 else pixels

    def _top_fraction(self, page: int, top: float | None) -> float | None:
        if page not in self._upright_edges:
            with self._opened(page) as handle:
                edges = handle.get_bbox() if handle.get_rotation() == 0 else None
                self._upright_edges[page] = edges
        edges = self._upright_edges[page]
        if top is None or edges is None:
            return None
        return min(1.0, max(0.0, (edges[3] - top) / max(edges[3] - edges[1], 1e-6)))

    @contextmanager
    def _opened(self, page: int) -> Iterator[pypdfium2.PdfPage]:
        self._check_page(page)
        with self._page_errors(page):
            handle = self._pdf[page]
            try:
                yield handle
            finally:
                handle.close()

    @contextmanager
    def _page_errors(self, page: int) -> Iterator[None]:
        with _PDFIUM:
            try:
                yield
            except pypdfium2.PdfiumError as error:
                reason = f"page {page + 1} is damaged ({error})"
                raise DocumentError(self.path, reason) from None


_KINDS = ".pdf or an image (" + " ".join(sorted(IMAGE_SUFFIXES)) + ")"


def _is_document(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix == ".pdf" or suffix in IMAGE_SUFFIXES


def _pixel_size(path: Path, size_pt: tuple[float, float], dpi: float) -> tuple[int, int]:
    width, height = (side * dpi / 72 for side in size_pt)
    if not (dpi > 0 and 0 < width < 1e9 and 0 < height < 1e9):
        raise DocumentError(path, f"a page of {size_pt} points cannot be drawn at {dpi} dpi")
    shrink = min(1.0, (MAX_RENDERED_PIXELS / (width * height)) ** 0.5)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _title_of(bookmark: pypdfium2.PdfBookmark) -> str:
    try:
        return " ".join(bookmark.get_title().split())
    except UnicodeDecodeError:
        return ""  # half a surrogate pair: no title that anyone could type


def _top_of(dest: pypdfium2.PdfDest) -> float | None:
    """The height that a destination names, in page coordinates; 0 means that it names none."""
    mode, place = dest.get_view()
    index = {
        pdfium.PDFDEST_VIEW_XYZ: 1,
        pdfium.PDFDEST_VIEW_FITH: 0,
        pdfium.PDFDEST_VIEW_FITBH: 0,
        pdfium.PDFDEST_VIEW_FITR: 3,
    }.get(mode)
    return (place[index] or None) if index is not None and index < len(place) else None
