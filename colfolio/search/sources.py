"""Pages to index: from a folder of documents, from a dataset's corpus, ahead of the encoder."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from colfolio.data.dataset import Corpus
from colfolio.data.documents import Document, find_documents, open_document
from colfolio.errors import DocumentError

Item = TypeVar("Item")
_NAMED = 10


@dataclass(frozen=True, slots=True)
class SourcePage:
    """One page to index.

    Args:
        document: its name in the index; page: counted from 0.
        image: its pixels.
        source: the file that shows it again, if there is one; dpi: the resolution of `image`.
        done: how much of all pages lies behind, once this page is through; None where unknown.
    """

    document: str
    page: int
    image: UInt8[np.ndarray, "height width 3"]
    source: Path | None = None
    dpi: float = 72.0
    done: float | None = None


@dataclass(slots=True)
class FolderPages:
    """The pages of all PDFs and images below a folder, or of one file, rendered one by one.

    Documents and pages that cannot be read are left out and listed in `skipped`, an entry a
    document, with the reason. A document of which some pages can be read is no unreadable one.

    Args:
        dpi: at which pages of PDFs are rendered.
        max_bad_share: more unreadable documents than this part of all is an error.

    Raises:
        DocumentError: there is no document, or too many of them cannot be read; known as soon as
            one too many has failed.
    """

    root: Path
    dpi: float
    max_bad_share: float = 0.01
    skipped: list[str] = field(default_factory=list)
    _unreadable: list[str] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[SourcePage]:
        paths = find_documents(self.root)
        for number, path in enumerate(paths):
            try:
                with open_document(path) as document:
                    yield from self._pages(document, number, len(paths))
            except DocumentError as error:
                self.skipped.append(str(error))
                self._unreadable.append(str(error))
                self._check_unreadable(len(paths))

    def _pages(self, document: Document, number: int, documents: int) -> Iterator[SourcePage]:
        name = self.name(document.path)
        faults = []
        for page in range(document.num_pages):
            try:
                image = document.render(page, dpi=self.dpi)
            except DocumentError as error:
                faults.append(error.reason)
                continue
            done = (number + (page + 1) / document.num_pages) / documents
            yield SourcePage(name, page, image, document.path.absolute(), self.dpi, done)
        if not faults:
            return
        if len(faults) == document.num_pages:
            reason = f"none of its {len(faults)} pages can be read: {faults[0]}"
            raise DocumentError(document.path, reason)
        left_out = f"{len(faults)} of {document.num_pages} pages are left out: {faults[0]}"
        self.skipped.append(f"{document.path}: {left_out}")

    def name(self, path: Path) -> str:
        """What a document is called in the index: its path below the root."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _check_unreadable(self, documents: int) -> None:
        if len(self._unreadable) > self.max_bad_share * documents:
            raise DocumentError(
                self.root,
                f"{len(self._unreadable)} of {documents} documents cannot be read so far, more "
                f"than {100 * self.max_bad_share:g}% of all; repair or remove them, or raise "
                "max_bad_share (--max-bad-share):"
                + "".join(f"\n  {reason}" for reason in self._unreadable[:_NAMED]),
            )


def corpus_pages(corpus: Corpus) -> Iterator[SourcePage]:
    """The pages of a dataset's corpus, in its order."""
    for row in range(len(corpus)):
        done = (row + 1) / len(corpus)
        yield SourcePage(corpus.documents[row], corpus.pages[row], corpus.image(row), done=done)


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, made by another thread that is at most so many items ahead.

    An error of the thread is raised here, in its place. Closing the iterator ends the thread.
    """
    made: queue.Queue[Item | _Ended] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made, stop), daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _Ended):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Ended:
    error: BaseException | None


def _make(items: Iterable[Item], made: queue.Queue[Item | _Ended], stop: threading.Event) -> None:
    error = None
    try:
        for item in items:
            if not _put(made, item, stop):
                return
    except BaseException as failure:
        error = failure
    _put(made, _Ended(error), stop)


def _put(made: queue.Queue[Item | _Ended], item: Item | _Ended, stop: threading.Event) -> bool:
    """Put an item as soon as there is room; False once nobody wants it."""
    while not stop.is_set():
        try:
            made.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
