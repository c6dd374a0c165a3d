"""The gradient of a batch is the same however it is cut into chunks and whatever is kept."""

import pytest
import torch
import torch.nn.functional as F

from colfolio.batch import ContrastiveBatch
from colfolio.maxsim import maxsim
from colfolio.models.checkpoint import cast_parameters
from colfolio.training.exact_batch import MemorySettings, exact_backward
from colfolio.training.losses import LossSettings, info_nce

ONE, TWO = 1, 300  # tokens: every row alone, and a few rows together
SIZES = [ONE, 20, 60, TWO, None]
BUDGETS = [None, 0, 0.05, 0.5, 50]  # mebibytes: all graphs, none, some, all again


@pytest.fixture
def batch(retriever, texts, pages):
    """Six queries and seven documents: two are positives of none, and some are ignored."""
    positives = torch.zeros(len(texts), len(pages), dtype=torch.bool)
    positives[range(6), [0, 1, 2, 3, 4, 4]] = True
    ignored = torch.zeros_like(positives)
    ignored[0, 6] = ignored[4, 5] = True
    collator = retriever.collator
    return ContrastiveBatch(collator.queries(texts), collator.documents(pages), positives, ignored)


def loss_of(batch):
    return lambda scores: info_nce(scores, batch.positives, batch.ignored, LossSettings())


def gradients(retriever):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in retriever.named_parameters()
    }


def plainly(retriever, batch):
    """The definition: everything in one graph."""
    retriever.zero_grad()
    summary = loss_of(batch)(maxsim(retriever(batch.queries), retriever(batch.documents)))
    summary.loss.backward()
    return summary, gradients(retriever)


def exactly(retriever, batch, chunk_tokens=None, graph_mb=None, seed=0):
    retriever.zero_grad()
    settings = MemorySettings(chunk_tokens=chunk_tokens, graph_mb=graph_mb)
    summary = exact_backward(
        retriever, retriever.parameters(), batch, loss_of(batch), settings, seed
    )
    return summary, gradients(retriever)


def assert_close(mine, theirs, share):
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= share * total, name


@pytest.fixture
def count_runs(retriever):
    """How many times the model ran since it was last asked."""
    runs = []
    retriever.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def count():
        found = (runs.count(False), runs.count(True))
        runs.clear()
        return found

    return count


@pytest.mark.parametrize("graph_mb", BUDGETS)
@pytest.mark.parametrize("chunk_tokens", SIZES)
def test_chunk_size_and_budget_never_change_the_gradient(retriever, batch, chunk_tokens, graph_mb):
    cast_parameters(retriever, torch.float64)
    plain, expected = plainly(retriever, batch)
    summary, mine = exactly(retriever, batch, chunk_tokens, graph_mb)
    torch.testing.assert_close(summary.loss, plain.loss, rtol=1e-13, atol=0)
    assert_close(mine, expected, 1e-12)


@pytest.mark.parametrize("graph_mb", [None, 0])
@pytest.mark.parametrize("chunk_tokens", [ONE, 60])
def test_in_float32_the_difference_is_that_of_rounding(retriever, batch, chunk_tokens, graph_mb):
    _, expected = plainly(retriever, batch)
    _, mine = exactly(retriever, batch, chunk_tokens, graph_mb)
    assert_close(mine, expected, 1e-6)


@pytest.mark.parametrize("graph_mb", [0, 0.05])
def test_a_chunk_that_runs_twice_drops_the_same_both_times(retriever, batch, graph_mb):
    cast_parameters(retriever, torch.float64)
    retriever.backbone.language_model.embed_tokens.register_forward_hook(
        lambda _, __, embedded: F.dropout(embedded, 0.3)
    )
    summary, expected = exactly(retriever, batch, 60, None, seed=3)
    again, mine = exactly(retriever, batch, 60, graph_mb, seed=3)
    assert torch.equal(again.loss, summary.loss)
    assert_close(mine, expected, 1e-12)
    other, _ = exactly(retriever, batch, 60, graph_mb, seed=4)
    assert other.loss != summary.loss


def test_chunks_of_one_side_drop_different_numbers(retriever, batch):
    drawn = []
    retriever.register_forward_hook(lambda *_: drawn.append(float(torch.rand(()))))
    exactly(retriever, batch, ONE)
    assert len(set(drawn)) == len(drawn) == 13


def test_the_generator_of_the_caller_is_left_as_it_was(retriever, batch):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    exactly(retriever, batch, 60, 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_that_fits_costs_one_pass(retriever, batch, count_runs):
    for graph_mb in (None, 1e3):
        exactly(retriever, batch, ONE, graph_mb)
        assert count_runs() == (0, 13)
    exactly(retriever, batch, ONE, 0)
    assert count_runs() == (13, 13)


def test_a_budget_keeps_as_many_graphs_as_fit(retriever, batch, count_runs):
    twice = []
    for graph_mb in (0, 0.2, 0.5, 1, 2, 4, 1e3):
        exactly(retriever, batch, ONE, graph_mb)
        without, with_graph = count_runs()
        twice.append(without + with_graph - 13)
    assert twice == sorted(twice, reverse=True)
    assert twice[0] == 13
    assert twice[-1] == 0
    assert len(set(twice)) > 3


@pytest.mark.parametrize("chunk_tokens", [ONE, 60, TWO])
def test_no_chunk_has_more_tokens_than_asked_but_one_long_row(retriever, batch, chunk_tokens):
    seen = []
    retriever.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    exactly(retriever, batch, chunk_tokens)
    assert sum(len(packed) for packed in seen) == 13
    for packed in seen:
        assert len(packed) == 1 or len(packed.token_ids) <= chunk_tokens
