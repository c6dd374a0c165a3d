"""MaxSim in tiles over documents: memory of one tile, and only the winning index for backward.

Letters: Q query vectors, D document vectors, n queries, m documents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from colfolio.batch import MultiVectors

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
    scores = _MaxSim.apply(queries.vectors, queries.offsets, documents.vectors, documents.offsets)
    assert isinstance(scores, Tensor)
    return scores


class _MaxSim(torch.autograd.Function):
    """Scores `[n, m]`; saves which document vector won for each query vector and document."""

    @staticmethod
    def forward(ctx, queries, query_offsets, documents, document_offsets):
        dtype = torch.promote_types(queries.dtype, torch.float32)
        # autocast would round the similarities to half precision
        with torch.autocast(queries.device.type, enabled=False):
            best, index = _winners(queries.to(dtype), documents.to(dtype), document_offsets)
        rows = torch.repeat_interleave(query_offsets.diff()).to(queries.device)  # [Q]
        scores = best.new_zeros(len(query_offsets) - 1, best.shape[1]).index_add_(0, rows, best)
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


def _winners(
    queries: Float[Tensor, "Q dim"], documents: Float[Tensor, "D dim"], offsets: Tensor
) -> tuple[Float[Tensor, "Q m"], Int64[Tensor, "Q m"]]:
    """Best similarity of each query vector in each document, and the index of who gave it."""
    lengths = offsets.diff().tolist()
    best = queries.new_empty(len(queries), len(lengths))
    index = torch.empty(best.shape, dtype=torch.int64, device=queries.device)
    for first, last, length in _document_tiles(lengths, _tile_tokens(len(queries))):
        start, end = int(offsets[first]), int(offsets[last])
        similarity = queries @ documents[start:end].T  # [Q, tile]
        value, won = similarity.unflatten(1, (last - first, length)).max(dim=2)
        best[:, first:last] = value
        starts = offsets[first:last].to(won.device)
        index[:, first:last] = won + starts
    return best, index


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
