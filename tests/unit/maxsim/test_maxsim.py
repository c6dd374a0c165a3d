import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colfolio.batch import MultiVectors, offsets_of
from colfolio.maxsim import maxsim, maxsim_by_definition, tiled

row_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def draw(lengths, seed, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), dim, generator=generator, dtype=dtype)
    return MultiVectors(vectors.requires_grad_(), offsets_of(lengths))


def gradients(score, queries, documents):
    scores = score(queries, documents)
    weight = torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).reshape(scores.shape)
    (scores * weight).sum().backward()
    found = queries.vectors.grad, documents.vectors.grad
    queries.vectors.grad = documents.vectors.grad = None
    return scores, *found


@pytest.fixture(params=[1, 12, 1 << 21], ids=["one token a tile", "a few", "all in one"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tiled, "_TILE", request.param)


@given(row_lengths, row_lengths, st.integers(0, 99))
def test_it_equals_the_definition_forward_and_backward(queries, documents, seed):
    sides = draw(queries, seed), draw(documents, seed + 100)
    for mine, plain in zip(
        gradients(maxsim, *sides), gradients(maxsim_by_definition, *sides), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tile")
def test_the_size_of_a_tile_never_changes_scores_or_gradient():
    sides = draw([3, 1, 4], 0), draw([2, 2, 5, 5, 5, 1, 2], 1)
    for mine, plain in zip(
        gradients(maxsim, *sides), gradients(maxsim_by_definition, *sides), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tile")
def test_scores_are_the_same_where_no_gradient_is_kept():
    sides = draw([3, 1, 4], 0), draw([2, 2, 5, 1, 5, 5, 1, 2], 1)
    with_graph = maxsim(*sides)
    with torch.no_grad():
        assert torch.equal(maxsim(*sides), with_graph)
    with torch.inference_mode():
        assert torch.equal(maxsim(*sides), with_graph)


@given(row_lengths, st.integers(0, 99))
def test_the_order_of_documents_only_orders_the_scores(lengths, seed):
    queries, documents = draw([2, 3], seed), draw(lengths, seed + 100)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    turned = maxsim(queries, documents.select(order))
    torch.testing.assert_close(turned, maxsim(queries, documents)[:, order], rtol=1e-13, atol=1e-13)


# around one, two, three and more blocks, of which the last laps over the one before
LONG = [63, 64, 65, 129, 191, 192, 193, 255, 256, 257, 256, 192]


@pytest.mark.usefixtures("tile")
def test_long_documents_equal_the_definition_forward_and_backward():
    sides = draw([2, 1], 0), draw(LONG, 1)
    for mine, plain in zip(
        gradients(maxsim, *sides), gradients(maxsim_by_definition, *sides), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


@given(st.integers(180, 270), st.lists(st.integers(0, 10_000), min_size=1, max_size=5))
def test_the_first_of_equal_vectors_wins_in_long_documents_too(length, places):
    places = sorted({place % length for place in places})
    vectors = torch.full((length, 1), -1.0)
    vectors[places] = 1.0
    vectors.requires_grad_()
    query = MultiVectors(torch.ones(1, 1), torch.tensor([0, 1]))
    maxsim(query, MultiVectors(vectors, offsets_of([length]))).sum().backward()
    assert vectors.grad.flatten().nonzero().flatten().tolist() == places[:1]


def test_its_gradient_is_the_slope_of_its_scores_and_so_is_the_next():
    queries, documents = draw([2, 3], 3, dim=3), draw([3, 1, 2], 4, dim=3)

    def scores(query_vectors, document_vectors):
        return maxsim(
            MultiVectors(query_vectors, queries.offsets),
            MultiVectors(document_vectors, documents.offsets),
        )

    assert torch.autograd.gradcheck(scores, (queries.vectors, documents.vectors))
    assert torch.autograd.gradgradcheck(scores, (queries.vectors, documents.vectors))


def test_a_tie_sends_its_gradient_to_the_first_of_the_winners_alone():
    queries = MultiVectors(torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([0, 1]))
    twins = torch.tensor([[0.5, 1.0], [0.8, 2.0], [0.8, 3.0], [0.8, 4.0]], requires_grad=True)
    maxsim(queries, MultiVectors(twins, torch.tensor([0, 4]))).sum().backward()
    assert twins.grad.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]
    assert torch.equal(queries.vectors.grad, torch.tensor([[0.8, 2.0]]))


def test_the_best_of_only_negative_similarities_wins_over_an_imagined_zero():
    queries = MultiVectors(torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1]))
    documents = MultiVectors(
        torch.tensor([[-0.9, 0.0], [-0.2, 0.0], [-0.5, 0.0]]), torch.tensor([0, 2, 3])
    )
    torch.testing.assert_close(maxsim(queries, documents), torch.tensor([[-0.2, -0.5]]))


@pytest.mark.parametrize("length", [3, 200], ids=["short", "long"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_wins_and_spoils_its_own_document_alone(length, value):
    queries, documents = draw([2, 1], 0), draw([length, length, 2], 1)
    plain = gradients(maxsim, queries, documents)
    with torch.no_grad():
        queries.vectors.abs_()  # so that infinity never meets its opposite
        clean = maxsim(queries, documents)
        documents.vectors[length + 1 : length + 3] = value
    scores, for_queries, for_documents = gradients(maxsim, queries, documents)
    torch.testing.assert_close(scores[:, 1], torch.full_like(scores[:, 1], value), equal_nan=True)
    assert torch.equal(scores[:, [0, 2]], clean[:, [0, 2]])
    assert not for_queries.isfinite().any()
    assert for_documents.isfinite().all()
    of_spoiled = for_documents[length : 2 * length]
    assert of_spoiled.abs().sum(dim=1).nonzero().flatten().tolist() == [1]
    assert all(each.isfinite().all() for each in plain)


def test_a_query_vector_that_is_not_a_number_spoils_its_own_query_alone():
    queries, documents = draw([2, 1], 0), draw([3, 200], 1)
    with torch.no_grad():
        clean = maxsim(queries, documents)
        queries.vectors[0] = float("nan")
    scores, for_queries, _ = gradients(maxsim, queries, documents)
    assert scores[0].isnan().all()
    assert torch.equal(scores[1], clean[1])
    assert for_queries.isfinite().all()


@pytest.mark.parametrize("length", [3, 200], ids=["short", "long"])
def test_where_every_similarity_is_minus_infinity_the_first_vector_wins(length):
    queries = MultiVectors(torch.ones(1, 2), torch.tensor([0, 1]))
    vectors = torch.full((length, 2), -torch.inf, requires_grad=True)
    scores = maxsim(queries, MultiVectors(vectors, offsets_of([length])))
    scores.sum().backward()
    assert scores.item() == -torch.inf
    assert vectors.grad.sum(dim=1).tolist() == [2.0] + [0.0] * (length - 1)


def test_another_document_in_the_batch_never_changes_a_score():
    queries, documents = draw([2, 5], 0), draw([4, 2, 4, 1], 1)
    every = maxsim(queries, documents)
    for row in range(4):
        alone = maxsim(queries, documents.select([row]))
        torch.testing.assert_close(every[:, [row]], alone, rtol=1e-13, atol=1e-13)


def test_half_precision_vectors_are_scored_in_float32():
    queries, documents = draw([3], 0, dtype=torch.bfloat16), draw([3, 2], 1, dtype=torch.bfloat16)
    scores, *found = gradients(maxsim, queries, documents)
    exact = maxsim(queries.to(torch.float64), documents.to(torch.float64))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-6)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 2


def test_autocast_does_not_round_similarities_or_gradients():
    sides = draw([3, 4], 0, dtype=torch.float32), draw([3, 6], 1, dtype=torch.float32)
    plain = gradients(maxsim, *sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(maxsim, *sides)
    for mine, theirs in zip(inside, plain, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def test_float64_vectors_give_float64_scores():
    assert maxsim(draw([1], 0), draw([1], 1)).dtype == torch.float64


def test_only_the_side_that_wants_a_gradient_gets_one():
    queries, documents = draw([2], 0), draw([3], 1)
    documents.vectors.requires_grad_(False)
    maxsim(queries, documents).sum().backward()
    assert queries.vectors.grad is not None
    assert documents.vectors.grad is None
    queries.vectors.requires_grad_(False)
    documents.vectors.requires_grad_()
    queries.vectors.grad = None
    maxsim(queries, documents).sum().backward()
    assert queries.vectors.grad is None
    assert documents.vectors.grad is not None


def test_no_queries_or_no_documents_give_an_empty_matrix():
    nothing = MultiVectors(
        torch.empty(0, 5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    )
    assert maxsim(nothing, draw([2, 2], 0)).shape == (0, 2)
    assert maxsim(draw([2, 2], 0), nothing).shape == (2, 0)
    documents = draw([2, 2], 0)
    maxsim(nothing, documents).sum().backward()
    assert torch.equal(documents.vectors.grad, torch.zeros_like(documents.vectors))
    maxsim(documents, nothing).sum().backward()
    assert torch.equal(documents.vectors.grad, torch.zeros_like(documents.vectors))


def test_a_row_without_vectors_is_named():
    with pytest.raises(ValueError, match="query 1 has no vectors"):
        maxsim(draw([1, 0], 0), draw([1], 0))
    with pytest.raises(ValueError, match="document 2 has no vectors"):
        maxsim(draw([1], 0), draw([1, 2, 0], 0))


def test_vectors_of_different_dimensions_are_named():
    with pytest.raises(ValueError, match="query vectors have 5 dimensions, document vectors 4"):
        maxsim(draw([1], 0), draw([1], 0, dim=4))
