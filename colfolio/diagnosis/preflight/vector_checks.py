"""Whether vectors are what scores can be made of, and whether what must be equal is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from colfolio.batch import MultiVectors, Packed
from colfolio.diagnosis.causes.model_causes import adapter as adapter_rule
from colfolio.diagnosis.evidence import Evidence, ModelFacts, Settled
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.rule_checks import ruled
from colfolio.diagnosis.signals import Probe, ProbeBatch
from colfolio.diagnosis.signals.model_facts import adapter_effect, adapter_is_of_base
from colfolio.diagnosis.signals.vector_signals import effective_rank, mean_cosine
from colfolio.models.encoding import evaluating
from colfolio.models.precision import Precision, SettledPrecision
from colfolio.models.retriever import Retriever

ALONE, SAVED, APART, ADAPTER = (
    "a row does not depend on its batch",
    "saved and loaded alike",
    "vectors tell rows apart",
    "adapters",
)
# of the numbers of a unit vector, whose rounding depends on the shapes of products
ROUNDING: dict[SettledPrecision, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_OF_LENGTH = 1e-2  # half precision rounds a unit vector's
_ALIKE = 1 - 1e-5  # mean cosine between vectors of different rows
_LEAST_RANK = 1.01
_LEAST_SEEN = 1e-4


def most_apart(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The largest difference of a number of a vector; infinite where there are other vectors."""
    pairs = list(zip(these, those, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return math.inf
    return largest([_largest(one - other) for one, other in pairs])


def largest(numbers: Iterable[float]) -> float:
    """The largest of some numbers; NaN if one of them is."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


def alike(name: str, apart: float, most: float, told: str, cause: str, mend: str = "") -> Check:
    """Passes where vectors differ by rounding alone; numbers that are none are named as that.

    Args:
        apart: see `most_apart`.
        most: what rounding gives.
        cause, mend: of a difference that is larger.
    """
    said = f"vectors differ by at most {told}"
    if apart <= most:
        return Check(name, True, said)
    if math.isnan(apart):
        return Check(name, False, f"{said}: some have no finite numbers", "not_finite")
    return Check(name, False, f"{said}, where rounding gives {most:.0e}{mend}", cause)


def tells_apart(model: Retriever, rows: ProbeBatch) -> Check:
    """Vectors are finite, of length 1, and others for other rows and for other pixels."""
    queries, documents = (_vectors(model, side) for side in (rows.queries, rows.documents))
    both = torch.cat([queries.vectors, documents.vectors])
    count = f"{len(both)} vectors of {both.shape[1]} numbers"
    if not both.isfinite().all():
        share = float((~both.isfinite()).any(dim=1).double().mean())
        return Check(APART, False, f"{share:.0%} of {count} are not finite", "not_finite")
    lengths = both.norm(dim=1)
    if float((lengths - 1).abs().max()) > _OF_LENGTH:
        span = f"{float(lengths.min()):.2g} to {float(lengths.max()):.2g}"
        told = f"{count} have lengths of {span}, not 1, so that a score is no sum of cosines"
        return Check(APART, False, f"{told}; look at the projection: are its weights 0?")
    found = {"queries": queries, "documents": documents}
    cosines = {side: mean_cosine(vectors) for side, vectors in found.items()}
    ranks = {side: effective_rank(vectors.vectors) for side, vectors in found.items()}
    told = ", ".join(
        f"{side} have a mean cosine of {cosines[side]:.3f}, an effective rank of {ranks[side]:.1f}"
        for side in found
    )
    if max(cosines.values()) > _ALIKE or min(ranks.values()) < _LEAST_RANK:
        told += ": whatever is asked, all documents score the same"
        return Check(APART, False, told, "collapsed")
    return _pixels_seen(model, rows.documents, documents, told)


def adapter_works(model: Retriever, rows: ProbeBatch, precision: Precision) -> Check:
    """Adapters that were loaded change the vectors, and lie on the base that they name."""
    effect = adapter_effect(model, Probe(rows), precision)
    facts = ModelFacts(adapter_effect=effect, adapter_is_of_base=adapter_is_of_base(model))
    evidence = Evidence(Settled("info_nce"), model=facts)
    return ruled(ADAPTER, evidence, adapter_rule, told=f"they change vectors by {effect:.1e}")


def _pixels_seen(model: Retriever, documents: Packed, vectors: MultiVectors, told: str) -> Check:
    """Pages whose pixels are turned to their negative have other vectors."""
    negative = _vectors(model, replace(documents, patches=-documents.patches))
    apart = most_apart(list(vectors), list(negative))
    told += f"; the negatives of pages differ by up to {apart:.1e}"
    if apart > _LEAST_SEEN:
        return Check(APART, True, told)
    told += ", so that no page is seen; look at the vision tower: are its weights 0?"
    return Check(APART, False, told, "images_unseen")


@torch.no_grad()
def _vectors(model: Retriever, packed: Packed) -> MultiVectors:
    with evaluating(model):
        made = model(packed.to(model.device))
    return MultiVectors(made.vectors.float().cpu(), made.offsets.cpu())


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0
