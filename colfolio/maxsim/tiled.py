"""MaxSim in tiles over documents: memory of one tile, and only the winning index for backward.

Letters: Q query vectors, D document vectors, n queries, m documents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from colfolio.batch import MultiVectors, offsets_of

# Similarities held at a time: 2^21 float32 are 8 MiB, about one core's share of the cache.
_TILE = 1 << 21


def maxsim_tiled(
    queries: MultiVectors, documents: MultiVectors
) -> Float[Tensor, "queries documents"]:
    """Equal to `maxsim_by_definition`; a tie goes to the first of the best document vectors."""
    for side, name in ((queries, "query"), (documents, "document")):
        if (side.lengths == 0).any():
            row = int((side.lengths == 0).nonzero()[0])
            raise ValueError(f"{name} {row} has no vectors, so it has no best match")
    if queries.vectors.shape[1] != documents.vectors.shape[1]:
        raise ValueError(
            f"query vectors have {queries.vectors.shape[1]} dimensions, "
            f"document vectors {documents.vectors.shape[1]}"
        )
    order = torch.argsort(documents.lengths, stable=True)
    sorted_vectors = documents.vectors[_tokens_in_order(documents, order)]
    offsets = offsets_of(documents.lengths[order])
    if torch.is_grad_enabled() and (queries.vectors.requires_grad or sorted_vectors.requires_grad):
        scores = _MaxSim.apply(queries.vectors, queries.offsets, sorted_vectors, offsets)
        assert isinstance(scores, Tensor)
    else:
        scores = _scores(queries.vectors, queries.offsets, sorted_vectors, offsets)
    return scores[:, torch.argsort(order).to(scores.device)]


class _MaxSim(torch.autograd.Function):
    """Scores `[n, m]`; saves which document vector won for each query vector and document."""

    @staticmethod
    def forward(ctx, queries, query_offsets, documents, document_offsets):
        index = torch.empty(
            len(queries), len(document_offsets) - 1, dtype=torch.int64, device=queries.device
        )
        scores = _scores(queries, query_offsets, documents, document_offsets, index)
        rows = torch.repeat_interleave(query_offsets.diff()).to(queries.device)  # [Q]
        ctx.save_for_backward(queries, documents, index, rows)
        return scores

    @staticmethod
    def backward(ctx, *gradients):
        queries, documents, index, rows = ctx.saved_tensors
        weight = gradients[0][rows]  # [Q, m], the gradient of each winning similarity
        for_queries = torch.zeros_like(queries, dtype=weight.dtype)
        for_documents = torch.zeros_like(documents, dtype=weight.dtype)
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, len(documents), step := _tile_tokens(len(queries))):
                end = min(start + step, len(documents))
                inside = (index >= start) & (index < end)
                # the gradient of each similarity of the tile: only winners have one
                of_tile = weight.new_zeros(len(queries), end - start).scatter_add_(
                    1, (index - start).clamp(0, end - start - 1), weight * inside
                )  # [Q, tile]
                for_queries.addmm_(of_tile, documents[start:end].to(weight.dtype))
                for_documents[start:end] = of_tile.T @ queries.to(weight.dtype)
        return for_queries.to(queries.dtype), None, for_documents.to(documents.dtype), None


def _scores(
    queries: Float[Tensor, "Q dim"],
    query_offsets: Int64[Tensor, " n_and_one"],
    documents: Float[Tensor, "D dim"],
    document_offsets: Int64[Tensor, " m_and_one"],
    winners: Int64[Tensor, "Q m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Scores, tile by tile; `winners` is filled with the index of each best document vector."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    rows = torch.repeat_interleave(query_offsets.diff()).to(queries.device)  # [Q]
    lengths = document_offsets.diff().tolist()
    scores = queries.new_empty(len(query_offsets) - 1, len(lengths), dtype=dtype)
    # autocast would round the similarities to half precision
    with torch.autocast(queries.device.type, enabled=False):
        wide = queries.to(dtype)
        for first, last, length in _document_tiles(lengths, _tile_tokens(len(queries))):
            start, end = int(document_offsets[first]), int(document_offsets[last])
            similarity = wide @ documents[start:end].to(dtype).T  # [Q, tile]
            of_each = similarity.unflatten(1, (last - first, length))
            if winners is None:
                best = of_each.amax(dim=2)  # much faster than max with indices
            else:
                best, won = of_each.max(dim=2)
                winners[:, first:last] = won + document_offsets[first:last].to(won.device)
            summed = best.new_zeros(len(scores), last - first)
            scores[:, first:last] = summed.index_add_(0, rows, best)
    return scores


def _tokens_in_order(rows: MultiVectors, order: Int64[Tensor, " rows"]) -> Int64[Tensor, " tokens"]:
    """Indices that put the rows' vectors into another order of rows."""
    lengths = rows.lengths[order]
    begin = rows.offsets[:-1][order] - (lengths.cumsum(0) - lengths)
    index = torch.arange(len(rows.vectors)) + begin.repeat_interleave(lengths)
    return index.to(rows.vectors.device)


def _document_tiles(lengths: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """Runs `(first, last, length)` of equally long documents, of about so many tokens each."""
    tiles: list[tuple[int, int, int]] = []
    for document, length in enumerate(lengths):
        if tiles:
            first, last, known = tiles[-1]
            if known == length and (last - first + 1) * length <= tokens:
                tiles[-1] = (first, document + 1, length)
                continue
        tiles.append((document, document + 1, length))
    return tiles


def _tile_tokens(num_query_vectors: int) -> int:
    """Document vectors in one tile of similarities."""
    return max(1, _TILE // max(num_query_vectors, 1))
