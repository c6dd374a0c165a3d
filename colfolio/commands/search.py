"""`colfolio search`: a query in, the pages that answer it out, each with a picture of the spot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.markup import escape
from rich.table import Table

from colfolio.commands.console import console
from colfolio.errors import ColfolioError
from colfolio.search import Hit, Searcher, hit_image, load_encoder


def search_command(
    index: Path,
    query: str,
    top_k: int = 10,
    *,
    images_to: Path | None = None,
    model: str | None = None,
    page_score: str = "best",
) -> list[Hit]:
    """Print the best pages and write a picture of each, `hit-1.png` for the first.

    Args:
        images_to: the folder for the pictures; those of an earlier search are replaced. None means
            `hits` in the current folder.
        model: where the model that made the index is now; None takes where it was then.
        page_score: `best` or `union`, see `Searcher`.

    Raises:
        ColfolioError: an empty query, `top_k` below 1, or an index that cannot be searched.
    """
    if not query.strip():
        raise ColfolioError("the query is empty: name what to look for")
    if top_k < 1:
        raise ColfolioError(f"top_k must be at least 1, not {top_k}")
    searcher = Searcher(index, load_encoder(index, model), page_score)
    hits = searcher.search(query, top_k)
    folder = images_to or Path("hits")
    _write_images(searcher, hits, query, folder)
    _print_hits(hits, len(searcher.pages), query, folder)
    return hits


def _write_images(searcher: Searcher, hits: Sequence[Hit], query: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if re.fullmatch(r"hit-[0-9]+\.png", old.name):
                old.unlink()
        for rank, hit in enumerate(hits, 1):
            Image.fromarray(hit_image(searcher, hit, query)).save(folder / f"hit-{rank}.png")
    except OSError as error:
        raise ColfolioError(f"{folder}: pictures cannot be written: {error}") from None


def _print_hits(hits: Sequence[Hit], num_pages: int, query: str, folder: Path) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("rank", "score", "page"):
        table.add_column(name, justify="right")
    table.add_column("file", overflow="fold")
    table.add_column("left, top, right, bottom %")
    for rank, hit in enumerate(hits, 1):
        spot = ", ".join(f"{100 * edge:.0f}" for edge in hit.box)
        page = str(hit.page + 1) if hit.page >= 0 else "-"  # a dataset may not say which page
        table.add_row(str(rank), f"{hit.score:.3f}", page, escape(hit.document), spot)
    console().print(f"{len(hits)} of {num_pages:,} pages for {query!r}", markup=False)
    console().print(table)
    if hits:
        console().print(f"pictures: {folder / 'hit-1.png'} …", markup=False)
