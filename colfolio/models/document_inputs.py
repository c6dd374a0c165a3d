"""What `encode_documents` takes: measured by headers, then opened a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from colfolio.data.collate import Collator
from colfolio.data.documents import Document, open_document
from colfolio.data.pages.images import load_image, num_images
from colfolio.data.video import Clip, load_clip
from colfolio.errors import DocumentError

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})

# as datasets and indexes draw a page, so that a page has the same vectors everywhere
_PAGE_DPI = 144.0
_MOST_FRAMES = 768
_ACCEPTED = (
    "an image (uint8 array [height, width, 3], PIL image or path), a Page of a PDF, "
    "the path of a video, or a Clip"
)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a PDF, or an image of a TIFF, as a document; drawn when its turn comes.

    Args:
        number: counted from 0.
    """

    path: Path | str
    number: int


# "_": images of one call may differ in size
DocumentLike = UInt8[np.ndarray, "_H _W 3"] | Image.Image | Path | str | Page | Clip


def pdf_pages(path: Path | str) -> list[Page]:
    """All pages of a PDF as documents; none is drawn yet.

    Raises:
        DocumentError: the file is missing, empty, damaged, encrypted, without pages, or no PDF.
    """
    if not _is_pdf(Path(path)):
        raise DocumentError(path, "is no PDF; the path of an image or video is a document itself")
    with open_document(Path(path)) as document:
        return [Page(path, number) for number in range(document.num_pages)]


def listed_documents(documents: Iterable[object]) -> list[object]:
    """The documents as a list, files as `Path`.

    Raises:
        TypeError: it is one document in place of several.
    """
    one = isinstance(documents, str | Path | Page | Clip | Image.Image) or (
        isinstance(documents, np.ndarray) and documents.ndim < 4
    )
    if one or not isinstance(documents, Iterable):
        received = repr(documents) if isinstance(documents, str | Path | Page) else type(documents)
        raise TypeError(
            f"encode_documents takes a list of documents, received one: {received}; "
            "put it in a list"
        )
    return [Path(each) if isinstance(each, str) else each for each in documents]


class DocumentReader:
    """Sizes and pixels of documents; at most one PDF is open at a time.

    Args:
        documents: as `listed_documents` gives them; each is checked here.
        collator: whose pixel budget decides how many tokens a document takes.
        frame_rate: of videos, in frames a second.
    """

    def __init__(self, documents: Sequence[object], collator: Collator, frame_rate: float) -> None:
        self._documents = documents
        self._collator = collator
        self._frame_rate = frame_rate
        self._open: Document | None = None

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def page_tokens(self) -> int:
        """Visual tokens of the largest image that the pixel budget allows."""
        budget = self._collator.budget
        return max(1, budget.max_pixels // budget.factor**2)

    def num_tokens(self) -> list[int]:
        """Visual tokens of each document, from headers alone; of a video's file, the most.

        Raises:
            DocumentError: what its header shows to be no document; the message names the row.
            TypeError: an object of a type that is no document.
        """
        return [self._num_tokens(row, each) for row, each in enumerate(self._documents)]

    def read(self, rows: Sequence[int]) -> list[UInt8[np.ndarray, "_H _W 3"] | Clip]:
        """Pixels of images and pages, frames of clips, for some of the rows.

        Raises:
            DocumentError: one cannot be read; the message names the row.
        """
        return [self._read(row, self._documents[row]) for row in rows]

    def _num_tokens(self, row: int, document: object) -> int:
        with _errors_of(row, document):
            if isinstance(document, np.ndarray | Clip):
                _check_pixels(document)
                return self._collator.num_visual_tokens(document)
            if isinstance(document, Path):
                _check_file(document)
                if _is_video(document):
                    depth = self._collator.budget.temporal_patch
                    return self.page_tokens * -(-_MOST_FRAMES // depth)
            rows, columns = self._collator.document_size(*self._size(row, document))
            return rows * columns

    def _size(self, row: int, document: object) -> tuple[int, int]:
        """Height and width in pixels, or about them: before EXIF turns an image."""
        if isinstance(document, Page):
            width, height = self._opened(document).page_size(document.number)
            return max(1, round(height * _PAGE_DPI / 72)), max(1, round(width * _PAGE_DPI / 72))
        if isinstance(document, Image.Image):
            return document.height, document.width
        if isinstance(document, Path):
            return _size_of_file(document)
        raise TypeError(f"document {row} is a {type(document).__name__}; a document is {_ACCEPTED}")

    def _read(self, row: int, document: object) -> np.ndarray | Clip:
        with _errors_of(row, document):
            if isinstance(document, np.ndarray | Clip):
                return document
            if isinstance(document, Page):
                return self._opened(document).render(document.number, dpi=_PAGE_DPI)
            if isinstance(document, Image.Image):
                return load_image(document)
            assert isinstance(document, Path)  # all else `num_tokens` refused
            if _is_video(document):
                most_pixels = self._collator.budget.max_pixels
                return load_clip(document, self._frame_rate, _MOST_FRAMES, most_pixels)
            return load_image(document)

    def _opened(self, page: Page) -> Document:
        """The page's document; that of the page before is kept open, as it often is the same."""
        path = Path(page.path)
        if self._open is None or self._open.path != path:
            self._close()
            self._open = open_document(path)
        if not 0 <= page.number < self._open.num_pages:
            last = self._open.num_pages - 1
            raise DocumentError(path, f"has pages 0 to {last}, no page {page.number}")
        return self._open

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


@contextmanager
def _errors_of(row: int, document: object) -> Iterator[None]:
    """Add to an error which document of the call it concerns."""
    try:
        yield
    except DocumentError as error:
        file = document.path if isinstance(document, Page) else document
        where = f"document {row}"
        if isinstance(file, str | Path) and Path(file) != error.path:
            where += f", {file}"
        raise DocumentError(error.path, f"{error.reason} ({where})") from None


def _check_pixels(document: np.ndarray | Clip) -> None:
    if isinstance(document, np.ndarray):
        if document.dtype != np.uint8 or document.ndim != 3 or document.shape[2] != 3:
            reason = "an image is uint8 [height, width, 3] in RGB"
            raise DocumentError("array", f"{reason}, received {_shape_of(document)}")
        return
    frames = document.frames
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        reason = "its frames are uint8 [frames, height, width, 3] in RGB, at least one"
        raise DocumentError("clip", f"{reason}, received {_shape_of(frames)}")
    if not 0 < document.seconds_per_frame < math.inf:
        reason = "its seconds per frame are above 0 and finite"
        raise DocumentError("clip", f"{reason}, received {document.seconds_per_frame}")


def _shape_of(pixels: np.ndarray) -> str:
    return f"{pixels.dtype} {list(pixels.shape)}"


def _check_file(path: Path) -> None:
    if not path.is_file():
        reason = "is a folder; name its files" if path.is_dir() else "does not exist"
        raise DocumentError(path, reason)
    if _is_pdf(path):
        raise DocumentError(
            path,
            "is a PDF, and a document is one page of it: give Page(path, number), or all of its "
            "pages by pdf_pages(path)",
        )


def _size_of_file(path: Path) -> tuple[int, int]:
    """Height and width as the header of an image says them."""
    try:
        with Image.open(path) as image:
            size = image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return load_image(path).shape[:2]  # which says what is wrong with it
    count = num_images(path)
    if count > 1:
        raise DocumentError(path, f"holds {count} images: give Page(path, number) for one of them")
    return size


def _is_pdf(path: Path) -> bool:
    return path.suffix.lower() == ".pdf"


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES
