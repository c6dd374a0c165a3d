"""MaxSim on a GPU: kernels that never write a similarity, and save only which vector won.

Letters: Q query vectors, D document vectors, n queries, m documents.

What it costs, for 512 queries of 32 vectors and 512 documents of 768, dim 128: the forward pass
multiplies 1.65 TFLOP, which is nearly all of the time. The winners, int32 `[m, Q]`, are 32 MiB; the
similarities would be 24 GiB. Either gradient reads 8.4 million vectors of 256 bytes, 2 GiB, and
those of the queries stay in the cache. The document gradient as a product of tensor cores, of a
one-hot matrix of winners with the queries, would multiply the 1.65 TFLOP of the forward pass again,
and in half precision round each weight; sorting the winners costs a few passes over them, is exact,
and adds in the same order every time, as atomic additions do not.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from colfolio.batch import MultiVectors
from colfolio.maxsim.cuda_kernels import add_choosers, add_winners, find_best, sum_queries
from colfolio.maxsim.sides import check_sides

# Pairs of a document and a query vector sorted at a time: with their places and what the sort
# itself takes, about 100 MiB.
_PAIRS = 1 << 22
_HOPPER = 9
# A product and the addition after it are rounded once; Triton is about to stop doing so unasked.
_OPTIONS = {"enable_fp_fusion": True}
# Every document vector has a program of its own, and most have few vectors to add: few threads.
_SMALL = _OPTIONS | {"num_warps": 2}


def maxsim_fused(
    queries: MultiVectors, documents: MultiVectors
) -> Float[Tensor, "queries documents"]:
    """Equal to `maxsim_tiled` in time and memory fit for a GPU; its gradient has none of its own.

    Half precision is multiplied as it is and accumulated in float32; float32 is multiplied in
    float32, never in TF32. Nothing waits for the device, and the gradient is the same every time.

    Args:
        queries: rows of at least one vector, of 16 or 32 bits, on a GPU that Triton compiles for.
        documents: rows of at least one vector of the same dimension, on the same device.

    Returns:
        Scores in float32.

    Raises:
        ValueError: a row has no vectors, dimensions or devices differ, or numbers have 64 bits.
    """
    check_sides(queries, documents)
    dtype = torch.promote_types(queries.vectors.dtype, documents.vectors.dtype)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernels take float16, bfloat16 and float32, not {dtype}")
    sides = [
        given
        for side in (queries, documents)
        for given in (side.vectors.to(dtype).contiguous(), side.offsets)
    ]
    with torch.cuda.device_of(sides[0]):
        if torch.is_grad_enabled() and (sides[0].requires_grad or sides[2].requires_grad):
            scores = _MaxSim.apply(*sides)
            assert isinstance(scores, Tensor)
            return scores
        return _scores(*sides)


class _MaxSim(torch.autograd.Function):
    """Scores `[n, m]`; saves which document vector won for each query vector and document."""

    @staticmethod
    def forward(ctx, queries, query_offsets, documents, document_offsets):
        winners = queries.new_empty(len(document_offsets) - 1, len(queries), dtype=torch.int32)
        ctx.save_for_backward(queries, query_offsets, documents, document_offsets, winners)
        return _scores(queries, query_offsets, documents, document_offsets, winners)

    @staticmethod
    def backward(ctx, *gradients):
        return _gradients(ctx, gradients[0].contiguous())


@once_differentiable
def _gradients(ctx, weights):
    queries, query_offsets, documents, document_offsets, winners = ctx.saved_tensors
    wants_queries, _, wants_documents, _ = ctx.needs_input_grad
    for_queries = for_documents = None
    with torch.cuda.device_of(queries):
        query_of = _row_of_each(query_offsets, queries.device)
        if wants_queries:
            for_queries = _query_gradient(queries, documents, winners, weights, query_of)
        if wants_documents:
            for_documents = _document_gradient(
                queries, documents, document_offsets, winners, weights, query_of
            )
    return for_queries, None, for_documents, None


def _scores(
    queries: Float[Tensor, "Q dim"],
    query_offsets: Int64[Tensor, " n_and_one"],
    documents: Float[Tensor, "D dim"],
    document_offsets: Int64[Tensor, " m_and_one"],
    winners: Int[Tensor, "m Q"] | None = None,
) -> Float[Tensor, "n m"]:
    """Scores; `winners` is filled with the index of each best document vector."""
    num_queries, num_documents = len(query_offsets) - 1, len(document_offsets) - 1
    best = queries.new_empty(num_documents, len(queries), dtype=torch.float32)
    sizes = _sizes(queries.dtype, queries.shape[1], _is_hopper(queries.device))
    find_best[(num_documents * triton.cdiv(len(queries), sizes["query_block"]),)](
        queries,
        documents,
        _to_device(document_offsets, queries.device),
        best,
        best if winners is None else winners,
        len(queries),
        queries.shape[1],
        keeps_winners=winners is not None,
        **sizes,
        **_OPTIONS,
    )
    scores = best.new_empty(num_queries, num_documents)
    sum_queries[(num_queries, triton.cdiv(num_documents, 32))](
        best,
        _to_device(query_offsets, queries.device),
        scores,
        len(queries),
        num_documents,
        document_block=32,
        vector_block=32,
        **_OPTIONS,
    )
    return scores


def _query_gradient(
    queries: Float[Tensor, "Q dim"],
    documents: Float[Tensor, "D dim"],
    winners: Int[Tensor, "m Q"],
    weights: Float[Tensor, "n m"],
    query_of: Int[Tensor, " Q"],
) -> Float[Tensor, "Q dim"]:
    """Of each query vector: the weighted sum of the document vectors that it chose."""
    num_documents, num_vectors = winners.shape
    gradient, dim_block = torch.empty_like(queries), _dim_block(queries.shape[1])
    add_winners[(triton.cdiv(num_vectors, 16), triton.cdiv(queries.shape[1], dim_block))](
        documents,
        winners,
        weights,
        query_of,
        gradient,
        num_vectors,
        num_documents,
        queries.shape[1],
        vector_block=16,
        dim_block=dim_block,
        **_OPTIONS,
    )
    return gradient


def _document_gradient(
    queries: Float[Tensor, "Q dim"],
    documents: Float[Tensor, "D dim"],
    document_offsets: Int64[Tensor, " m_and_one"],
    winners: Int[Tensor, "m Q"],
    weights: Float[Tensor, "n m"],
    query_of: Int[Tensor, " Q"],
) -> Float[Tensor, "D dim"]:
    """Of each document vector: the weighted sum of the query vectors that chose it."""
    num_documents, num_vectors = winners.shape
    gradient, dim_block = torch.empty_like(documents), _dim_block(documents.shape[1])
    step = max(1, _PAIRS // max(1, num_vectors))
    for first in range(0, num_documents, step):
        last = min(first + step, num_documents)
        begin, end = int(document_offsets[first]), int(document_offsets[last])
        chosen, pairs = winners[first:last].flatten().sort(stable=True)
        vectors = torch.arange(begin, end + 1, dtype=torch.int32, device=chosen.device)
        add_choosers[(end - begin, triton.cdiv(documents.shape[1], dim_block))](
            queries,
            pairs,
            torch.searchsorted(chosen, vectors, out_int32=True),
            weights,
            query_of,
            gradient,
            first,
            begin,
            num_vectors,
            num_documents,
            documents.shape[1],
            pair_block=32,
            dim_block=dim_block,
            **_SMALL,
        )
    return gradient


def _sizes(dtype: torch.dtype, dim: int, is_hopper: bool) -> dict[str, int]:
    """Sizes of one program's work in `find_best`.

    Half precision goes through tensor cores. On Hopper, 128 registers a thread let two programs
    share a multiprocessor, so that one multiplies while the other compares. Float32 is multiplied
    by ordinary units out of registers, which hold no more than 16 dimensions of such blocks. All
    fit the 99 KiB of shared memory of the smaller cards.
    """
    if dtype == torch.float32:
        blocks = {"query_block": 64, "document_block": 64, "dim_block": 16}
        return blocks | {"num_warps": 8, "num_stages": 2}
    blocks = {"query_block": 128, "document_block": 64}
    blocks |= {"dim_block": _dim_block(dim) if dim <= 128 else 64}
    registers = {"maxnreg": 128} if is_hopper else {}
    return blocks | {"num_warps": 8, "num_stages": 3} | registers


def _dim_block(dim: int) -> int:
    """Dimensions that a program takes at a time: a power of two, as many as a product needs."""
    return min(128, max(16, triton.next_power_of_2(dim)))


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


def _row_of_each(
    offsets: Int64[Tensor, " n_and_one"], device: torch.device
) -> Int[Tensor, " vectors"]:
    """Of each vector: the row that it belongs to."""
    vectors = torch.arange(int(offsets[-1]), device=device)
    ends = _to_device(offsets[1:], device)
    return torch.searchsorted(ends, vectors, right=True, out_int32=True)


def _to_device(offsets: Int64[Tensor, " some"], device: torch.device) -> Int64[Tensor, " some"]:
    """Offsets beside the vectors; out of pinned memory, since a copy of other memory may wait."""
    if device.type == "cpu":
        return offsets
    return offsets.pin_memory().to(device, non_blocking=True)
