"""What a run's data is, measured before its first step on rows that it draws; bounded work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from colfolio.data.collate import Collator
from colfolio.data.dataset import Corpus, RetrievalDataset
from colfolio.data.picks import BatchSettings, Picker, Picks
from colfolio.diagnosis.evidence import DataFacts
from colfolio.diagnosis.signals.drawn_rows import first_epochs, meeting_again, with_neighbours
from colfolio.diagnosis.signals.probe_batch import ProbeBatch
from colfolio.diagnosis.signals.read_images import ReadImages, evenly

_MOST_DRAWN, _MOST_IMAGES = 128, 256  # of the training split: from its first batches, in all
_MOST_HELD_OUT = 64  # of the validation split
_MOST_ASKED = 4  # of the answers of a text, on either side
_MOST_PIXELS = 200_000_000  # of each: a hundred pages of 144 dots an inch
SAMPLED = (
    f"images: of the documents of the first batches up to {_MOST_DRAWN}, then evenly spaced ones "
    f"up to {_MOST_IMAGES} in all, and {_MOST_HELD_OUT} of the validation split, no more than "
    f"{_MOST_PIXELS / 1e6:g} million pixels of each; queries: all texts, their tokens in the first "
    "batches; batches: of two epochs up to 16,384 queries each"
)


def measure_data(
    dataset: RetrievalDataset,
    collator: Collator,
    settings: BatchSettings,
    picker: Picker,
    probe: ProbeBatch | None = None,
    validation: RetrievalDataset | None = None,
) -> DataFacts:
    """The facts of a training split; what was looked at is told by `SAMPLED`.

    Args:
        picker: draws the run's batches.
        probe: whose rows are counted as they enter the model.
    """
    epoch, following = first_epochs(picker)
    images = ReadImages(dataset.corpus, _MOST_IMAGES, _MOST_PIXELS)
    drawn = [row for picks in epoch for row in picks.documents][:_MOST_DRAWN]
    images.read(drawn)
    held_out = _held_out_images(validation)
    if validation is not None and held_out is not None:
        images.read(_same_places(dataset.corpus, validation.corpus, list(held_out.seen)))
    images.read(evenly(len(dataset.corpus), _MOST_IMAGES))
    seen = images.seen
    tokens = [_document_tokens(collator, each.size) for each in seen.values()]
    batches, later = ([picks.queries for picks in each] for each in (epoch, following))
    texts = [dataset.queries[row].text for batch in batches for row in batch][:_MOST_DRAWN]
    by_text = _rows_by_text(dataset, picker)
    asked = 0.0 if validation is None else leaked_queries(dataset.corpus, by_text, validation)
    return DataFacts(
        queries=len(dataset.queries),
        documents=len(dataset.corpus),
        median_document_tokens=_median(tokens),
        median_query_tokens=_median(collator.query_lengths(texts)),
        truncated=None if probe is None else truncated_share(probe, collator),
        blank=sum(each.is_blank for each in seen.values()) / max(1, len(seen)),
        copies=_copies(dataset, settings, picker, epoch, images, by_text),
        leaked=max(_leaked_images(images, held_out), asked),
        validation_documents=None if validation is None else len(validation.corpus),
        epoch_overlap=meeting_again(batches, later),
        neighbours=with_neighbours(batches),
    )


def truncated_share(probe: ProbeBatch, collator: Collator) -> float:
    """Share of the documents whose visual tokens are fewer than their grids have."""
    documents, prompter = probe.documents, collator.prompter
    visual = documents.token_ids == prompter.image_token_id
    if prompter.video_token_id is not None:
        visual |= documents.token_ids == prompter.video_token_id
    wanted = documents.grid_thw.prod(dim=1) // collator.budget.merge**2
    of_rows = zip(
        visual.split(documents.lengths.tolist()),
        wanted.split(documents.grid_offsets.diff().tolist()),
        strict=True,
    )
    short = [int(found.sum()) < int(grids.sum()) for found, grids in of_rows]
    return sum(short) / max(1, len(short))


def leaked_queries(
    corpus: Corpus, by_text: Mapping[str, Sequence[int]], validation: RetrievalDataset
) -> float:
    """Share of the validation queries that training asks of an image that answers them there too.

    Those known to be asked are none, nor is a text that other pages have as well, as "contents".
    Of many that training asks some are looked at, evenly spaced.

    Args:
        corpus: of the training split.
        by_text: its rows that answer a text, by `spelt_alike`.
    """
    asked = [(spelt_alike(query.text), query) for query in validation.queries]
    known = [(text, query) for text, query in asked if query.seen is not True and text in by_text]
    row_of = {name: row for row, name in enumerate(validation.corpus.ids)}
    chosen = [
        (text, [row_of[name] for name in validation.positives(query.id)[:_MOST_ASKED]])
        for text, query in (known[place] for place in evenly(len(known), _MOST_HELD_OUT))
    ]
    every = [row for _, rows in chosen for row in rows]
    alike = set(_same_places(corpus, validation.corpus, every))
    trained, held_out = (
        ReadImages(each, _MOST_ASKED * _MOST_HELD_OUT, _MOST_PIXELS)
        for each in (corpus, validation.corpus)
    )
    found = []
    for text, rows in chosen:
        answers = sorted(by_text[text], key=lambda row: row not in alike)[:_MOST_ASKED]
        held_out.read(rows)
        trained.read(answers)
        sides = held_out.digests_of(rows), trained.digests_of(answers)
        found += [not sides[0].isdisjoint(sides[1])] if all(sides) else []
    return sum(found) / max(1, len(found)) * len(known) / max(1, len(asked))


def copied_share(
    positives: Bool[Tensor, "Q D"],
    ignored: Bool[Tensor, "Q D"],
    alike: Bool[Tensor, "D D"],
    answering: Bool[Tensor, "Q D"],
) -> list[float]:
    """Of each query that takes part, the share of its candidates that are its answer again.

    Args:
        alike: which documents show the same.
        answering: which documents answer a query of the same text.
    """
    negatives = ~(positives | ignored)
    looks = (positives.float() @ alike.float()) > 0
    copies = (negatives & (looks | answering)).sum(dim=1)
    candidates = negatives.sum(dim=1) + 1
    return (copies / candidates)[positives.any(dim=1)].tolist()


def _copies(
    dataset: RetrievalDataset,
    settings: BatchSettings,
    picker: Picker,
    epoch: Sequence[Picks],
    images: ReadImages,
    by_text: Mapping[str, Sequence[int]],
) -> float:
    """Mean over the queries of the first batches, as far as their images were read."""
    shares: list[float] = []
    left = _MOST_DRAWN
    for picks in epoch:
        if left <= 0:
            break
        rows = np.array([row for row in picks.documents[:left] if row in images.seen], dtype=int)
        left -= len(picks.documents)
        if not len(rows):
            continue
        digests = np.array([images.seen[row].digest for row in rows.tolist()], dtype="S32")
        alike = digests[:, None] == digests[None]
        masked = None if settings.ignore_copies == "none" else alike
        positives, ignored = picker.relations.masks(picks.queries, rows, masked)
        texts = [spelt_alike(dataset.queries[query].text) for query in picks.queries]
        answering = np.stack([np.isin(rows, by_text[text]) for text in texts])
        shares += copied_share(
            positives, ignored, torch.from_numpy(alike), torch.from_numpy(answering)
        )
    return sum(shares) / max(1, len(shares))


def _rows_by_text(dataset: RetrievalDataset, picker: Picker) -> dict[str, list[int]]:
    """What answers a text, however it is spaced and whatever its case."""
    rows: dict[str, list[int]] = {}
    for query, answers in zip(dataset.queries, picker.relations.positives, strict=True):
        rows.setdefault(spelt_alike(query.text), []).extend(answers.tolist())
    return rows


def _held_out_images(validation: RetrievalDataset | None) -> ReadImages | None:
    if validation is None:
        return None
    images = ReadImages(validation.corpus, _MOST_HELD_OUT, _MOST_PIXELS)
    images.read(evenly(len(validation.corpus), _MOST_HELD_OUT))
    return images


def _leaked_images(images: ReadImages, held_out: ReadImages | None) -> float:
    """Share of the validation images that were read and are among those of training."""
    if held_out is None:
        return 0.0
    known = images.digests_of(images.seen)
    found = [each.digest in known for each in held_out.seen.values()]
    return sum(found) / max(1, len(found))


def _same_places(corpus: Corpus, held_out: Corpus, rows: list[int]) -> list[int]:
    """Rows of a corpus with the id, or the document, page and box, of rows of another."""
    ids = {held_out.ids[row] for row in rows}
    places = {(held_out.documents[row], held_out.pages[row], held_out.boxes[row]) for row in rows}
    own = zip(corpus.documents, corpus.pages, corpus.boxes, strict=True)
    return [
        row
        for row, (id_, place) in enumerate(zip(corpus.ids, own, strict=True))
        if id_ in ids or place in places
    ]


def _median(numbers: Sequence[int]) -> float | None:
    return float(median(numbers)) if numbers else None


def _document_tokens(collator: Collator, size: tuple[int, int]) -> int:
    rows, columns = collator.document_size(*size)
    return len(collator.prompter.document_ids([rows * columns])[0])


def spelt_alike(text: str) -> str:
    """A text without its case, and with single spaces."""
    return " ".join(text.casefold().split())
