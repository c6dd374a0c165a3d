"""MaxSim in tiles: memory of one tile, and only the winning vectors for the gradient.

Letters: Q query vectors, D document vectors, n queries, m documents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag

from colfolio.batch import MultiVectors
from colfolio.maxsim.product import inner_products
from colfolio.maxsim.sides import check_sides

# Similarities held at a time: 2^21 float32 are 8 MiB, about one core's share of the cache.
_TILE = 1 << 21
# Pairs of query vector and document that are sorted at a time for the gradient of the documents.
_PAIRS = 1 << 20
# Document vectors of which the best is found first, and only then which of them it is: `max` with
# indices costs ten times `amax`. From a document of so many blocks on, that is faster.
_BLOCK, _WORTH_BLOCKS = 64, 3


def maxsim_tiled(
    queries: MultiVectors, documents: MultiVectors
) -> Float[Tensor, "queries documents"]:
    """Equal to `maxsim_by_definition`; a tie goes to the first of the best document vectors.

    A similarity that is not a number is the best there is, as it is for `max`. It spoils the scores
    it takes part in and no other, and the gradient takes vectors from winners alone.

    Args:
        queries: rows of at least one vector, any floating dtype, any device.
        documents: rows of at least one vector of the same dimension, on the same device.

    Returns:
        Scores in the dtype of the vectors, at least float32.

    Raises:
        ValueError: a row has no vectors, or the dimensions differ.
    """
    check_sides(queries, documents)
    sides = queries.vectors, queries.offsets, documents.vectors, documents.offsets
    wants_gradient = queries.vectors.requires_grad or documents.vectors.requires_grad
    if torch.is_grad_enabled() and wants_gradient:
        scores = _MaxSim.apply(*sides)
        assert isinstance(scores, Tensor)
        return scores
    return _scores(*sides)


class _MaxSim(torch.autograd.Function):
    """Scores `[n, m]`; saves which document vector won for each query vector and document."""

    @staticmethod
    def forward(ctx, queries, query_offsets, documents, document_offsets):
        shape = len(queries), len(document_offsets) - 1
        winners = torch.empty(shape, dtype=torch.int32, device=queries.device)
        ctx.save_for_backward(queries, query_offsets, documents, document_offsets, winners)
        return _scores(queries, query_offsets, documents, document_offsets, winners)

    @staticmethod
    def backward(ctx, *gradients):
        queries, query_offsets, documents, document_offsets, winners = ctx.saved_tensors
        wants_queries, _, wants_documents, _ = ctx.needs_input_grad
        order = _by_length(document_offsets).to(winners.device)
        lengths = query_offsets.diff().to(winners.device)
        # the gradient of each winning similarity; all others have none
        weights = gradients[0][:, order].repeat_interleave(lengths, dim=0)  # [Q, m]
        for_queries = for_documents = None
        with torch.autocast(queries.device.type, enabled=False):
            if wants_queries:
                for_queries = _query_gradient(documents.to(weights.dtype), winners, weights)
                for_queries = for_queries.to(queries.dtype)
            if wants_documents:
                num_vectors = len(documents)
                for_documents = _document_gradient(
                    queries.to(weights.dtype), winners, weights, num_vectors
                ).to(documents.dtype)
        return for_queries, None, for_documents, None


def _query_gradient(
    documents: Float[Tensor, "D dim"], winners: Int32[Tensor, "Q m"], weights: Float[Tensor, "Q m"]
) -> Float[Tensor, "Q dim"]:
    """Of each query vector: the weighted sum of the document vectors that it chose."""
    if not winners.numel():  # embedding_bag refuses rows of no indices
        return documents.new_zeros(len(winners), documents.shape[1])
    return embedding_bag(winners, documents, per_sample_weights=weights, mode="sum")


def _document_gradient(
    queries: Float[Tensor, "Q dim"],
    winners: Int32[Tensor, "Q m"],
    weights: Float[Tensor, "Q m"],
    num_vectors: int,
) -> Float[Tensor, "D dim"]:
    """Of each document vector: the weighted sum of the query vectors that chose it.

    Some documents at a time, whose vectors no other documents have: sorting all pairs of a large
    batch at once would take several times the memory of all its vectors.
    """
    gradient = queries.new_zeros(num_vectors, queries.shape[1])
    step = max(1, _PAIRS // max(len(queries), 1))
    for columns, of_columns in zip(winners.split(step, 1), weights.split(step, 1), strict=True):
        chosen, pairs = columns.flatten().sort(stable=True)
        vectors, times = chosen.unique_consecutive(return_counts=True)
        gradient[vectors] = embedding_bag(
            pairs // columns.shape[1],
            queries,
            times.cumsum(0) - times,
            per_sample_weights=of_columns.flatten()[pairs],
            mode="sum",
        )
    return gradient


def _scores(
    queries: Float[Tensor, "Q dim"],
    query_offsets: Int64[Tensor, " n_and_one"],
    documents: Float[Tensor, "D dim"],
    document_offsets: Int64[Tensor, " m_and_one"],
    winners: Int32[Tensor, "Q m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Scores, tile by tile; `winners` is filled with the index of each best document vector.

    Columns of `winners` are documents by length, columns of the scores are documents as they came.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    order = _by_length(document_offsets)
    begins, lengths = document_offsets[:-1][order], document_offsets.diff()[order]
    best = queries.new_empty(len(queries), len(order), dtype=dtype)
    # autocast would round the similarities to half precision
    with torch.autocast(queries.device.type, enabled=False):
        wide = queries.to(dtype)
        for first, last, length in _document_tiles(lengths.tolist(), len(queries)):
            begin = begins[first:last]
            vectors = _rows_of(documents, begin, length).to(dtype)  # [documents * length, dim]
            step = max(1, _TILE // len(vectors))
            for start in range(0, len(queries), step):
                rows, columns = slice(start, start + step), slice(first, last)
                similarity = inner_products(wide[rows], vectors).unflatten(1, (-1, length))
                if winners is None:
                    best[rows, columns] = similarity.amax(dim=2)
                else:
                    best[rows, columns], won = _best_and_first(similarity)
                    winners[rows, columns] = won + begin.to(won.device)
    return _sum_rows(best, query_offsets)[:, torch.argsort(order).to(best.device)]


def _best_and_first(
    similarity: Float[Tensor, "Q m length"],
) -> tuple[Float[Tensor, "Q m"], Int64[Tensor, "Q m"]]:
    """The best similarity with each document, and the first of its vectors to reach it."""
    rows, documents, length = similarity.shape
    if length < _WORTH_BLOCKS * _BLOCK:
        return similarity.max(dim=2)
    whole = length // _BLOCK
    of_blocks = similarity[..., : whole * _BLOCK].unflatten(2, (whole, _BLOCK)).amax(dim=3)
    if length % _BLOCK:  # the last block laps over the one before
        last = similarity[..., -_BLOCK:].amax(dim=2, keepdim=True)
        of_blocks = torch.cat([of_blocks, last], dim=2)
    best, block = of_blocks.max(dim=2)
    begin = (block * _BLOCK).clamp_(max=length - _BLOCK).flatten()
    before = torch.arange(rows * documents, device=begin.device) * length
    winning_blocks = similarity.flatten().unfold(0, _BLOCK, 1).index_select(0, before + begin)
    won = begin + winning_blocks.argmax(dim=1)
    return best, won.view(rows, documents)


def _sum_rows(
    best: Float[Tensor, "Q m"], query_offsets: Int64[Tensor, " n_and_one"]
) -> Float[Tensor, "n m"]:
    """Sums over the vectors of each query."""
    rows = torch.arange(len(best), device=best.device)
    return embedding_bag(rows, best, query_offsets[:-1].to(best.device), mode="sum")


def _by_length(offsets: Int64[Tensor, " rows_and_one"]) -> Int64[Tensor, " rows"]:
    """The rows, shortest first, and as they came where equally long."""
    return torch.argsort(offsets.diff(), stable=True)


def _rows_of(
    vectors: Float[Tensor, "tokens dim"], begin: Int64[Tensor, " rows"], length: int
) -> Float[Tensor, "some dim"]:
    """The equally long rows that begin there, behind one another."""
    first, num_vectors = int(begin[0]), len(begin) * length
    if int(begin[-1]) + length - first == num_vectors:
        return vectors[first : first + num_vectors]
    index = (begin[:, None] + torch.arange(length)).flatten()
    return vectors.index_select(0, index.to(vectors.device))


def _document_tiles(lengths: list[int], num_query_vectors: int) -> list[tuple[int, int, int]]:
    """Runs `(first, last, length)` of equally long documents, of about one tile each."""
    tokens = _TILE // max(num_query_vectors, 1)
    tiles: list[tuple[int, int, int]] = []
    for document, length in enumerate(lengths):
        if tiles:
            first, last, known = tiles[-1]
            if known == length and (last - first + 1) * length <= tokens:
                tiles[-1] = (first, document + 1, length)
                continue
        tiles.append((document, document + 1, length))
    return tiles
