"""Whether the data is what the recipe says: candidates, answers, and splits that share nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from colfolio.data.dataset import RetrievalDataset
from colfolio.diagnosis.causes import data_causes
from colfolio.diagnosis.causes.learning_causes import few_candidates
from colfolio.diagnosis.causes.thresholds import FEW_CANDIDATES
from colfolio.diagnosis.evidence import DataFacts, Evidence, Settled
from colfolio.diagnosis.ledgers.ledger import Ledger
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.rule_checks import ruled
from colfolio.diagnosis.preflight.trial import Trial
from colfolio.errors import RecipeError
from colfolio.training import TrainSettings

CANDIDATES, ENOUGH, ANSWERS, BLANK, COPIED, SPLITS, ORDER = (
    "candidates",
    "enough candidates",
    "answers of a batch",
    "pages show something",
    "no answer is a negative",
    "nothing in two splits",
    "batches are drawn anew",
)


def candidates(count: Callable[[], Ledger], settings: TrainSettings) -> Check:
    """A query is compared with as many documents as the recipe asks for.

    Args:
        count: makes the ledger of the run.
    """
    try:
        ledger = count()
    except RecipeError as error:
        return Check(CANDIDATES, False, str(error), "few_candidates")
    told = (
        f"{ledger.candidates.median:g} of {ledger.documents.median:g} documents of a batch of "
        f"{ledger.rows} rows"
    )
    masked = sum(ledger.left_out.values())
    told += f", {masked:.1f} left out" if masked else ""
    told += f"; the recipe asks for {ledger.wanted}" if ledger.wanted else ""
    if settings.accumulation > 1:
        told += f"; accumulation {settings.accumulation} adds none"
    return Check(CANDIDATES, True, told)


def answers(trial: Trial) -> Check:
    """The positives of a batch are the documents judged to answer its queries' texts, no others."""
    batch = trial.batch
    judged = _judged(trial.dataset, batch.query_ids.tolist(), batch.document_ids.tolist())
    takes_part = batch.positives.any(dim=1, keepdim=True)
    negatives = ~(batch.positives | batch.ignored)
    lost = takes_part & judged & ~batch.positives
    wrong = (batch.positives & ~judged) | lost
    told = (
        f"{int(batch.positives.sum())} answers, {int(negatives.sum())} negatives and "
        f"{int((takes_part & batch.ignored).sum())} masked pairs of {len(batch.positives)} queries"
    )
    if not wrong.any():
        return Check(ANSWERS, True, f"{told}, as judged")
    row, column = wrong.nonzero()[0].tolist()
    query = trial.dataset.queries[int(batch.query_ids[row])].id
    document = trial.dataset.corpus.ids[int(batch.document_ids[column])]
    verdict = "does not answer" if batch.positives[row, column] else "answers"
    return Check(
        ANSWERS,
        False,
        f"{told}, {int(wrong.sum())} of them not as judged: by the dataset {document!r} {verdict} "
        f"{query!r}; join queries and documents by their ids",
        "shifted_labels",
    )


def enough_candidates(
    count: Callable[[], Ledger],
    facts: Callable[[], DataFacts],
    settled: Settled,
    *,
    is_trained: bool,
) -> Check:
    """A query has enough to be told from; if it has not, the setting that makes them few is named.

    Few do where weights can retrieve already, or where the data has no more queries.

    Args:
        count: makes the ledger of the run.
        is_trained: the weights were trained to retrieve.
    """
    ledger = count()
    few, masked = ledger.candidates.median, sum(ledger.left_out.values())
    if 1 < few < FEW_CANDIDATES and settled.loss != "distillation":
        told = f"a query is compared with {few:.3g} documents, which are few"
        if is_trained:
            return Check(ENOUGH, True, f"{told}; weights that were trained before can bear that")
        if not masked and settled.accumulation == 1 and ledger.rows >= facts().queries:
            return Check(ENOUGH, True, f"{told}, and the data has {facts().queries} queries in all")
    evidence = Evidence(settled, data=facts(), candidates=few, masked=masked)
    return ruled(ENOUGH, evidence, few_candidates)


def pages_show_something(facts: Callable[[], DataFacts], settled: Settled) -> Check:
    """Few images are of one colour throughout."""
    return ruled(BLANK, Evidence(settled, data=facts()), data_causes.blank)


def no_false_negatives(facts: Callable[[], DataFacts], settled: Settled) -> Check:
    """No candidate of a query is its answer again, by its pixels or by the text that it answers."""
    return ruled(COPIED, Evidence(settled, data=facts()), data_causes.false_negatives)


def splits_apart(facts: Callable[[], DataFacts], settled: Settled) -> Check:
    """Training has neither the images nor the new queries of the validation split."""
    return ruled(SPLITS, Evidence(settled, data=facts()), data_causes.leaked)


def drawn_anew(facts: Callable[[], DataFacts], settled: Settled) -> Check:
    """Batches are not the same every epoch, nor stretches of the data set."""
    found = facts()
    shares = {"of the rows of a batch meet again": found.epoch_overlap}
    shares |= {"have the next row beside them": found.neighbours}
    told = ", ".join(f"{share:.1%} {what}" for what, share in shares.items() if share is not None)
    return ruled(ORDER, Evidence(settled, data=found), data_causes.fixed_order, told=told)


def _judged(
    dataset: RetrievalDataset, queries: list[int], documents: list[int]
) -> Bool[Tensor, "Q D"]:
    """Which documents answer a query of the same text, whatever its case."""
    asked = {dataset.queries[query].text.casefold() for query in queries}
    answering: dict[str, set[str]] = {text: set() for text in asked}
    for query in dataset.queries:
        if (text := query.text.casefold()) in asked:
            answering[text].update(dataset.positives(query.id))
    ids = [dataset.corpus.ids[document] for document in documents]
    rows = [answering[dataset.queries[query].text.casefold()] for query in queries]
    return torch.from_numpy(np.array([[id_ in wanted for id_ in ids] for wanted in rows]))
