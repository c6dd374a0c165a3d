"""What a query is compared with: how many candidates it gets, how many not, and why.

Said before the first step, and refused where a recipe asks for what it will not get.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import SamplerPosition
from colfolio.diagnosis.ledgers.counts import BatchCounter, BatchCounts, QueryLengths
from colfolio.errors import RecipeError
from colfolio.training import TrainSettings

_START = SamplerPosition()
_NAMED = 0.05  # documents: what is fewer is not worth a word


@dataclass(frozen=True, slots=True)
class Range:
    """Least, middle and most of some numbers."""

    least: float
    median: float
    most: float


@dataclass(frozen=True, slots=True)
class Ledger:
    """A run's batches, as its first ones were counted.

    Args:
        batches: that were counted; means and ranges are over them.
        ranks: that share each batch.
        rows: queries of a batch, of all ranks together.
        rows_of_rank: the fewest and the most that one rank takes.
        accumulation: batches of an optimiser step, none of which sees another's documents.
        documents: distinct ones in a batch.
        hard_negatives: mean that a query brings.
        with_hard_negatives: share of the queries that bring any.
        twice: mean documents of a batch that were brought again by another query.
        sitting_out: share of the queries with nothing that they could be told from; what follows is
            of the others.
        candidates: that a query is compared with, one answer among them; fewer where copies are
            found.
        wanted: as many as the recipe asks for the median query, if it does.
        short_of_wanted: share of the queries that get fewer.
        left_out: why a document of the batch is no candidate -> mean number for a query; the mask
            takes those of `ledger_counts.MASKED`.
        copies: which copies of an answer are masked too, once images are read.
        loss: what is minimised.
        chance: mean of the least that the loss can be while all scores are equal.
        floor: mean of the least that it can be.
        computed_with: precision, attention and the like, by name.
        validation: what validation loss is over; empty without validation.
        trains: which parameters, and which later; empty if that is not known.
    """

    batches: int
    ranks: int
    rows: int
    rows_of_rank: tuple[int, int]
    accumulation: int
    documents: Range
    hard_negatives: float
    with_hard_negatives: float
    twice: float
    sitting_out: float
    candidates: Range
    wanted: int | None
    short_of_wanted: float
    left_out: dict[str, float]
    copies: str
    loss: str
    chance: float
    floor: float
    computed_with: dict[str, str]
    validation: str = ""
    trains: str = ""


def check_reachable(settings: TrainSettings, ranks: int) -> None:
    """Refuse a recipe that asks for what no dataset could give it, before anything is loaded.

    Args:
        ranks: processes that share each batch.

    Raises:
        RecipeError: gives the numbers, and what would fit.
    """
    batch, loss = settings.batch, settings.loss
    rows, hard = batch.rows, batch.hard_negatives
    if rows < ranks:
        raise RecipeError(
            f"{ranks} ranks share the rows of a batch, but batch.rows is {rows}: "
            f"{ranks - rows} of the ranks would have none; set batch.rows to {ranks} or more, or "
            f"train in {counted(rows, 'rank')} with --ranks {rows}"
        )
    if settings.objective == "generation":
        return
    if rows == 1 and hard == 0:
        always = "the loss info_nce is always 0" if loss.kind == "info_nce" else "nothing is learnt"
        raise RecipeError(
            f"batch.rows is 1 and batch.hard_negatives is 0: a query has its own document and "
            f"nothing to tell it from, so that {always}{_no_more(settings, ranks)}. Set "
            "batch.rows to 2 or more"
        )
    if rows == 1 and loss.symmetric:
        raise RecipeError(
            "batch.rows is 1 and loss.symmetric is true: a document has no other query to tell its "
            "own from, so that half of the loss is always 0; set batch.rows to 2 or more, or "
            "loss.symmetric to false"
        )
    reach = rows * (1 + hard)
    if batch.candidates and batch.candidates > reach:
        raise RecipeError(
            f"batch.candidates is {batch.candidates}, but a batch brings at most "
            f"{counted(reach, 'document')}: {_brought(rows, hard)}{_no_more(settings, ranks)}. "
            f"Set batch.rows to {-(-batch.candidates // (1 + hard))} or more, or batch.candidates "
            f"to {reach} or less"
        )


def make_ledger(
    dataset: RetrievalDataset,
    settings: TrainSettings,
    ranks: int,
    query_lengths: QueryLengths,
    computed_with: Mapping[str, str] | None = None,
    *,
    validation: str = "",
    trains: str = "",
    position: SamplerPosition = _START,
    step: int = 0,
    batches: int = 32,
) -> Ledger:
    """Count the batches that a run draws next; no image is read.

    Args:
        ranks: processes that share each batch.
        query_lengths: vectors that the model makes of each text.
        computed_with, validation, trains: what the ledger should name beside the numbers.
        position: where the run goes on.
        step: how many of its steps are done.
        batches: to count; fewer where the run has fewer left.

    Raises:
        RecipeError: the median query gets fewer candidates than the recipe asks for, or the loss
            cannot be below its chance level.
        DatasetError: training would refuse one of the batches, or the split has too few queries.
    """
    counter = BatchCounter(dataset, settings, query_lengths)
    left = max(1, settings.steps - step) * settings.accumulation
    counts = list(counter.counts(position, min(batches, left)))
    wanted = settings.batch.candidates
    candidates = np.concatenate([each.candidates for each in counts])
    hard_negatives = np.concatenate([each.hard_negatives for each in counts])
    sits_out = np.concatenate([each.sits_out for each in counts])
    rows = settings.batch.rows
    ledger = Ledger(
        batches=len(counts),
        ranks=ranks,
        rows=rows,
        rows_of_rank=(rows // ranks, -(-rows // ranks)),
        accumulation=settings.accumulation,
        documents=_range_of([each.documents for each in counts]),
        hard_negatives=float(hard_negatives.mean()),
        with_hard_negatives=float((hard_negatives > 0).mean()),
        twice=float(np.mean([each.twice for each in counts])),
        sitting_out=float(sits_out.mean()),
        candidates=_range_of(candidates),
        wanted=wanted,
        short_of_wanted=float((candidates < (wanted or 0)).mean()),
        left_out=_left_out(counts),
        copies=settings.batch.ignore_copies,
        loss=_loss_of(settings),
        chance=float(np.mean([each.chance for each in counts])),
        floor=float(np.mean([each.floor for each in counts])),
        computed_with=dict(computed_with or {}),
        validation=validation,
        trains=trains,
    )
    _check_candidates(ledger, settings)
    _check_levels(ledger, settings)
    return ledger


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun, in the plural where it is not 1; `several` if that is irregular."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _check_candidates(ledger: Ledger, settings: TrainSettings) -> None:
    wanted, median = ledger.wanted, ledger.candidates.median
    if wanted is None or median >= wanted:
        return
    hard = settings.batch.hard_negatives
    lost = {
        "hard negatives that a query has not": ledger.rows * (hard - ledger.hard_negatives),
        "documents that several queries bring": ledger.twice,
    } | ledger.left_out
    named = ", ".join(f"{number:.1f} {why}" for why, number in lost.items() if number >= _NAMED)
    raise RecipeError(
        f"batch.candidates is {wanted}, but half of the queries are compared with {median:g} or "
        f"fewer ({ledger.candidates.least:g} to {ledger.candidates.most:g} in "
        f"{counted(ledger.batches, 'batch', 'batches')}). Of {_brought(ledger.rows, hard)} there "
        f"are lost on average: {named}. Set batch.rows to about "
        f"{math.ceil(ledger.rows * wanted / median)}, or batch.candidates to "
        f"{math.floor(median)} or less"
    )


def _check_levels(ledger: Ledger, settings: TrainSettings) -> None:
    loss = settings.loss
    if loss.kind != "sigmoid" or ledger.floor < ledger.chance:
        return
    fitting = -math.log(ledger.candidates.median - 1)
    raise RecipeError(
        f"loss.bias {loss.bias:g} and loss.temperature {loss.temperature:g}: no scores that MaxSim "
        f"can give take the loss below {ledger.floor:.3f}, and scores that say nothing could have "
        f"{ledger.chance:.3f}; set loss.bias to about {fitting:.2f}, less what documents that have "
        "nothing to do with a query score, divided by the temperature"
    )


def _no_more(settings: TrainSettings, ranks: int) -> str:
    """A clause on the numbers that pass for a larger batch and are none, where they are set."""
    accumulation, reasons = settings.accumulation, []
    if accumulation > 1:
        reasons.append(
            f"accumulation {accumulation} adds no candidates, for each batch is compared within "
            "itself"
        )
    if ranks > 1:
        reasons.append(f"the {ranks} ranks share these rows")
    return "; " + ", and ".join(reasons) if reasons else ""


def _brought(rows: int, hard: int) -> str:
    return f"{counted(rows, 'row')} x (1 positive + {counted(hard, 'hard negative')})"


def _left_out(counts: Sequence[BatchCounts]) -> dict[str, float]:
    reasons = counts[0].left_out
    return {
        why: float(np.concatenate([each.left_out[why] for each in counts]).mean())
        for why in reasons
    }


def _loss_of(settings: TrainSettings) -> str:
    loss = settings.loss
    symmetric = ", both directions" if loss.symmetric else ""
    bias = f", bias {loss.bias:g}" if loss.kind == "sigmoid" else ""
    return f"{loss.kind}, temperature {loss.temperature:g}{symmetric}{bias}"


def _range_of(numbers: Sequence[int] | np.ndarray) -> Range:
    return Range(float(np.min(numbers)), float(np.median(numbers)), float(np.max(numbers)))
