"""The fused kernels, run by Triton's interpreter on the CPU: `test_cuda_kernels.py` starts this.

Triton decides when it is first imported whether kernels are compiled or interpreted, and torch
imports it, so these tests run in a process of their own:

    TRITON_INTERPRET=1 pytest tests/unit/maxsim/interpreted_kernels.py
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from colfolio.batch import MultiVectors, offsets_of
from colfolio.maxsim import cuda, maxsim_by_definition
from colfolio.maxsim.cuda import maxsim_fused
from colfolio.maxsim.tiled import maxsim_tiled

assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"

# documents around one and two of the blocks of 64 that a kernel takes, and a short one; more query
# vectors than the 128 or 64 of one program
QUERIES, DOCUMENTS = [3, 1, 100, 32], [64, 1, 65, 130]
row_lengths = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def _right_bfloat16(monkeypatch):
    """What a GPU does with bfloat16, where Triton's interpreter does not (seen in 3.9).

    It multiplies the bits as if they were integers, and cuts float32 off instead of rounding it.
    """
    multiply, cut_off = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, left, right, *others):
        return multiply(self, widened(left), widened(right), *others)

    def create_fp_trunc(self, wide, dtype):
        if dtype.scalar != tl.bfloat16:
            return cut_off(self, wide, dtype)
        rounded = torch.from_numpy(wide.data).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)


def draw(lengths, seed, dim=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), dim, generator=generator)
    return MultiVectors(vectors.to(dtype).requires_grad_(), offsets_of(lengths))


def draw_whole(lengths, seed, dim=3):
    """Vectors of few small whole numbers: no product is rounded, and most bests are ties."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-1, 2, (sum(lengths), dim), generator=generator).float()
    return MultiVectors(vectors.requires_grad_(), offsets_of(lengths))


def with_gradients(score, queries, documents):
    scores = score(queries, documents)
    weight = torch.arange(scores.numel(), dtype=scores.dtype).reshape(scores.shape) - 3
    return scores.detach(), *torch.autograd.grad(
        scores, [queries.vectors, documents.vectors], weight
    )


def assert_as_close(mine, plain, exact):
    """Each of mine is as close to the exact one as the plain one is, or nearly."""
    for ours, theirs, truth in zip(mine, plain, exact, strict=True):
        allowed = (theirs.double() - truth).abs().max() + 1e-6 * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * allowed


@pytest.mark.parametrize("dim", [1, 20, 96])
def test_float32_equals_the_definition_forward_and_backward(dim):
    sides = draw(QUERIES, 0, dim), draw(DOCUMENTS, 1, dim)
    exact = with_gradients(maxsim_by_definition, *(side.to(torch.float64) for side in sides))
    plain = with_gradients(maxsim_by_definition, *sides)
    assert_as_close(with_gradients(maxsim_fused, *sides), plain, exact)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 20), (torch.bfloat16, 130)])
def test_half_precision_is_rounded_no_more_than_in_tiles(dtype, dim):
    sides = draw([3, 130, 1], 0, dim, dtype), draw([1, 65, 20], 1, dim, dtype)
    exact = with_gradients(maxsim_by_definition, *(side.to(torch.float64) for side in sides))
    mine, plain = with_gradients(maxsim_fused, *sides), with_gradients(maxsim_tiled, *sides)
    assert [each.dtype for each in mine] == [torch.float32, dtype, dtype]
    assert_as_close(mine, plain, exact)


@settings(max_examples=12)
@given(row_lengths, row_lengths, st.integers(0, 99))
def test_ties_go_to_the_first_of_the_best_as_in_tiles(queries, documents, seed):
    sides = draw_whole(queries, seed), draw_whole(documents, seed + 100)
    for mine, tiled in zip(
        with_gradients(maxsim_fused, *sides), with_gradients(maxsim_tiled, *sides), strict=True
    ):
        assert torch.equal(mine, tiled)


def test_ties_go_to_the_first_of_the_best_across_blocks_too():
    sides = draw_whole(QUERIES, 0), draw_whole(DOCUMENTS, 1)
    for mine, tiled in zip(
        with_gradients(maxsim_fused, *sides), with_gradients(maxsim_tiled, *sides), strict=True
    ):
        assert torch.equal(mine, tiled)


@pytest.mark.parametrize("place", [0, 63, 128])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_wins_and_loses_as_in_tiles(value, place):
    sides = draw_whole([2, 1, 5], 0), draw_whole([20, 130, 2], 1)
    with torch.no_grad():
        sides[0].vectors.abs_().add_(1)  # so that infinity never meets its opposite, or zero
        sides[1].vectors[20 + place : 20 + place + 2] = value
    mine, tiled = (with_gradients(score, *sides) for score in (maxsim_fused, maxsim_tiled))
    for ours, theirs in zip(mine, tiled, strict=True):
        assert torch.equal(ours.nan_to_num(7e7), theirs.nan_to_num(7e7))
    if value != -torch.inf:
        assert not mine[0][:, 1].isfinite().any()
    assert mine[0][:, [0, 2]].isfinite().all()
    assert mine[2].isfinite().all()


