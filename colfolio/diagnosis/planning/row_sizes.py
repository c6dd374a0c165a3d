"""How large the rows of a batch are: measured on the batches that a run draws first, or assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from statistics import mean, pstdev

from colfolio.batch import TextBatch
from colfolio.data.collate import Collator
from colfolio.data.contrastive import BatchSettings
from colfolio.data.conversation_batches import ConversationSource, collated
from colfolio.data.conversations import ConversationDataset
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.picks import Picker
from colfolio.data.sampler import SamplerPosition, draws
from colfolio.errors import DocumentError
from colfolio.models.generator import Generator
from colfolio.training import TrainSettings

_MOST_MEASURED = 200
_BATCHES = 16
_MOST_READ = 48  # conversations, whose videos are decoded
_ASSUMED_QUERY, _ASSUMED_ANSWER = 32, 64  # tokens
_DEVIATIONS = 3


@dataclass(frozen=True, slots=True)
class RowSize:
    """Tokens and patches of a row.

    Args:
        steps: images, and steps of a clip, over which its patches are spread.
        answers: of the tokens, those that are to be predicted.
    """

    tokens: int
    patches: int = 0
    steps: int = 1
    answers: int = 0


@dataclass(frozen=True, slots=True)
class BatchSize:
    """A batch of all ranks.

    Args:
        queries, documents: rows.
        query, document: the mean row.
        heavy_query, heavy_document: rows of which a heavy batch is made.
        largest: tokens of the longest row.
        corpus: documents that an epoch visits.
        epoch: queries of an epoch; None where the dataset is not there.
        origin: of these numbers, for people.
    """

    queries: int
    documents: int
    query: RowSize
    document: RowSize
    heavy_query: RowSize
    heavy_document: RowSize
    largest: int
    corpus: int | None
    epoch: float | None
    origin: str

    @property
    def rows(self) -> int:
        """Those of which an epoch is counted."""
        return self.queries


@dataclass(frozen=True, slots=True)
class TextSize:
    """A batch of conversations of all ranks.

    Args:
        rows: conversations.
        row: the mean row.
        heavy: the row of which a heavy batch is made.
        largest: tokens of the longest row.
        corpus: conversations of the split; None where it is not there.
        origin: of these numbers, for people.
    """

    rows: int
    row: RowSize
    heavy: RowSize
    largest: int
    corpus: int | None
    origin: str

    @property
    def epoch(self) -> float | None:
        """Conversations of an epoch, whose incomplete last batch is left out."""
        return self.corpus and float(max(1, self.corpus // self.rows) * self.rows)


def measured_sizes(
    dataset: RetrievalDataset, collator: Collator, settings: TrainSettings
) -> BatchSize:
    """Sizes of the first batches of a run; images are not decoded where their header tells.

    Raises:
        DatasetError: the settings do not fit the dataset.
    """
    batch = settings.batch
    picks = Picker(dataset, batch, settings.seed).picks(SamplerPosition())
    drawn = list(islice(picks, _BATCHES))
    documents = max(len(each.documents) for each in drawn)
    texts = [text for each in drawn for text in each.texts][:_MOST_MEASURED]
    rows = list(dict.fromkeys(row for each in drawn for row in each.documents))
    visual = _visual_tokens(dataset, collator, rows[:_MOST_MEASURED])
    lengths = collator.query_lengths(texts)
    weights = [batch.kind_weights.get(query.kind, 1.0) for query in dataset.queries]
    return BatchSize(
        batch.rows,
        documents,
        RowSize(math.ceil(mean(lengths))),
        _document(collator, math.ceil(mean(visual))),
        RowSize(_heavy(lengths, batch.rows)),
        _document(collator, _heavy(visual, documents)),
        max(*lengths, _document(collator, max(visual)).tokens),
        len(dataset.corpus),
        sum(weights),
        f"{len(visual)} of {len(dataset.corpus):,} documents measured",
    )


def assumed_sizes(collator: Collator, batch: BatchSettings) -> BatchSize:
    """Documents as large as the pixel budget allows, and queries of usual length."""
    budget = collator.budget
    query = RowSize(collator.query_lengths([""])[0] + _ASSUMED_QUERY)
    document = _document(collator, max(1, budget.max_pixels // budget.factor**2))
    documents = batch.rows * (1 + batch.hard_negatives)
    return BatchSize(
        batch.rows,
        documents,
        query,
        document,
        query,
        document,
        max(query.tokens, document.tokens),
        None,
        None,
        f"assumed: {_ASSUMED_QUERY} tokens a query, the most pixels and hard negatives",
    )


def measured_text(
    dataset: ConversationDataset, generator: Generator, settings: TrainSettings
) -> TextSize:
    """Sizes of the first conversations of a run, which are read as training reads them.

    Raises:
        DatasetError: a batch has more rows than the split, or an image or video cannot be read.
    """
    rows, chat, rate = settings.batch.rows, generator.chat, generator.contract.frame_rate
    ConversationSource(dataset, chat, rate, rows, settings.seed)  # refuses what training would
    drawn = draws([1.0] * len(dataset), rows, settings.seed, SamplerPosition())
    first = [row for draw in islice(drawn, _BATCHES) for row in draw.queries]
    measured = list(dict.fromkeys(first))[:_MOST_READ]
    sizes = [_text_row(collated(dataset, [row], chat, rate)) for row in measured]
    columns = list(zip(*map(astuple, sizes), strict=True))
    return TextSize(
        rows,
        RowSize(*(math.ceil(mean(column)) for column in columns)),
        RowSize(*(_heavy(column, rows) for column in columns)),
        max(each.tokens for each in sizes),
        len(dataset),
        f"{len(sizes)} of {len(dataset):,} conversations measured",
    )


def assumed_text(generator: Generator, batch: BatchSettings) -> TextSize:
    """Conversations about one image as large as the pixel budget allows."""
    chat, budget = generator.chat, generator.collator.budget
    asked = generator.collator.prompter.query_ids([""])[0]
    visual = max(1, budget.max_pixels // budget.factor**2)
    (seen,) = generator.collator.prompter.document_ids([visual])
    answers = _ASSUMED_ANSWER + chat.num_answer_tokens([""])[0]
    tokens = len(seen) + len(asked) + _ASSUMED_QUERY + answers
    row = RowSize(tokens, visual * budget.merge**2, 1, answers)
    origin = (
        f"assumed: {_ASSUMED_QUERY} tokens a question, {_ASSUMED_ANSWER} an answer, an image of "
        "the most pixels"
    )
    return TextSize(batch.rows, row, row, tokens, None, origin)


def _text_row(batch: TextBatch) -> RowSize:
    """The one row of a batch."""
    inputs = batch.inputs
    steps = int(inputs.grid_thw[:, 0].sum())
    return RowSize(len(inputs.token_ids), len(inputs.patches), steps, batch.num_labels)


def _visual_tokens(dataset: RetrievalDataset, collator: Collator, rows: Sequence[int]) -> list[int]:
    """Of each document that can be read."""
    sizes = []
    for row in rows:
        try:
            height, width = collator.document_size(*dataset.corpus.image_size(row))
        except DocumentError:
            continue  # training leaves it out, or refuses if there are many
        sizes.append(height * width)
    return sizes or [1]


def _document(collator: Collator, visual: int) -> RowSize:
    (row,) = collator.prompter.document_ids([visual])
    return RowSize(len(row), visual * collator.budget.merge**2)


def _heavy(sizes: Sequence[int], count: int) -> int:
    """A size of which a batch of `count` rows seldom has more on average."""
    return math.ceil(min(max(sizes), mean(sizes) + _DEVIATIONS * pstdev(sizes) / count**0.5))
