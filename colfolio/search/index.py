"""Building an index: pages cut to views, views encoded in batches of one size, vectors stored."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field

from colfolio.batch import MultiVectors
from colfolio.config import Settings
from colfolio.data.dataset import load_dataset, splits_of
from colfolio.data.pages.images import IMAGE_SUFFIXES
from colfolio.data.pages.ink import BoxF, ink_mask, tight_box, to_grey
from colfolio.data.pages.views import View, page_views
from colfolio.errors import ColfolioError
from colfolio.search.layout import Manifest, PageRecord, VectorType, ViewKind, ViewRecord
from colfolio.search.sources import FolderPages, SourcePage, ahead, corpus_pages
from colfolio.search.writer import StoreWriter, create_store

# Views are gathered up to about this many bytes, sorted by size and encoded: 2,000 text lines, or
# a dozen whole pages, so that batches of one size are full and memory is bounded.
_WINDOW_BYTES = 64 << 20
_PAGES_AHEAD = 8
_PREVIEW_LONG_SIDE = 880
_PREVIEW_QUALITY = 70


@runtime_checkable
class Span(Protocol):
    """Which vectors of a document are its image's: `rows * columns` from `first`, row-major."""

    @property
    def first(self) -> int:
        """Vectors of the row that lie before the image's."""
        ...

    @property
    def rows(self) -> int:
        """Visual tokens from top to bottom."""
        ...

    @property
    def columns(self) -> int:
        """Visual tokens from left to right."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """What the search needs of a model; `Retriever` is one."""

    @property
    def dim(self) -> int:
        """Dimensions of each vector."""
        ...

    def fingerprint(self) -> str:
        """What tells this model from every other."""
        ...

    def encode_queries(self, queries: Sequence[str], batch_size: int = ...) -> MultiVectors:
        """One row a text, on the CPU."""
        ...

    def encode_documents(
        self, documents: Sequence[UInt8[np.ndarray, "_ _ 3"]], batch_size: int = ...
    ) -> MultiVectors:
        """One row an image, on the CPU."""
        ...

    def visual_span(self, image_size: tuple[int, int]) -> Span:
        """Where the tokens of an image of `(height, width)` pixels lie in its row."""
        ...


class IndexSettings(Settings):
    """How pages become rows of an index.

    Args:
        views: whether a page enters as one image, as text-line strips, or as tiles.
        dpi: at which pages of PDFs are rendered.
        dtype: in which vectors are stored; `float32` is exact, `float16` half as large.
        batch_tokens: visual tokens that are encoded in one call, at least one view's.
        max_bad_share: more unreadable documents than this part of all is an error.
        store_pages: keep a small grey image of each page, so that hits can be shown when the
            document is gone.
    """

    views: ViewKind = "page"
    dpi: float = Field(144.0, gt=0)
    dtype: VectorType = "float16"
    batch_tokens: int = Field(2048, gt=0)
    max_bad_share: float = Field(0.01, ge=0, le=1)
    store_pages: bool = True


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is: `done` in 0..1, or None where the number of pages is unknown."""

    done: float | None
    pages: int
    views: int