@pytest.mark.parametrize("length", [3, 64, 130])
def test_where_every_similarity_is_minus_infinity_the_first_vector_wins(length):
    queries = MultiVectors(torch.ones(1, 2), torch.tensor([0, 1]))
    vectors = torch.full((length, 2), -torch.inf, requires_grad=True)
    scores = maxsim_fused(queries, MultiVectors(vectors, offsets_of([length])))
    scores.sum().backward()
    assert scores.item() == -torch.inf
    assert vectors.grad.sum(dim=1).tolist() == [2.0] + [0.0] * (length - 1)


def test_a_query_vector_that_is_not_a_number_spoils_its_own_query_alone():
    sides = draw([2, 1], 0), draw([3, 200], 1)
    clean = maxsim_fused(*sides)
    with torch.no_grad():
        sides[0].vectors[0] = torch.nan
    mine, tiled = (with_gradients(score, *sides) for score in (maxsim_fused, maxsim_tiled))
    assert mine[0][0].isnan().all()
    assert torch.equal(mine[0][1], clean[1])
    for ours, theirs in zip(mine, tiled, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("pairs", [1, 150])
def test_the_number_of_winners_sorted_at_once_never_changes_the_gradient(monkeypatch, pairs):
    sides = draw([9, 40], 0), draw([5, 1, 8, 20, 4, 70, 2], 1)
    at_once = with_gradients(maxsim_fused, *sides)
    monkeypatch.setattr(cuda, "_PAIRS", pairs)
    for mine, whole in zip(with_gradients(maxsim_fused, *sides), at_once, strict=True):
        assert torch.equal(mine, whole)


def test_scores_are_the_same_where_no_gradient_is_kept():
    sides = draw([3, 1, 4], 0), draw([2, 70], 1)
    with_graph = maxsim_fused(*sides)
    with torch.no_grad():
        assert torch.equal(maxsim_fused(*sides), with_graph)
    with torch.inference_mode():
        assert torch.equal(maxsim_fused(*sides), with_graph)


def test_another_document_in_the_batch_never_changes_a_score():
    queries, documents = draw([2, 5], 0), draw([4, 2, 70, 1], 1)
    every = maxsim_fused(queries, documents)
    for row in range(4):
        assert torch.equal(every[:, [row]], maxsim_fused(queries, documents.select([row])))


def test_sides_of_different_dtypes_are_scored_in_the_wider_and_keep_their_gradients_dtype():
    queries, documents = draw([3, 2], 0, dtype=torch.bfloat16), draw([4, 70], 1)
    mine, tiled = (
        with_gradients(each, queries, documents) for each in (maxsim_fused, maxsim_tiled)
    )
    assert mine[1].dtype == torch.bfloat16
    for ours, theirs in zip(mine, tiled, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vectors_that_do_not_lie_row_by_row_are_read_right():
    queries, documents = draw([3, 2], 0), draw([4, 3], 1)
    turned = [
        MultiVectors(side.vectors.detach().T.contiguous().T, side.offsets)
        for side in (queries, documents)
    ]
    assert torch.equal(maxsim_fused(*turned), maxsim_fused(queries, documents))


def test_a_gradient_that_is_one_number_seen_many_times_is_read_right():
    sides = draw([2, 5], 0), draw([4, 3, 1], 1)
    leaves = [side.vectors for side in sides]
    mine, tiled = (
        torch.autograd.grad(score(*sides).sum(), leaves) for score in (maxsim_fused, maxsim_tiled)
    )
    for ours, theirs in zip(mine, tiled, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_side_that_wants_a_gradient_gets_one():
    queries, documents = draw([2], 0), draw([3], 1)
    documents.vectors.requires_grad_(False)
    maxsim_fused(queries, documents).sum().backward()
    assert queries.vectors.grad is not None
    assert documents.vectors.grad is None
    queries.vectors.requires_grad_(False)
    documents.vectors.requires_grad_()
    queries.vectors.grad = None
    maxsim_fused(queries, documents).sum().backward()
    assert queries.vectors.grad is None
    assert documents.vectors.grad is not None


def test_no_queries_or_no_documents_give_an_empty_matrix():
    nothing = MultiVectors(torch.empty(0, 5), torch.zeros(1, dtype=torch.int64))
    some = draw([2, 2], 0)
    for sides, shape in (((nothing, some), (0, 2)), ((some, nothing), (2, 0))):
        some.vectors.grad = None
        scores = maxsim_fused(*sides)
        assert scores.shape == shape
        scores.sum().backward()
        assert torch.equal(some.vectors.grad, torch.zeros_like(some.vectors))


def test_a_gradient_of_the_gradient_is_refused():
    queries, documents = draw([2], 0), draw([3], 1)
    scores = maxsim_fused(queries, documents)
    (gradient,) = torch.autograd.grad((scores**2).sum(), queries.vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_has_no_scores_is_refused():
    with pytest.raises(ValueError, match="query 1 has no vectors"):
        maxsim_fused(draw([1, 0], 0), draw([1], 0))
    with pytest.raises(ValueError, match="document 2 has no vectors"):
        maxsim_fused(draw([1], 0), draw([1, 2, 0], 0))
    with pytest.raises(ValueError, match="query vectors have 5 dimensions, document vectors 4"):
        maxsim_fused(draw([1], 0), draw([1], 0, dim=4))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        maxsim_fused(draw([1], 0), draw([1], 0, dtype=torch.float64))
    with pytest.raises(ValueError, match="query vectors are on cpu, document vectors on meta"):
        maxsim_fused(draw([1], 0), draw([1], 0).to("meta"))
