"""Why a page answered: the heat of each visual token of a view, laid over the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from colfolio.data.documents import load_image, open_document
from colfolio.data.pages.ink import BoxF
from colfolio.errors import DocumentError, IndexStoreError
from colfolio.search.layout import PageRecord
from colfolio.search.searcher import Hit, Searcher

WHOLE: BoxF = (0.0, 0.0, 1.0, 1.0)
_SHOWN_DPI = 110.0
_HEAT = (255, 140, 0)
_FRAME = (214, 92, 0)
_STRONGEST = 0.7


def heat_map(searcher: Searcher, hit: Hit, query: str) -> Float[np.ndarray, "rows columns"]:
    """How much each visual token of the hit's view answers the query, 0 to 1, as a grid.

    A token's heat is its similarity above the mean of its view, summed over the query's vectors
    that it is above the mean for; so a query vector that likes the whole view says nothing.
    """
    height, width = searcher.views.sizes[hit.view_id].tolist()
    span = searcher.encoder.visual_span((height, width))
    vectors = searcher.view_vectors(hit.view_id)
    visual = vectors[span.first : span.first + span.rows * span.columns]  # [rows * columns, dim]
    assert len(visual) == span.rows * span.columns, (len(vectors), span)
    return visual_heat(searcher.encode(query).vectors, visual).view(span.rows, span.columns).numpy()


def hit_image(searcher: Searcher, hit: Hit, query: str) -> UInt8[np.ndarray, "height width 3"]:
    """The hit's page with the heat laid over it and the answering view framed.

    The page is drawn from its document, or, where that is gone or has changed since, from the small
    image in the index.

    Raises:
        IndexStoreError: neither is there.
    """
    record = searcher.store.page(hit.page_id)
    page = page_image(record)
    heat = heat_map(searcher, hit, query)
    left, top, right, bottom = searcher.views.regions[hit.view_id].tolist()
    return draw_heat(page, heat, (left, top, right, bottom), hit.box)


def page_image(record: PageRecord) -> UInt8[np.ndarray, "height width 3"]:
    """A page of the index as it was indexed, from its document or from the index.

    Raises:
        IndexStoreError: the document is gone or has changed, and the index keeps no pages.
    """
    if _is_unchanged(record):
        try:
            with open_document(Path(record.source)) as document:
                return document.render(record.page, dpi=min(_SHOWN_DPI, record.dpi))
        except DocumentError:
            pass  # it was readable when it was indexed: fall back to what the index keeps
    if record.preview is None:
        raise IndexStoreError(
            f"{record.source or record.document}: is gone or has changed since it was indexed, and "
            "the index keeps no pages; build it again, with store_pages to keep them"
        )
    return load_image(record.preview)


def _is_unchanged(record: PageRecord) -> bool:
    try:
        stamp = Path(record.source).stat()
    except OSError:
        return False
    return (stamp.st_size, stamp.st_mtime_ns) == (record.source_bytes, record.source_mtime_ns)


def visual_heat(
    query: Float[Tensor, "query_tokens dim"], visual: Float[Tensor, "visual_tokens dim"]
) -> Float[Tensor, " visual_tokens"]:
    """How much each visual token answers some of a query's vectors, 0 to 1; see `heat_map`."""
    similarity = query.float() @ visual.T  # [query_tokens, visual_tokens]
    above = (similarity - similarity.mean(dim=1, keepdim=True)).clamp(min=0)
    heat = above.sum(dim=0)
    return heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)


def draw_heat(
    page: UInt8[np.ndarray, "height width 3"],
    heat: Float[np.ndarray, "rows columns"],
    region: BoxF = WHOLE,
    box: BoxF = WHOLE,
) -> UInt8[np.ndarray, "height width 3"]:
    """The heat over its region of the page, within the box only; the box framed."""
    height, width = page.shape[:2]
    image = Image.fromarray(page)
    left, top, right, bottom = _pixels(region, width, height)
    opacity = Image.fromarray((heat * _STRONGEST * 255).astype(np.uint8)).resize(
        (right - left, bottom - top), Image.Resampling.BICUBIC
    )
    mask = Image.new("L", image.size, 0)
    mask.paste(opacity, (left, top))
    frame = _pixels(box, width, height)
    within = Image.new("L", image.size, 0)
    within.paste(mask.crop(frame), frame[:2])
    # multiplied, as a marker pen does: the ink stays black
    marked = ImageChops.multiply(image, Image.new("RGB", image.size, _HEAT))
    image.paste(marked, (0, 0), within)
    if box != WHOLE:
        line = max(1, round(max(width, height) / 640))
        gap = 2 * line
        outer = (frame[0] - gap, frame[1] - gap, frame[2] + gap - 1, frame[3] + gap - 1)
        ImageDraw.Draw(image).rounded_rectangle(outer, 2 * line, outline=_FRAME, width=line)
    return np.array(image)


def _pixels(box: BoxF, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = round(box[0] * width), round(box[1] * height)
    return left, top, max(left + 1, round(box[2] * width)), max(top + 1, round(box[3] * height))