def build_index(
    encoder: Encoder,
    pages: str | Path | Iterable[SourcePage],
    out: Path,
    settings: IndexSettings,
    *,
    model: str = "",
    split: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Encode all views of all pages and write them as the index at `out`, whole or not at all.

    Args:
        pages: a folder of PDFs and images, one such file, a dataset (a folder, file or hub id that
            `load_dataset` reads), or pages.
        out: the folder of the index; an index that is there is replaced once the new one is whole.
        model: where the encoder came from, so that a search can load it again.
        split: of a dataset; may be left out where it has only one.

    Raises:
        DocumentError: no document, or too many that cannot be read.
        DatasetError: there is nothing of that name, or the dataset's parts do not fit together.
        IndexStoreError: the index cannot be written there.
    """
    source = _open_source(pages, split, settings) if isinstance(pages, str | Path) else pages
    with create_store(out, encoder.dim, settings.dtype) as store:
        cut = (_cut(page, settings) for page in source)
        for window in _windows(ahead(cut, _PAGES_AHEAD)):
            _write_window(encoder, window, store, settings)
            if on_progress:
                done = window[-1].done
                on_progress(Progress(done, store.num_pages, store.num_views))
        if store.num_views == 0:
            raise ColfolioError(f"{pages}: {store.num_pages} pages without a single view to index")
        return store.commit(
            model=model,
            fingerprint=encoder.fingerprint(),
            views=settings.views,
            skipped=source.skipped if isinstance(source, FolderPages) else (),
        )


def _open_source(
    source: str | Path, split: str | None, settings: IndexSettings
) -> Iterable[SourcePage]:
    path = Path(source)
    is_document = path.is_file() and path.suffix.lower() in {".pdf", *IMAGE_SUFFIXES}
    splits = [] if is_document else splits_of(source)
    if not splits:
        if split is not None:
            raise ColfolioError(f"{source}: holds no dataset, so it has no split {split!r}")
        return FolderPages(path, settings.dpi, settings.max_bad_share)
    if split is None and len(splits) > 1:
        raise ColfolioError(f"{source}: holds the splits {', '.join(splits)}; name one of them")
    return corpus_pages(load_dataset(source, split or splits[0]).corpus)


@dataclass(frozen=True, slots=True)
class _CutPage:
    record: PageRecord
    views: list[View]
    done: float | None


def _cut(page: SourcePage, settings: IndexSettings) -> _CutPage:
    stamp = page.source.stat() if page.source else None
    record = PageRecord(
        document=page.document,
        page=page.page,
        size=_size(page.image),
        source=str(page.source) if page.source else "",
        source_bytes=stamp.st_size if stamp else 0,
        source_mtime_ns=stamp.st_mtime_ns if stamp else 0,
        dpi=page.dpi,
        preview=encode_preview(page.image) if settings.store_pages else None,
    )
    return _CutPage(record, page_views(page.image, settings.views), page.done)


def encode_preview(page: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The page in grey, at most 880 pixels long (80 dpi of a letter page), as a JPEG."""
    image = Image.fromarray(page).convert("L")
    image.thumbnail((_PREVIEW_LONG_SIDE, _PREVIEW_LONG_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_PREVIEW_QUALITY)
    return file.getvalue()


def _windows(pages: Iterable[_CutPage]) -> Iterator[list[_CutPage]]:
    """Runs of pages whose views have about `_WINDOW_BYTES` together."""
    window: list[_CutPage] = []
    size = 0
    for page in pages:
        window.append(page)
        size += sum(view.image.nbytes for view in page.views)
        if size >= _WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _write_window(
    encoder: Encoder, window: Sequence[_CutPage], store: StoreWriter, settings: IndexSettings
) -> None:
    region_of = strip_region if settings.views == "strips" else attrgetter("box")
    views = [view for page in window for view in page.views]
    records = [
        ViewRecord(store.num_pages + row, number, view.box, region_of(view), _size(view.image))
        for row, page in enumerate(window)
        for number, view in enumerate(page.views)
    ]
    vectors = encode_views(encoder, [view.image for view in views], settings.batch_tokens)
    store.add([page.record for page in window], records, vectors)


def strip_region(strip: View) -> BoxF:
    """The part of the page that the whole image of a strip covers: its ink's box, and the margin.

    The scale is that of the strip's ink to its box, as the box on a crooked page is taller than the
    line that was scaled.
    """
    ink = tight_box(ink_mask(to_grey(strip.image), paper=255))
    if ink is None:
        return strip.box
    height, width = _size(strip.image)
    left, top, right, bottom = strip.box
    across = (right - left) / (ink[2] - ink[0])  # of the page's width, a pixel of the strip
    down = (bottom - top) / (ink[3] - ink[1])
    left, top = left - ink[0] * across, top - ink[1] * down
    return left, top, left + width * across, top + height * down


def encode_views(
    encoder: Encoder, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], batch_tokens: int
) -> MultiVectors | None:
    """One row an image, in the given order, from batches of one size; None for no images."""
    order = sorted(range(len(images)), key=lambda row: _size(images[row]))
    rows: list = [None] * len(images)
    for size, group in itertools.groupby(order, key=lambda row: _size(images[row])):
        span = encoder.visual_span(size)
        batch_size = max(1, batch_tokens // (span.rows * span.columns))
        same = list(group)
        encoded = encoder.encode_documents([images[row] for row in same], batch_size=batch_size)
        for row, vectors in zip(same, encoded, strict=True):
            rows[row] = vectors
    return MultiVectors.from_list(rows) if rows else None


def _size(image: UInt8[np.ndarray, "height width 3"]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
