"""Whether what must be equal is: alone and in a batch, in chunks and at once, saved and loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import ContrastiveBatch, MultiVectors, Packed
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.steps import FACTORS, WAY, Steps
from colfolio.diagnosis.preflight.trial import (
    Trial,
    as_found,
    encoded,
    scores_of,
    settled,
)
from colfolio.diagnosis.preflight.vector_checks import (
    ALONE,
    ROUNDING,
    SAVED,
    alike,
    largest,
    most_apart,
)
from colfolio.maxsim import maxsim
from colfolio.models.encoding import evaluating
from colfolio.models.precision import SettledPrecision
from colfolio.models.retriever import Retriever
from colfolio.training import save_model
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.graph_budget import GraphBudget
from colfolio.training.retrieval_objective import batch_loss

CHUNKS, HALF = "chunks give the gradient of the whole", "half precision ranks alike"
_OF_GRADIENT = 1e-3  # of its norm, in float32
_MOST_TOKENS = 4096  # of documents whose graph is held at once
_MIB = 2**20
_ROOM = 1.1
_OF_LEAD = 0.5  # typical lead: noise of that size turns it in one case of forty (two deviations)
_EQUAL = 1e-6  # spread of scores, of the largest: rounding in float32


def rows_alone(trial: Trial) -> Check:
    """Vectors of a row that goes through the model alone are those that it has in a batch."""
    precision = settled(trial)
    found = {
        side: most_apart(
            list(encoded(trial, packed)), [encoded(trial, row)[0] for row in _each(packed)]
        )
        for side, packed in _sides(trial).items()
    }
    told = ", ".join(f"{side} {apart:.1e}" for side, apart in found.items())
    mend = (
        ": tokens of other rows reach a row; set train.attention to sdpa, and if that mends it, "
        "report the kernel"
    )
    told, most = f"{told} ({precision})", ROUNDING[precision]
    return alike(ALONE, largest(found.values()), most, told, "padding_side", mend)


def chunks_alike(trial: Trial) -> Check:
    """Rows one by one, with cached gradients, give the gradient of one graph over all of them."""
    model, batch = trial.retriever, _few_rows(trial.batch)
    with as_found(trial), evaluating(model):
        scores = maxsim(
            *(model(side.to(model.device)) for side in (batch.queries, batch.documents))
        )
        batch_loss(trial.state, batch)(scores).loss.backward()
        plain = _gradients(model)
        settings = MemorySettings(chunk_tokens=1, activation_mb=_megabytes_of_a_row(model, batch))
        ExactBatch(model, settings, "fp32").backward(batch, batch_loss(trial.state, batch), seed=0)
        apart = {name: (tensor - plain[name]).norm() for name, tensor in _gradients(model).items()}
    norm = torch.stack([tensor.norm() for tensor in plain.values()]).norm()
    if norm == 0:
        return Check(
            CHUNKS, True, f"there is no gradient: its norm is 0 ({len(batch.queries)} rows)"
        )
    share = float(torch.stack(list(apart.values())).norm() / norm)
    told = f"they differ by {share:.1e} of its norm {float(norm):.2e} ({len(batch.queries)} rows)"
    if share <= _OF_GRADIENT:
        return Check(CHUNKS, True, told)
    return Check(
        CHUNKS,
        False,
        f"{told}, more than rounding does; set train.memory.chunk_tokens and activation_mb to null "
        "and train.features to nothing, so that nothing runs twice",
    )


def half_precision(trial: Trial) -> Check:
    """Answers lead in half precision by as much as in float32, once a batch is learnt.

    It is learnt at whichever of the tried rates it can be; if at none, nothing is. The ranks of all
    documents are told and not judged: negatives that are nearly equal change places at no harm.
    """
    own = trial.state.settings.precision
    half: SettledPrecision = "fp16" if own == "fp16" else "bf16"
    wide, narrow = _both_precisions(trial, half)
    correlation = rank_correlation(wide, narrow)
    spread = float(wide.std(dim=1, correction=0).mean())
    if spread <= _EQUAL * float(wide.abs().max()):
        return Check(HALF, True, f"all scores of a query are equal: they spread by {spread:.1e}")
    leads, found = (_leads(scores, trial.batch) for scores in (wide, narrow))
    lead, change = float(leads.abs().median()), float((found - leads).square().mean().sqrt())
    told = (
        f"the score of an answer and that of its hardest negative are {lead:.2g} apart, which "
        f"{half} changes by {change:.2g} beside fp32 (rank correlation of all scores "
        f"{correlation:.3f})"
    )
    if own == "fp32":
        return Check(HALF, True, f"the run computes in fp32; {told}")
    if change <= _OF_LEAD * lead:
        return Check(HALF, True, told)
    return Check(HALF, False, f"{told}; set train.precision to fp32", "rounded_scores")


def saved_and_loaded(trial: Trial, base: str) -> Check:
    """What is saved after a step, loaded again, gives the same vectors.

    Args:
        base: folder or hub id that the run's model comes from.
    """
    model, state = trial.retriever, trial.state
    with as_found(trial), tempfile.TemporaryDirectory() as place:
        steps = Steps(trial)
        steps.gradient(seed=0)
        steps.update(1.0)
        save_model(state, Path(place) / "model", base=base)
        loaded = Retriever.from_pretrained(
            Path(place) / "model", device=model.device, dtype=torch.float32
        )
        apart = largest(
            most_apart(list(encoded(trial, packed, "fp32")), list(_vectors(loaded, packed)))
            for packed in _sides(trial).values()
        )
        is_used_alike = loaded.contract.deciding() == model.contract.deciding()
    told = f"vectors after a step and those of its files differ by {apart:.1e}"
    if not is_used_alike:
        told += ", and their contract another use: templates, pixels or positions are not the same"
        return Check(SAVED, False, told, "wrong_template")
    if apart <= ROUNDING["fp32"]:
        return Check(SAVED, True, told)
    return Check(
        SAVED,
        False,
        f"{told}: what was trained is not what comes back; weights are missing in the files, or an "
        "adapter lies on another base",
        "adapter_not_loaded" if state.settings.lora else "fresh_tensors",
    )


def rank_correlation(
    first: Float[Tensor, "queries documents"], second: Float[Tensor, "queries documents"]
) -> float:
    """Spearman's correlation of the ranks of each query's scores, mean over queries.

    >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]]))
    -1.0
    """
    ranks = [scores.argsort(dim=1).argsort(dim=1).double() for scores in (first, second)]
    centred = [each - each.mean(dim=1, keepdim=True) for each in ranks]
    product = (centred[0] * centred[1]).sum(dim=1)
    return float((product / centred[0].square().sum(dim=1)).mean())


def _sides(trial: Trial) -> dict[str, Packed]:
    return {"queries": trial.rows.queries, "documents": trial.rows.documents}


def _each(packed: Packed) -> list[Packed]:
    return [packed.rows(row, row + 1) for row in range(len(packed))]


@torch.no_grad()
def _vectors(model: Retriever, packed: Packed) -> MultiVectors:
    return model(packed.to(model.device))


def _both_precisions(trial: Trial, half: SettledPrecision) -> tuple[Tensor, Tensor]:
    """Scores of the batch in float32 and in half precision."""
    for factor in FACTORS:
        with as_found(trial):
            if Steps(trial).descend(factor).way >= WAY:
                return scores_of(trial, "fp32"), scores_of(trial, half)
    return scores_of(trial, "fp32"), scores_of(trial, half)


def _few_rows(batch: ContrastiveBatch) -> ContrastiveBatch:
    """The first queries of a batch and their answers, as many as one graph can hold, two at least.

    What several queries want, or a teacher scored, comes along as it is.
    """
    queries = len(batch.queries)
    while queries > 2:
        wanted = batch.positives[:queries].any(dim=0)
        if int(batch.documents.lengths[wanted].sum()) <= _MOST_TOKENS:
            break
        queries //= 2
    columns = batch.positives[:queries].any(dim=0).nonzero().flatten()
    if queries == len(batch.queries) or len(columns) < 2:
        return batch
    return ContrastiveBatch(
        batch.queries.rows(0, queries),
        batch.documents.select(columns.tolist()),
        batch.positives[:queries, columns],
        batch.ignored[:queries, columns],
        batch.query_ids[:queries],
        batch.document_ids[columns],
        None,
        None if batch.teacher is None else batch.teacher[:queries, columns],
    )


def _megabytes_of_a_row(model: Retriever, batch: ContrastiveBatch) -> float:
    """What the largest graph of one row holds, so that few fit and the others are run twice."""
    budget = GraphBudget(model, 1e9)
    most = 0
    for side in (batch.documents, batch.queries):
        row = side.rows(int(side.lengths.argmax()), int(side.lengths.argmax()) + 1)
        with budget.measuring(row) as held:
            model(row.to(model.device))
        most = max(most, held.num_bytes)
    return max(_ROOM * most, 1.0) / _MIB


def _gradients(model: Retriever) -> dict[str, Tensor]:
    """A copy of the gradient of each tensor that trains; they are cleared."""
    found = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return found


def _leads(
    scores: Float[Tensor, "queries documents"], batch: ContrastiveBatch
) -> Float[Tensor, " leading"]:
    """By how much the weakest answer of each query is ahead of its hardest negative."""
    positives, ignored = (each.to(scores.device) for each in (batch.positives, batch.ignored))
    takes_part = positives.any(dim=1) & ~(positives | ignored).all(dim=1)
    weakest = scores.masked_fill(~positives, float("inf")).amin(dim=1)
    hardest = scores.masked_fill(positives | ignored, float("-inf")).amax(dim=1)
    return (weakest - hardest)[takes_part]
