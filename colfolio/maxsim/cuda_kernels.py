"""Triton kernels of MaxSim: best matches, their sums, and the gradients of both sides.

Letters: Q query vectors, D document vectors, n queries, m documents. Vectors lie row by row and
rows behind one another; offsets say where each query or document begins. Matrices of a document and
a query vector have a row a document, so that a program writes and reads neighbours. Products are
accumulated in float32, and no sum depends on the order in which programs run.

`no_type_check` keeps a checker of signatures, which wraps what it checks, away from Triton, which
compiles what it is given.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_vectors"])
@no_type_check
def find_best(
    queries,  # [Q, dim]
    documents,  # [D, dim]
    document_offsets,  # int64 [m + 1]
    best,  # out, float32 [m, Q]
    winners,  # out, int32 [m, Q]: which of all document vectors is the best
    num_vectors,  # Q
    dim: tl.constexpr,
    query_block: tl.constexpr,
    document_block: tl.constexpr,
    dim_block: tl.constexpr,
    keeps_winners: tl.constexpr,
):
    """The best similarity of a block of query vectors with one document, and where it is.

    Each place of a block of similarities keeps the best that it has seen and where the block of
    that one began, so that the places are compared with each other only once a document.
    """
    num_blocks = (num_vectors + query_block - 1) // query_block
    # neighbouring programs share a document, which then comes from the cache
    document = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * query_block + tl.arange(0, query_block)
    columns = tl.arange(0, document_block)
    dims = tl.arange(0, dim_block)
    is_row = rows < num_vectors
    begin = tl.load(document_offsets + document)
    length = (tl.load(document_offsets + document + 1) - begin).to(tl.int32)
    whole = length - length % document_block

    left = queries + rows[:, None].to(tl.int64) * dim + dims[None, :]
    right = documents + begin * dim + columns[:, None] * dim + dims[None, :]
    held = tl.load(left, mask=is_row[:, None] & (dims < dim)[None, :], other=0.0)
    highest = tl.full([query_block, document_block], float("-inf"), tl.float32)
    at = tl.full([query_block, document_block], 0, tl.int32)
    for first in range(0, whole, document_block):
        is_column = columns < document_block
        similarity = _multiply(held, left, is_row, right + first * dim, is_column, dim, dim_block)
        highest, at = _keep_better(highest, at, similarity, first)
    if whole < length:
        is_column = columns < length - whole
        similarity = _multiply(held, left, is_row, right + whole * dim, is_column, dim, dim_block)
        similarity = tl.where(is_column[None, :], similarity, float("-inf"))
        highest, at = _keep_better(highest, at, similarity, whole)

    row_best, is_spoiled = _best_of_places(highest)
    to = document * num_vectors + rows
    tl.store(best + to, row_best, mask=is_row)
    if keeps_winners:
        places = tl.where(highest == row_best[:, None], at + columns[None, :], 2147483647)
        winner = tl.min(places, axis=1)
        if tl.max(is_spoiled.to(tl.int32), axis=0) > 0:
            spoiled = _first_spoiled(
                held, left, is_row, right, length, dim, document_block, dim_block
            )
            winner = tl.minimum(winner, spoiled)
        tl.store(winners + to, begin + winner, mask=is_row)


@triton.jit
@no_type_check
def _best_of_places(highest):
    """The best similarity of each row, and whether it is not a number."""
    is_number = _is_number(highest)
    finite = tl.max(tl.where(is_number, highest, float("-inf")), axis=1)
    is_spoiled = tl.min(is_number.to(tl.int32), axis=1) == 0
    return tl.where(is_spoiled, float("nan"), finite), is_spoiled


@triton.jit
@no_type_check
def _first_spoiled(
    held,
    left,
    is_row,
    right,
    length,
    dim: tl.constexpr,
    document_block: tl.constexpr,
    dim_block: tl.constexpr,
):
    """Where in the document the first similarity that is not a number is, or the largest int32.

    It is seldom asked for, so multiplying again costs less than remembering such places always.
    """
    columns = tl.arange(0, document_block)
    spoiled = tl.full(is_row.shape, 2147483647, tl.int32)
    for first in range(0, length, document_block):
        is_column = columns < length - first
        similarity = _multiply(held, left, is_row, right + first * dim, is_column, dim, dim_block)
        # an infinite query vector spoils columns past the end too; their places are beyond every
        # winner's, so that the least is never one of them
        places = tl.where(_is_number(similarity), 2147483647, first + columns[None, :])
        spoiled = tl.minimum(spoiled, tl.min(places, axis=1))
    return spoiled


@triton.jit
@no_type_check
def _multiply(held, left, is_row, right, is_column, dim: tl.constexpr, dim_block: tl.constexpr):
    """Similarities of query vectors, whose first dimensions are held, with document vectors."""
    dims = tl.arange(0, dim_block)
    mask = is_column[:, None] & (dims < dim)[None, :]
    similarity = tl.dot(
        held, tl.trans(tl.load(right, mask=mask, other=0.0)), input_precision="ieee"
    )
    for start in range(dim_block, dim, dim_block):
        is_dim = (dims < dim - start)[None, :]
        more = tl.load(left + start, mask=is_row[:, None] & is_dim, other=0.0)
        vectors = tl.load(right + start, mask=is_column[:, None] & is_dim, other=0.0)
        similarity = tl.dot(more, tl.trans(vectors), similarity, input_precision="ieee")
    return similarity


@triton.jit
@no_type_check
def _keep_better(highest, at, similarity, first):
    """What is higher stays, and the first of equals; what is not a number is highest of all."""
    at = tl.where(similarity > highest, first, at)
    return tl.maximum(highest, similarity, propagate_nan=tl.PropagateNan.ALL), at


@triton.jit
@no_type_check
def _is_number(value):
    return value == value  # noqa: PLR0124 - what is not a number is unlike itself


@triton.jit(do_not_specialize=["num_vectors", "num_documents"])
@no_type_check
def sum_queries(
    best,  # float32 [m, Q]
    query_offsets,  # int64 [n + 1]
    scores,  # out, float32 [n, m]
    num_vectors,  # Q
    num_documents,  # m
    document_block: tl.constexpr,
    vector_block: tl.constexpr,
):
    """Scores of one query with a block of documents: sums over the query's vectors."""
    query = tl.program_id(0).to(tl.int64)
    documents = tl.program_id(1) * document_block + tl.arange(0, document_block).to(tl.int64)
    vectors = tl.arange(0, vector_block)
    is_document = documents < num_documents
    begin, end = tl.load(query_offsets + query), tl.load(query_offsets + query + 1)
    total = tl.full([document_block, vector_block], 0.0, tl.float32)
    for first in range(begin, end, vector_block):
        places = documents[:, None] * num_vectors + (first + vectors)[None, :]
        is_vector = (first + vectors < end)[None, :]
        total += tl.load(best + places, mask=is_document[:, None] & is_vector, other=0.0)
    to = scores + query * num_documents + documents
    tl.store(to, tl.sum(total, axis=1), mask=is_document)


