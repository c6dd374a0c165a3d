"""What the vectors of a batch say: how alike they are, how many directions they use, who wins."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from colfolio.batch import MultiVectors

_NEARLY_EVERY = 0.9  # of the documents
_MOST_SAMPLED = 4096  # vectors of a side


def mean_cosine(rows: MultiVectors) -> float:
    """Mean cosine between vectors of different rows; 0 where there is one row alone.

    The sum over all pairs is the square of the sum of all vectors; pairs of one row go off.
    """
    unit = torch.nn.functional.normalize(rows.vectors.double(), dim=1)
    sums = torch.stack([unit[begin:end].sum(dim=0) for begin, end in _spans(rows)])  # [rows, dim]
    pairs = len(unit) ** 2 - int(rows.lengths.square().sum())
    between = sums.sum(dim=0).square().sum() - sums.square().sum()
    return float(between) / pairs if pairs else 0.0


def effective_rank(vectors: Float[Tensor, "tokens dim"]) -> float:
    """Exp of the entropy of the normalised singular values (Roy and Vetterli 2007).

    From the eigenvalues of the Gram matrix in float64; NaN if a vector is not finite.
    """
    wide = vectors.double()
    gram = (wide.T @ wide).cpu()
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def winners(
    queries: MultiVectors, documents: MultiVectors
) -> tuple[Int64[Tensor, "tokens documents"], Float[Tensor, "queries documents"]]:
    """The place in each document of every query vector's winner, and MaxSim, all in float64."""
    wide = queries.vectors.double()
    best, places = [], []
    for begin, end in _spans(documents):
        similarity = wide @ documents.vectors[begin:end].double().T  # [tokens, end - begin]
        highest, place = similarity.max(dim=1)
        best.append(highest)
        places.append(place)
    of_tokens = torch.stack(best, dim=1)  # [tokens, documents]
    scores = torch.stack([of_tokens[begin:end].sum(dim=0) for begin, end in _spans(queries)])
    return torch.stack(places, dim=1), scores


def same_winner_share(
    places: Int64[Tensor, "tokens documents"], lengths: Int64[Tensor, " documents"]
) -> float:
    """Share of the query vectors whose winner stands at one place in nearly every document.

    Places are counted from the beginning, or from the end, whichever agrees more: what the template
    has behind an image stands at the same place from the end alone.

    Args:
        places: of the winners.
        lengths: vectors of each document.
    """
    from_begin = places.cpu()
    counts = [_commonest(each) for each in (from_begin, lengths.cpu() - from_begin)]
    is_same = torch.maximum(*counts) >= _NEARLY_EVERY * places.shape[1]
    return float(is_same.double().mean())


def mean_distance(before: Float[Tensor, "n dim"], now: Float[Tensor, "n dim"]) -> float:
    """Mean of 1 - cosine between vectors and what they were before."""
    cosines = torch.nn.functional.cosine_similarity(before.double(), now.double(), dim=1)
    return float((1 - cosines).mean())


def sampled(rows: MultiVectors) -> Float[Tensor, "some dim"]:
    """Every n-th vector, on the CPU, so that some thousands are left."""
    every = -(-len(rows.vectors) // _MOST_SAMPLED)
    return rows.vectors[::every].float().cpu().contiguous()


def _commonest(places: Int64[Tensor, "tokens documents"]) -> Int64[Tensor, " tokens"]:
    """How often each row has the number that it has most often."""
    modes = places.mode(dim=1).values
    return (places == modes[:, None]).sum(dim=1)


def _spans(rows: MultiVectors) -> list[tuple[int, int]]:
    return list(pairwise(rows.offsets.tolist()))
