"""What a diagnosis goes by: numbers of a run, from its log or from measuring, and nothing else.

All of it is plain numbers and words, so that a run folder holds it and a cause can be named without
the model. None means: not known, as in a log that another trainer wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep

LossKind = Literal["info_nce", "pairwise", "sigmoid", "distillation", "generation"]


@dataclass(frozen=True, slots=True)
class Settled:
    """What was asked for, as far as it bears on whether a model learns.

    Args:
        loss: which one is minimised.
        temperature: that scores are divided by.
        lr: the highest learning rate of the schedule.
        steps: of the whole run.
        warmup_steps: until the rate is reached.
        rows: queries of a batch, of all ranks together.
        accumulation: batches of an optimiser step, none of which sees another's documents.
        ranks: that share each batch.
        precision: of the arithmetic, `fp32`, `bf16` or `fp16`.
        ignored: which documents are no candidates though they are not labelled as answers, in the
            recipe's words: `none`, `page`, …
    """

    loss: LossKind
    temperature: float = 1.0
    lr: float | None = None
    steps: int | None = None
    warmup_steps: int | None = None
    rows: int | None = None
    accumulation: int = 1
    ranks: int = 1
    precision: str | None = None
    ignored: str | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the data is, measured on rows that the run draws.

    Args:
        queries, documents: of the training split.
        median_document_tokens, median_query_tokens: of a row as it enters the model.
        truncated: share of the documents whose image tokens are fewer than their grid has.
        blank: share of the documents whose image is one colour.
        copies: share of a query's candidates that are its answer's equal, pixel by pixel or by
            another document with the same query text, and yet count as negatives.
        leaked: share of the validation images, or of its queries each with its answer, whichever is
            more, that training has; says nothing without `validation_documents`.
        validation_documents: what a validation query is ranked among.
        epoch_overlap: share of the pairs of rows of a batch that meet again in the next epoch.
            Drawn at random it is about (rows - 1) / (queries - 1).
        neighbours: share of the rows of a batch whose next row of the data set is in it too; drawn
            at random it is about (rows - 1) / (queries - 1).
    """

    queries: int
    documents: int
    median_document_tokens: float | None = None
    truncated: float | None = None
    blank: float = 0.0
    copies: float = 0.0
    leaked: float = 0.0
    validation_documents: int | None = None
    epoch_overlap: float | None = None
    neighbours: float | None = None
    median_query_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the model is before the first step.

    Args:
        positions: verdict of the guard on the model's own forward, `right` or a fault's name.
        positions_told: that verdict in a sentence.
        template_faults: how the strings or special tokens that queries and images really get differ
            from those that the contract promises, in sentences.
        row_difference: by how much a number of a vector differs at most between a row alone and the
            same row beside others.
        fresh: names of tensors that another load of the same files has otherwise.
        adapter_effect: relative difference that loaded adapters make to the vectors; None without.
        adapter_is_of_base: whether the adapters name the base that they were put on; None without.
        trains, frozen: parameters of each part; a part may stand in both.
        is_trained: the weights were trained to retrieve, as the contract says.
        drawn: parts whose weights are as they were drawn at random, and that no adapter changes.
    """

    positions: str | None = None
    positions_told: str = ""
    template_faults: tuple[str, ...] | None = None
    row_difference: float | None = None
    fresh: tuple[str, ...] | None = None
    adapter_effect: float | None = None
    adapter_is_of_base: bool | None = None
    trains: Mapping[str, int] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)
    is_trained: bool | None = None
    drawn: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ProbeSignals:
    """What the model makes of one fixed batch of the training split, after so many steps.

    The probe runs without dropout and draws nothing; C documents are scored for each query.

    Args:
        step: after which it was measured; 0 is before the first.
        documents: C.
        loss, chance, floor: of the run's own loss on the probe.
        margin: the positive's score less the hardest negative's, mean over queries.
        mean_margin: the positive's score less the mean negative's, mean over queries.
        rank: mean place of the positive, 1 to C; ties count against it. (C + 1) / 2 is chance.
        accuracy: share of queries whose positive stands strictly first.
        spread: standard deviation of a query's scores, mean over queries.
        query_cosine, document_cosine: mean cosine between vectors of different rows.
        query_rank, document_rank: effective rank of the vectors, exp of the entropy of their
            normalised singular values (Roy and Vetterli 2007); 1 to dim.
        dim: of a vector.
        same_winner: share of the query tokens that have the same document token, by place, as
            winner in nearly every document.
        query_distance, document_distance: mean 1 - cosine between vectors now and at step 0.
        shift: the offset s != 0, in the order of the data set, of the document that queries would
            rather have: the one whose `shift_accuracy` is the highest.
        shift_accuracy: share of queries that rank the document at that offset first.
        confident: share of queries whose first document is not labelled and leads by more than half
            of the spread.
        distinct_scores: share of the scores that no other score equals.
        score_error: largest difference of a score from the same product in float64, over `spread`.
        histogram: counts of scores in equal bins, of positives and of negatives.
        edges: lower and upper end of the histogram.
        query_spread: standard deviation of a document's scores, mean over documents.
    """

    step: int
    documents: int
    loss: float
    chance: float
    floor: float
    margin: float
    mean_margin: float
    rank: float
    accuracy: float
    spread: float
    query_cosine: float
    document_cosine: float
    query_rank: float
    document_rank: float
    dim: int
    same_winner: float
    query_distance: float
    document_distance: float
    shift: int
    shift_accuracy: float
    confident: float
    distinct_scores: float
    score_error: float
    histogram: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    edges: tuple[float, float] = (0.0, 0.0)
    query_spread: float | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check before the first step came to.

    Args:
        name: what was asked.
        told: the number, and what to do about a failure.
        cause: that a failure points to; empty where none is known.
    """

    name: str
    passed: bool
    told: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """Numbers that were no numbers any more, and where they came from.

    Args:
        step: the last that was done.
        what: `loss` or `gradient`.
        module: the first module whose output was not finite, or the parameter of a gradient that
            was not; empty if it could not be found.
    """

    step: int
    what: str
    module: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of a run, whole or going on.

    Args:
        settled: what was asked for.
        steps, evaluations, probes: rising.
        fault: what ended the run, if it was that.
        skipped: share of the steps whose gradient overflowed in half precision.
        candidates: mean documents that a query is compared with.
        masked: mean documents that are masked for a query.
        checks: before the first step.
    """

    settled: Settled
    steps: tuple[LoggedStep, ...] = ()
    evaluations: tuple[LoggedEvaluation, ...] = ()
    probes: tuple[ProbeSignals, ...] = ()
    data: DataFacts | None = None
    model: ModelFacts | None = None
    fault: Fault | None = None
    skipped: float = 0.0
    candidates: float | None = None
    masked: float | None = None
    checks: tuple[Checked, ...] = ()
