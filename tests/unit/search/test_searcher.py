import numpy as np
import pytest
import torch

from colfolio.batch import MultiVectors
from colfolio.data.pages.views import page_views
from colfolio.errors import ColfolioError
from colfolio.maxsim import maxsim_by_definition
from colfolio.search import IndexSettings, Searcher, SourcePage, build_index, searcher
from colfolio.search.index import View

QUERIES = ["10,20,30 200,1,2 0,0,0", "255,255,255", "7,7,7 1,2,3 9,9,9 4,4,4 100,20,3", "a b"]
EXACT = IndexSettings(views="tiles", dtype="float32")


def brute_force(encoder, pages, kind, page_score) -> torch.Tensor:
    queries = encoder.encode_queries(QUERIES)
    columns = []
    for page in pages:
        rows = encoder.encode_documents([view.image for view in page_views(page.image, kind)])
        if page_score == "union":
            rows = MultiVectors.from_list([rows.vectors])
        columns.append(maxsim_by_definition(queries, rows).amax(dim=1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("page_score", ["best", "union"])
def test_scores_are_those_of_the_definition(tmp_path, encoder, pages, page_score):
    build_index(encoder, pages, tmp_path / "index", EXACT)
    found = Searcher(tmp_path / "index", encoder, page_score).search_many(QUERIES)
    wanted = brute_force(encoder, pages, "tiles", page_score)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("page_score", ["best", "union"])
def test_chunks_never_change_the_scores(tmp_path, encoder, pages, page_score, monkeypatch):
    build_index(encoder, pages, tmp_path / "index", EXACT)
    opened = Searcher(tmp_path / "index", encoder, page_score)
    whole = opened.search_many(QUERIES)
    monkeypatch.setattr(searcher, "_CHUNK_VECTORS", 1)
    monkeypatch.setattr(searcher, "_CHUNK_CELLS", 1)
    torch.testing.assert_close(opened.search_many(QUERIES), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("page_score", ["best", "union"])
def test_hits_are_the_best_pages_in_order(tmp_path, encoder, pages, page_score):
    build_index(encoder, pages, tmp_path / "index", EXACT)
    opened = Searcher(tmp_path / "index", encoder, page_score)
    wanted = brute_force(encoder, pages, "tiles", page_score)
    for row, query in enumerate(QUERIES):
        hits = opened.search(query, top_k=4)
        order = np.argsort(-wanted[row].numpy(), kind="stable")[:4]
        assert [(hit.document, hit.page) for hit in hits] == [
            (pages[page].document, pages[page].page) for page in order
        ]
        np.testing.assert_allclose([hit.score for hit in hits], wanted[row][order], atol=1e-5)


def test_the_hit_names_the_best_view(tmp_path, encoder, pages):
    build_index(encoder, pages, tmp_path / "index", EXACT)
    query = encoder.encode_queries([QUERIES[0]])
    for page_score in ("best", "union"):
        hit = Searcher(tmp_path / "index", encoder, page_score).search(QUERIES[0])[0]
        page = next(
            page for page in pages if (page.document, page.page) == (hit.document, hit.page)
        )
        views = page_views(page.image, "tiles")
        scores = maxsim_by_definition(
            query, encoder.encode_documents([view.image for view in views])
        )
        assert hit.view == int(scores[0].argmax())
        assert hit.box == pytest.approx(views[hit.view].box)


def test_equal_scores_come_in_the_order_of_the_index(tmp_path, encoder, pages):
    images = [pages[row].image for row in (0, 1, 3)]
    same = [SourcePage("a", number, images[number * 7 % 3]) for number in range(300)]
    build_index(encoder, same, tmp_path / "index", IndexSettings())
    hits = Searcher(tmp_path / "index", encoder).search("1,2,3", top_k=300)
    assert len({hit.score for hit in hits}) > 1
    keys = [(-hit.score, hit.page_id) for hit in hits]
    assert keys == sorted(keys)


def test_batches_never_change_the_hits(tmp_path, encoder, pages):
    found = []
    for batch_tokens in (1, 7, 10_000):
        settings = IndexSettings(views="tiles", batch_tokens=batch_tokens)
        build_index(encoder, pages, tmp_path / f"index-{batch_tokens}", settings)
        opened = Searcher(tmp_path / f"index-{batch_tokens}", encoder)
        found.append([opened.search(query) for query in QUERIES])
    assert found[0] == found[1] == found[2]


def test_one_query_scores_as_among_many(tmp_path, encoder, pages):
    build_index(encoder, pages, tmp_path / "index", EXACT)
    opened = Searcher(tmp_path / "index", encoder)
    many = opened.search_many(QUERIES)
    for row, query in enumerate(QUERIES):
        torch.testing.assert_close(opened.search_many([query])[0], many[row], rtol=0, atol=1e-5)


def test_float16_scores_are_off_by_at_most_a_thousandth_a_query_vector(tmp_path, encoder, pages):
    build_index(encoder, pages, tmp_path / "half", IndexSettings())
    build_index(encoder, pages, tmp_path / "full", IndexSettings(dtype="float32"))
    half = Searcher(tmp_path / "half", encoder).search_many(QUERIES)
    full = Searcher(tmp_path / "full", encoder).search_many(QUERIES)
    lengths = encoder.encode_queries(QUERIES).lengths
    assert ((half - full).abs().amax(dim=1) <= 1e-3 * lengths).all()
    assert not torch.equal(half, full)


@pytest.mark.parametrize("page_score", ["best", "union"])
def test_a_page_without_views_is_no_hit_but_keeps_its_place(
    tmp_path, encoder, pages, page_score, monkeypatch
):
    blank = {1, 8}
    cut = {id(page.image): row for row, page in enumerate(pages)}

    def views_of(image, _kind):
        return [] if cut[id(image)] in blank else [View(image, (0.0, 0.0, 1.0, 1.0))]

    monkeypatch.setattr("colfolio.search.index.page_views", views_of)
    build_index(encoder, pages, tmp_path / "index", IndexSettings())
    opened = Searcher(tmp_path / "index", encoder, page_score)
    assert len(opened.pages) == len(pages)
    scores = opened.search_many(QUERIES)
    assert torch.isinf(scores).any(dim=0).nonzero().flatten().tolist() == sorted(blank)
    assert {hit.page_id for hit in opened.search("1,1,1", 99)} == set(range(len(pages))) - blank


def test_an_unknown_page_score_is_refused(tmp_path, encoder, pages):
    build_index(encoder, pages, tmp_path / "index", EXACT)
    with pytest.raises(ColfolioError, match="page_score must be best or union, not 'bset'"):
        Searcher(tmp_path / "index", encoder, "bset")


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_refused(tmp_path, encoder, pages, query):
    build_index(encoder, pages, tmp_path / "index", IndexSettings())
    opened = Searcher(tmp_path / "index", encoder)
    with pytest.raises(ColfolioError, match="query is empty"):
        opened.search(query)
    with pytest.raises(ColfolioError, match="query is empty"):
        opened.search_many(["1,1,1", query])


def test_top_k_below_one_is_refused(tmp_path, encoder, pages):
    build_index(encoder, pages, tmp_path / "index", IndexSettings())
    with pytest.raises(ColfolioError, match="at least 1, not 0"):
        Searcher(tmp_path / "index", encoder).search("1,1,1", top_k=0)