@triton.jit(do_not_specialize=["num_vectors", "num_documents"])
@no_type_check
def add_winners(
    documents,  # [D, dim]
    winners,  # int32 [m, Q]
    weights,  # float32 [n, m]: gradient of the scores
    query_of,  # int32 [Q]: the query of each query vector
    gradient,  # out, [Q, dim]
    num_vectors,  # Q
    num_documents,  # m
    dim: tl.constexpr,
    vector_block: tl.constexpr,
    dim_block: tl.constexpr,
):
    """Gradient of a block of query vectors: the weighted sum of the vectors that they chose."""
    rows = tl.program_id(0) * vector_block + tl.arange(0, vector_block)
    dims = tl.program_id(1) * dim_block + tl.arange(0, dim_block)
    is_row, is_dim = rows < num_vectors, (dims < dim)[None, :]
    mask = is_row[:, None] & is_dim
    weight_of_row = (
        weights + tl.load(query_of + rows, mask=is_row, other=0).to(tl.int64) * num_documents
    )
    winner_of_row = winners + rows
    total = tl.full([vector_block, dim_block], 0.0, tl.float32)
    # unrolled, so that the vectors of several documents are under way at once
    for _ in tl.range(num_documents, loop_unroll_factor=4):
        won = tl.load(winner_of_row, mask=is_row, other=0).to(tl.int64)
        weight = tl.load(weight_of_row, mask=is_row, other=0.0)
        vectors = tl.load(documents + won[:, None] * dim + dims[None, :], mask=mask, other=0.0)
        total += weight[:, None] * vectors.to(tl.float32)
        winner_of_row += num_vectors
        weight_of_row += 1
    to = gradient + rows[:, None].to(tl.int64) * dim + dims[None, :]
    tl.store(to, total, mask=mask)


@triton.jit(do_not_specialize=["first_document", "first_vector", "num_vectors", "num_documents"])
@no_type_check
def add_choosers(
    queries,  # [Q, dim]
    pairs,  # int64: pairs of a document and a query vector, counted from first_document, by winner
    starts,  # int32: where the pairs of each document vector, from first_vector on, begin
    weights,  # float32 [n, m]: gradient of the scores
    query_of,  # int32 [Q]: the query of each query vector
    gradient,  # out, [D, dim]
    first_document,
    first_vector,
    num_vectors,  # Q
    num_documents,  # m
    dim: tl.constexpr,
    pair_block: tl.constexpr,
    dim_block: tl.constexpr,
):
    """Gradient of one document vector: the weighted sum of the query vectors that chose it."""
    vector = tl.program_id(0)
    dims = tl.program_id(1) * dim_block + tl.arange(0, dim_block)
    is_dim = dims < dim
    begin, end = tl.load(starts + vector), tl.load(starts + vector + 1)
    total = tl.full([pair_block, dim_block], 0.0, tl.float32)
    for first in range(begin, end, pair_block):
        places = first + tl.arange(0, pair_block)
        is_pair = places < end
        # as int32: the pairs sorted at once are few enough, and dividing int64 is slow
        pair = tl.load(pairs + places, mask=is_pair, other=0).to(tl.int32)
        row = (pair % num_vectors).to(tl.int64)
        document = first_document + pair // num_vectors
        query = tl.load(query_of + row, mask=is_pair, other=0).to(tl.int64)
        weight = tl.load(weights + query * num_documents + document, mask=is_pair, other=0.0)
        chosen_by = queries + row[:, None] * dim + dims[None, :]
        vectors = tl.load(chosen_by, mask=is_pair[:, None] & is_dim[None, :], other=0.0)
        total += weight[:, None] * vectors.to(tl.float32)
    to = gradient + (first_vector + vector).to(tl.int64) * dim + dims
    tl.store(to, tl.sum(total, axis=0), mask=is_dim)
