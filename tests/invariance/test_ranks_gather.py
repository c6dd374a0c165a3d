"""What ranks exchange is the same as in one process, forward and backward."""

import pytest
import torch
from ranks import run_in_ranks
from torch import nn

from colfolio.batch import MultiVectors, offsets_of
from colfolio.distributed import World
from colfolio.errors import ColfolioError
from colfolio.maxsim import maxsim

DIM = 5


def rows_of(counts):
    """All ranks' rows, from which each takes its own."""
    generator = torch.Generator().manual_seed(len(counts))
    return torch.randn(sum(counts), DIM, dtype=torch.float64, generator=generator)


def own_of(every, world, counts):
    return every.split(counts)[world.rank].clone()


def plain_gradient(every, weights):
    """Of a loss in which each rank weighs all rows differently; weights `[ranks, rows, dim]`."""
    rows = every.clone().requires_grad_()
    torch.stack([(rows**3 * weight).sum() for weight in weights]).sum().backward()
    return rows.grad


def check_sum(world, counts, is_contiguous):
    """What follows differs between ranks, and the loss is their sum."""
    every = rows_of(counts)
    weights = torch.stack([every.roll(rank + 1, 0) for rank in range(world.size)])
    own = own_of(every, world, counts).requires_grad_()
    gathered = world.gather_rows(own, "sum")
    assert torch.equal(gathered, every)
    weighed = gathered if is_contiguous else gathered.t().contiguous().t()
    incoming = []
    gathered.register_hook(lambda gradient: incoming.append(gradient.is_contiguous()))
    weight = weights[world.rank] if is_contiguous else weights[world.rank].t().contiguous().t()
    (weighed**3 * weight).sum().backward()
    expected = own_of(plain_gradient(every, weights), world, counts)
    torch.testing.assert_close(own.grad, expected, rtol=1e-12, atol=1e-13)
    return incoming


def check_own(world, counts):
    """All ranks compute the same from the result, so their losses are one and the same."""
    every = rows_of(counts)
    own = own_of(every, world, counts).requires_grad_()
    (world.gather_rows(own, "own") ** 3 * every.roll(1, 0)).sum().backward()
    expected = own_of(plain_gradient(every, every.roll(1, 0)[None]), world, counts)
    torch.testing.assert_close(own.grad, expected, rtol=1e-12, atol=1e-13)


def check_kinds(world, counts):
    """Rows that carry no gradient, of any kind and shape."""
    every = rows_of(counts)
    for kind in (torch.int64, torch.bool, torch.bfloat16, torch.float32, torch.uint8):
        rows = (every * 3).to(kind)
        assert torch.equal(world.gather_rows(own_of(rows, world, counts), "own"), rows)
    assert torch.equal(world.gather_rows(own_of(every[:, 0], world, counts), "own"), every[:, 0])
    deep = every.view(-1, DIM, 1, 1).expand(-1, -1, 2, 1)
    assert torch.equal(world.gather_rows(own_of(deep, world, counts), "own"), deep)
    assert len(world.gather_rows(torch.empty(0, 3), "own")) == 0


def check_gradient_wanted_by_one(world, counts):
    every = rows_of(counts)
    own = own_of(every, world, counts).requires_grad_(world.rank == 0)
    gathered = world.gather_rows(own, "sum")
    assert gathered.requires_grad
    gathered.sum().backward()
    if world.rank == 0:
        assert torch.equal(own.grad, torch.full_like(own, world.size))
    with torch.no_grad():
        assert not world.gather_rows(own, "sum").requires_grad


def check_scores(world, counts):
    """The scheme of a step: own queries against all documents, one loss on every rank."""
    every = torch.nn.functional.normalize(rows_of(counts), dim=1)
    lengths = torch.ones(len(every), dtype=torch.int64)
    own = own_of(every, world, counts).requires_grad_()
    documents = MultiVectors(world.gather_rows(own, "sum"), offsets_of(lengths))
    queries = MultiVectors(own, offsets_of(lengths[: len(own)]))
    scores = world.gather_rows(maxsim(queries, documents), "own")
    scores.logsumexp(dim=1).mean().backward()
    plain = every.clone().requires_grad_()
    both = MultiVectors(plain, offsets_of(lengths))
    expected = maxsim(both, both)
    expected.logsumexp(dim=1).mean().backward()
    torch.testing.assert_close(scores, expected, rtol=1e-13, atol=0)
    wanted = own_of(plain.grad, world, counts)
    torch.testing.assert_close(own.grad, wanted, rtol=1e-12, atol=1e-14)


