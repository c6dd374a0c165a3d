import pytest
import torch

from colfolio.batch import MultiVectors, offsets_of
from colfolio.maxsim import maxsim, maxsim_by_definition, product


@pytest.fixture(autouse=True)
def probed_anew():
    product._has_onednn.cache_clear()
    yield
    product._has_onednn.cache_clear()


@pytest.fixture
def onednn_for_all(monkeypatch):
    monkeypatch.setattr(product, "_WORTH_ONEDNN", 0)


def draw(rows, dim=48, dtype=torch.float32, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_of(found, exact):
    return (found.double() - exact).abs().max()


@pytest.mark.usefixtures("onednn_for_all")
@pytest.mark.parametrize("rows", [(1, 1), (3, 70), (257, 31), (0, 4), (4, 0)])
def test_it_errs_no_more_than_mm(rows):
    left, right = draw(rows[0]), draw(rows[1], seed=1)
    found = product.inner_products(left, right)
    exact = left.double() @ right.double().T
    assert found.shape == rows
    if found.numel():
        assert error_of(found, exact) <= 2 * error_of(left @ right.T, exact) + 1e-7


@pytest.mark.usefixtures("onednn_for_all")
def test_strides_do_not_matter():
    left, right = draw(6, 96)[:, ::2], draw(48, 9).T
    torch.testing.assert_close(product.inner_products(left, right), left @ right.T)


@pytest.mark.usefixtures("onednn_for_all")
def test_float64_is_never_rounded():
    left, right = draw(5, dtype=torch.float64), draw(7, dtype=torch.float64)
    assert torch.equal(product.inner_products(left, right), left @ right.T)


def test_a_small_product_does_not_wait_for_onednn(monkeypatch):
    def never(left, right):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(product, "_onednn_product", never)
    left, right = draw(5), draw(7)
    assert torch.equal(product.inner_products(left, right), left @ right.T)


def missing(left, right):
    raise AttributeError("no such operator")


def refused(left, right):
    raise RuntimeError("not built with it")


def changed(left, right):
    raise TypeError("other arguments")


def wrong(left, right):
    return (left @ right.T) * 1.01


def turned(left, right):
    return right @ left.T


@pytest.mark.usefixtures("onednn_for_all")
@pytest.mark.parametrize("call", [missing, refused, changed, wrong, turned])
def test_mm_takes_over_where_the_private_call_fails_its_check(call, monkeypatch):
    monkeypatch.setattr(product, "_onednn_product", call)
    left, right = draw(5), draw(7)
    assert torch.equal(product.inner_products(left, right), left @ right.T)


@pytest.mark.parametrize("has_onednn", [True, False])
def test_scores_err_no_more_than_the_definition_with_either_product(has_onednn, monkeypatch):
    monkeypatch.setattr(product, "_WORTH_ONEDNN", 0)
    if not has_onednn:
        monkeypatch.setattr(product, "_onednn_product", missing)
    queries = MultiVectors(draw(40), offsets_of([8, 32]))
    documents = MultiVectors(draw(900, seed=1), offsets_of([200, 200, 450, 50]))
    exact = maxsim_by_definition(queries.to(torch.float64), documents.to(torch.float64))
    plain = error_of(maxsim_by_definition(queries, documents), exact)
    assert error_of(maxsim(queries, documents), exact) <= 2 * plain + 1e-6
