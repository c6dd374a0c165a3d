"""The probe's rows: queries spread over a split in runs of neighbours, with their documents.

Letters: Q queries and D documents of the probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from colfolio.batch import Packed
from colfolio.data.collate import Collator
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.lookalikes import Lookalikes
from colfolio.data.picks import BatchSettings
from colfolio.data.preparing.deduplicate import pixel_digest
from colfolio.data.relations import Relations
from colfolio.data.teacher import TeacherScores
from colfolio.errors import DocumentError

_SEED = 0  # not the run's: runs of several seeds are compared on one probe
_MOST_ROWS, _LEAST_ROWS = 32, 8
_MOST_TOKENS = 8192  # of all documents together
_RUN = 8  # neighbouring queries, so that a document three further on is seen by most of them


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Inputs that are made once, and what is what among them.

    Args:
        queries, documents: on the CPU.
        positives, ignored: as the run's loss sees them.
        answering: which documents answer a query, masked or not, copies of an answer among them.
        order: where each query stands in the data set, among those that the run draws.
        answers: the column of the document that each query brought.
        texts: of the queries.
        teacher: what distillation follows.
    """

    queries: Packed
    documents: Packed
    positives: Bool[Tensor, "Q D"]
    ignored: Bool[Tensor, "Q D"]
    answering: Bool[Tensor, "Q D"]
    order: Int64[Tensor, " Q"]
    answers: Int64[Tensor, " Q"]
    texts: tuple[str, ...]
    teacher: Float[Tensor, "Q D"] | None = None

    @property
    def num_tokens(self) -> int:
        """Of both sides."""
        return len(self.queries.token_ids) + len(self.documents.token_ids)


def draw_probe(
    dataset: RetrievalDataset,
    collator: Collator,
    settings: BatchSettings,
    relations: Relations,
    teacher: TeacherScores | None = None,
) -> ProbeBatch | None:
    """The probe of a split, the same whenever it is drawn; some dozens of images are read.

    Args:
        relations: of the data set, under the same settings.
        teacher: for distillation; then documents come along that the teacher scored.

    Returns:
        None if no query of it could be told from anything, or no image can be read.
    """
    weights = settings.kind_weights
    drawn = [n for n, each in enumerate(dataset.queries) if weights.get(each.kind, 1.0) > 0]
    tokens = _tokens_of_a_document(dataset, collator, [relations.positives[n] for n in drawn[:4]])
    order = spread_runs(len(drawn), num_rows(len(drawn), tokens))
    brought = {place: int(relations.positives[drawn[place]][0]) for place in order}
    images = _images(dataset, [*brought.values(), *_scored(drawn, order, settings, teacher)])
    kept = [place for place in order if brought[place] in images]
    if not kept or len(images) < 2:
        return None
    numbers, rows = [drawn[place] for place in kept], np.array(list(images), dtype=np.int64)
    same, likeness = None, settings.ignore_copies
    if likeness != "none":
        lookalikes = Lookalikes(dataset.corpus, likeness)
        same = lookalikes.pairs(rows, lookalikes.hashes(rows.tolist(), images))
    positives, ignored = relations.masks(numbers, rows, same)
    if not positives.any():
        return None
    columns = {row: column for column, row in enumerate(images)}
    return ProbeBatch(
        collator.queries([dataset.queries[number].text for number in numbers]),
        collator.documents(list(images.values())),
        positives,
        ignored,
        _answering([relations.answers[number] for number in numbers], images),
        torch.tensor(kept),
        torch.tensor([columns[brought[place]] for place in kept]),
        tuple(dataset.queries[number].text for number in numbers),
        None if teacher is None else torch.from_numpy(teacher.between(numbers, rows)),
    )


def num_rows(queries: int, document_tokens: int) -> int:
    """How many of a split's queries the probe has: at most half of them.

    Fewer where documents are long, but not fewer than a run of neighbours.

    >>> num_rows(1000, 20), num_rows(1000, 500), num_rows(24, 20), num_rows(1000, 9000)
    (32, 16, 12, 8)
    """
    fitting = max(_LEAST_ROWS, _MOST_TOKENS // max(document_tokens, 1))
    return max(1, min(_MOST_ROWS, queries // 2, fitting))


def spread_runs(queries: int, rows: int) -> list[int]:
    """So many places among the queries, rising, in runs of neighbours, one in each equal stretch.

    >>> spread_runs(9, 4)
    [5, 6, 7, 8]
    """
    generator = np.random.default_rng(_SEED)
    lengths = [len(part) for part in np.array_split(np.arange(rows), max(1, rows // _RUN))]
    edges = np.linspace(0, queries, len(lengths) + 1).astype(int)
    places: list[int] = []
    for length, first, end in zip(lengths, edges[:-1], edges[1:], strict=True):
        start = int(generator.integers(first, max(first, end - length) + 1))
        places += range(start, start + length)
    return places


def _tokens_of_a_document(
    dataset: RetrievalDataset, collator: Collator, answers: list[np.ndarray]
) -> int:
    """Visual tokens of the largest of some documents."""
    most = 1
    for rows in answers:
        try:
            height, width = collator.document_size(*dataset.corpus.image_size(int(rows[0])))
        except DocumentError:
            continue
        most = max(most, height * width)
    return most


def _scored(
    drawn: list[int], order: list[int], settings: BatchSettings, teacher: TeacherScores | None
) -> list[int]:
    """Rows that the teacher scored, as many a query as a batch would bring, at least two."""
    if teacher is None:
        return []
    wanted = max(2, settings.hard_negatives)
    return [int(row) for place in order for row in teacher.rows[drawn[place]][:wanted]]


def _images(dataset: RetrievalDataset, rows: list[int]) -> dict[int, UInt8[np.ndarray, "_H _W 3"]]:
    """The images that can be read, each once."""
    images = {}
    for row in dict.fromkeys(rows):
        try:
            images[row] = dataset.corpus.image(row)
        except DocumentError:  # training says so, and stops if they are many
            continue
    return images


def _answering(
    answers: list[np.ndarray], images: dict[int, UInt8[np.ndarray, "_H _W 3"]]
) -> Bool[Tensor, "Q D"]:
    rows = np.array(list(images), dtype=np.int64)
    digests = np.array([pixel_digest(image) for image in images.values()], dtype="S32")
    found = []
    for wanted in answers:
        own = np.isin(rows, wanted)
        found.append(own | np.isin(digests, digests[own]))
    return torch.from_numpy(np.stack(found))