def check_sum_of_gradients(world):
    """Of parameters that all, one or no ranks used; two dtypes; frozen; larger than a bucket."""
    sizes = [(3, 2), (4,), (2,), (5,), (7 * 2**20,)]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    all_use, one_uses, none_uses, frozen, large = parameters
    double = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    frozen.requires_grad_(False)
    total = sum(range(1, world.size + 1))
    all_use.grad = torch.full((3, 2), 1.0 + world.rank)
    large.grad = torch.full(sizes[4], 1.0 + world.rank)
    double.grad = torch.full((3,), 1.0 + world.rank, dtype=torch.float64)
    if world.rank == world.size - 1:
        one_uses.grad = torch.full((4,), 2.5)
    world.sum_gradients([*parameters, double])
    assert torch.equal(all_use.grad, torch.full((3, 2), float(total)))
    assert torch.equal(large.grad, torch.full(sizes[4], float(total)))
    assert torch.equal(double.grad, torch.full((3,), float(total), dtype=torch.float64))
    assert torch.equal(one_uses.grad, torch.full((4,), 2.5))
    assert none_uses.grad is None
    assert frozen.grad is None
    world.sum_gradients([none_uses])
    world.sum_gradients([])


def check_agreement(world):
    assert world.gather_counts(world.rank * 3) == [3 * rank for rank in range(world.size)]
    assert world.gather_objects({"rank": world.rank})[-1] == {"rank": world.size - 1}
    assert world.agree(True)
    assert not world.agree(world.rank != world.size - 1)
    assert world.is_main == (world.rank == 0)
    world.barrier()
    world.same_everywhere({"seed": 1}, "recipe")
    with pytest.raises(ColfolioError, match=r"same recipe: rank 0 has 1, rank 1 has 2"):
        world.same_everywhere(1 if world.rank == 0 else 2, "recipe")


def everything(world):
    """Many checks in one start of the processes, which is what takes long."""
    layouts = [[rank + 2 for rank in range(world.size)], [0, *[3] * (world.size - 1)]]
    layouts += [[4, *[0] * (world.size - 1)], [2] * world.size]
    for counts in layouts:
        assert check_sum(world, counts, is_contiguous=True) == [True]
        assert check_sum(world, counts, is_contiguous=False) == [False] or sum(counts) < 2
        check_sum(world, counts, is_contiguous=world.rank == 0)
        check_own(world, counts)
        check_kinds(world, counts)
        check_gradient_wanted_by_one(world, counts)
        check_scores(world, counts)
    check_sum_of_gradients(world)
    check_agreement(world)
    return world.rank


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_exchange_what_one_process_has(size, tmp_path):
    assert run_in_ranks(everything, size, tmp_path) == list(range(size))


def test_a_world_of_one_needs_no_process_group():
    world, rows = World(), torch.randn(3, 2, requires_grad=True)
    assert world.is_main
    assert world.gather_rows(rows, "sum") is rows
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    world.sum_gradients([parameter])
    assert torch.equal(parameter.grad, torch.ones(2))
    assert world.gather_counts(3) == [3]
    assert world.gather_objects("a") == ["a"]
    assert world.agree(True)
    assert not world.agree(False)
    world.same_everywhere(1, "recipe")
    world.barrier()


def fail_on_the_last(world):
    if world.rank == world.size - 1:
        raise KeyError("a fault of this rank")
    world.barrier()


@pytest.mark.slow
def test_a_failing_rank_shows_its_own_traceback(tmp_path):
    with pytest.raises(Exception, match=r"fail_on_the_last(.|\n)*a fault of this rank"):
        run_in_ranks(fail_on_the_last, 2, tmp_path)


def hang(world):
    if world.rank == 0:
        world.barrier()
        world.barrier()
    else:
        world.barrier()
        __import__("time").sleep(60)


@pytest.mark.slow
def test_ranks_that_hang_are_ended(tmp_path):
    with pytest.raises(TimeoutError, match="hang in 2 ranks"):
        run_in_ranks(hang, 2, tmp_path, timeout=15.0)
