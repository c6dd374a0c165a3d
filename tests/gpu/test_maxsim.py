"""On a GPU: the fused kernels equal the definition, wait for nothing and hold no similarities."""

import pytest
import torch

from colfolio.batch import MultiVectors, offsets_of
from colfolio.maxsim import maxsim, maxsim_by_definition
from colfolio.maxsim.tiled import maxsim_tiled

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

# more than one program of query vectors; documents around one and many blocks of vectors
QUERIES, DOCUMENTS = [32, 1, 7, 130, 20, 64], [64, 1, 65, 768, 63, 2, 500, 129]


@pytest.fixture(autouse=True)
def _needs_a_gpu_with_kernels():
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("the kernels are for Ampere and later")


def draw(lengths, seed, dim=128, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), dim, generator=generator)
    return MultiVectors(vectors.to("cuda", dtype).requires_grad_(), offsets_of(lengths))


def draw_whole(lengths, seed, dim=3):
    """Vectors of few small whole numbers: no product is rounded, and most bests are ties."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-1, 2, (sum(lengths), dim), generator=generator).float()
    return MultiVectors(vectors.to("cuda").requires_grad_(), offsets_of(lengths))


def with_gradients(score, queries, documents):
    scores = score(queries, documents)
    weight = torch.arange(scores.numel(), dtype=scores.dtype, device="cuda").view_as(scores) - 3
    leaves = [queries.vectors, documents.vectors]
    return scores.detach(), *torch.autograd.grad(scores, leaves, weight)


@pytest.mark.parametrize("dim", [1, 20, 96, 128, 130, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_rounded_no_more_than_in_tiles(dtype, dim):
    sides = draw(QUERIES, 0, dim, dtype), draw(DOCUMENTS, 1, dim, dtype)
    exact = with_gradients(maxsim_by_definition, *(side.to(torch.float64) for side in sides))
    mine, plain = with_gradients(maxsim, *sides), with_gradients(maxsim_tiled, *sides)
    assert [each.dtype for each in mine] == [torch.float32, dtype, dtype]
    for ours, theirs, truth in zip(mine, plain, exact, strict=True):
        allowed = (theirs.double() - truth).abs().max() + 2e-6 * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * allowed


def test_float32_is_not_multiplied_in_tf32_where_torch_may():
    sides = draw(QUERIES, 0), draw(DOCUMENTS, 1)
    exact = maxsim_by_definition(*(side.to(torch.float64) for side in sides))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        mine = maxsim(*sides)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (mine.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_ties_go_to_the_first_of_the_best_as_in_tiles():
    sides = draw_whole(QUERIES, 0), draw_whole(DOCUMENTS, 1)
    for mine, tiled in zip(
        with_gradients(maxsim, *sides), with_gradients(maxsim_tiled, *sides), strict=True
    ):
        assert torch.equal(mine, tiled)


@pytest.mark.parametrize("place", [0, 63, 128])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_wins_and_loses_as_in_tiles(value, place):
    sides = draw_whole([2, 1, 5], 0), draw_whole([20, 130, 2], 1)
    with torch.no_grad():
        sides[0].vectors.abs_().add_(1)  # so that infinity never meets its opposite, or zero
        sides[1].vectors[20 + place : 20 + place + 2] = value
    mine, tiled = (with_gradients(score, *sides) for score in (maxsim, maxsim_tiled))
    for ours, theirs in zip(mine, tiled, strict=True):
        assert torch.equal(ours.nan_to_num(7e7), theirs.nan_to_num(7e7))
    assert mine[0][:, [0, 2]].isfinite().all()


def test_the_gradient_is_the_same_every_time():
    sides = draw(QUERIES, 0), draw_whole(DOCUMENTS, 1, dim=128)
    first = with_gradients(maxsim, *sides)
    for _ in range(3):
        for again, once in zip(with_gradients(maxsim, *sides), first, strict=True):
            assert torch.equal(again, once)


def test_nothing_waits_for_the_device():
    sides = draw(QUERIES, 0), draw(DOCUMENTS, 1)
    with_gradients(maxsim, *sides)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(maxsim, *sides)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarities_are_never_held(dtype):
    sides = draw([32] * 64, 0, dtype=dtype), draw([768] * 64, 1, dtype=dtype)
    similarities = 32 * 64 * 768 * 64 * torch.finfo(dtype).bits // 8
    with_gradients(maxsim, *sides)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(maxsim, *sides)
    assert torch.cuda.max_memory_allocated() - before < similarities / 4


def test_tiles_equal_the_definition_on_a_gpu_too():
    sides = draw(QUERIES, 0, dtype=torch.float64), draw(DOCUMENTS, 1, dtype=torch.float64)
    for mine, plain in zip(
        with_gradients(maxsim, *sides), with_gradients(maxsim_by_definition, *sides), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)


def test_vectors_on_another_device_than_the_current_are_scored_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sides = draw(QUERIES, 0), draw(DOCUMENTS, 1)
    there = [MultiVectors(side.vectors.detach().to("cuda:1"), side.offsets) for side in sides]
    torch.testing.assert_close(maxsim(*there).cpu(), maxsim(*sides).detach().cpu())


def test_sides_on_different_devices_are_refused():
    queries, documents = draw([2], 0), draw([3], 1)
    with pytest.raises(ValueError, match="query vectors are on cuda:0, document vectors on cpu"):
        maxsim(queries, documents.to("cpu"))
