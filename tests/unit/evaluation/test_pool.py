import math
import tracemalloc

import numpy as np
import pytest
import torch

from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.relations import Relations
from colfolio.errors import DatasetError
from colfolio.evaluation import draw_pool, mean_metrics, model_scores, relevance_of
from colfolio.evaluation.pool import POOL_SIZE, pool_loss, validation_metrics

from .conftest import WidthEncoder, encode_png

SIZE = 80
PAGES = 20  # of four parts each
PICTURE = encode_png(np.zeros((2, 2, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Eighty parts of twenty pages; query n asks for part n, query 0 for part 7 as well."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [CorpusRow(f"c{n}", PICTURE, "book.pdf", n % PAGES) for n in range(SIZE)]
    queries = [Query(f"q{n}", f"part {n}") for n in range(SIZE)]
    qrels = {f"q{n}": {f"c{n}": 1} for n in range(SIZE)}
    qrels["q0"]["c7"] = 1
    write_split(folder, "validation", rows, queries, qrels)
    return load_dataset(folder, "validation")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """As above, with questions that are asked twice, judged negatives on a page, and two rows out.

    Nothing answers query 78 but a page that all documents of query 79 stand on.
    """
    folder = tmp_path_factory.mktemp("crowded")
    rows = [CorpusRow(f"c{n}", PICTURE, "book.pdf", n % PAGES) for n in range(SIZE)]
    queries = [Query(f"q{n}", f"Part {n % 60}" if n % 2 else f"part {n % 60}") for n in range(SIZE)]
    qrels = {f"q{n}": {f"c{n}": 1} for n in range(SIZE)}
    qrels["q3"] |= {"c23": 0, "c43": 0, "c9": 1}
    qrels["q5"] |= {f"c{n}": 1 for n in range(30, 50)}
    qrels["q79"] = {f"c{n}": 1 for n in range(SIZE)}
    write_split(folder, "validation", rows, queries, qrels)
    return load_dataset(folder, "validation")


def negatives_of(pool):
    return [sorted(row) for row in pool.negatives.tolist()]


def drawn_from_lists(dataset, size):
    """The definition: of each query that takes part, so many of all its negatives, as drawn."""
    masks = Relations(dataset, "page").masks(
        range(len(dataset.queries)), np.arange(len(dataset.corpus))
    )
    positives, ignored = (mask.numpy() for mask in masks)
    drawn = {}
    for query in np.flatnonzero(positives.any(axis=1)).tolist():
        negatives = np.flatnonzero(~(positives | ignored)[query])
        generator = np.random.default_rng((0, query))
        drawn[query] = generator.choice(negatives, size, replace=False).tolist()
    return drawn, [np.flatnonzero(row).tolist() for row in positives if row.any()]


def test_each_query_has_the_same_number_of_negatives_none_on_the_page_of_an_answer(parts):
    pool = draw_pool(parts, 50)
    assert (pool.size, pool.num_queries) == (50, SIZE)
    for query, rows in enumerate(negatives_of(pool)):
        answers = {query, 7} if query == 0 else {query}
        assert len(rows) == 50
        assert not {row % PAGES for row in rows} & {row % PAGES for row in answers}
        assert pool.answers[query].tolist() == sorted(answers)


def test_the_negatives_are_those_of_a_draw_from_a_list_of_all(parts, crowded):
    for dataset, size in ((parts, 50), (parts, 1), (crowded, 20)):
        pool = draw_pool(dataset, size)
        drawn, answers = drawn_from_lists(dataset, size)
        assert dict(zip(pool.queries.tolist(), pool.negatives.tolist(), strict=True)) == drawn
        assert [rows.tolist() for rows in pool.answers] == answers
    assert 0 < draw_pool(crowded).num_queries < SIZE


def test_a_pool_has_no_number_for_every_query_and_document(tmp_path):
    count = 6_000  # whose pairs would be 36 MB
    rows = [CorpusRow(f"c{n}", PICTURE, "book.pdf", n) for n in range(count)]
    queries = [Query(f"q{n}", f"part {n}") for n in range(count)]
    write_split(tmp_path, "train", rows, queries, {f"q{n}": {f"c{n}": 1} for n in range(count)})
    dataset = load_dataset(tmp_path, "train")
    tracemalloc.start()
    pool = draw_pool(dataset)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pool.num_queries == count
    assert most < 18e6


def test_the_pool_is_the_same_whenever_it_is_drawn_and_differs_between_queries(parts):
    first, again = negatives_of(draw_pool(parts, 50)), negatives_of(draw_pool(parts, 50))
    assert first == again
    assert len({tuple(rows) for rows in first}) == SIZE


def test_all_documents_of_the_corpus_come_up(parts):
    drawn = {row for rows in negatives_of(draw_pool(parts, 10)) for row in rows}
    assert drawn == set(range(SIZE))


def test_the_loss_is_the_definition_and_at_chance_for_equal_scores(parts):
    pool = draw_pool(parts, 50)
    scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    losses = []
    for query, rows in enumerate(negatives_of(pool)):
        answers = [0, 7] if query == 0 else [query]  # of two numbers of answers
        against = [math.exp(scores[query, row] / 0.5) for row in rows]
        wanted = [math.exp(scores[query, row] / 0.5) for row in answers]
        losses.append(np.mean([math.log(1 + sum(against) / each) for each in wanted]))
    assert pool_loss(scores, pool, 0.5) == pytest.approx(np.mean(losses))
    assert pool_loss(torch.full((SIZE, SIZE), 3.0), pool) == pytest.approx(math.log(51))
    assert pool.chance == pytest.approx(math.log(51))


def test_scores_outside_of_the_pool_never_change_the_loss(parts):
    pool = draw_pool(parts, 50)
    scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    noisy = torch.full_like(scores, float("nan"))
    for query, negatives in enumerate(pool.negatives):
        own = torch.cat([negatives, torch.from_numpy(pool.answers[query])])
        noisy[query, own] = scores[query, own]
    assert pool_loss(noisy, pool) == pool_loss(scores, pool)


def test_without_a_size_it_is_64_or_as_many_as_every_query_has(parts, strips):
    assert POOL_SIZE == 64
    assert draw_pool(parts).size == 64
    assert draw_pool(strips).size == 3


def test_more_negatives_than_a_query_has_are_refused(parts):
    # query 0 has answers on two pages of four parts each
    with pytest.raises(DatasetError, match=r"validation.pool is 73, but a query has only 72"):
        draw_pool(parts, 73)
    assert draw_pool(parts, 72).size == 72


def test_a_split_with_nothing_to_tell_an_answer_from_is_refused(tmp_path):
    row, query = CorpusRow("c", PICTURE, "a.pdf"), Query("q", "text")
    write_split(tmp_path, "validation", [row], [query], {"q": {"c": 1}})
    with pytest.raises(DatasetError, match="no query has a document that does not answer it"):
        draw_pool(load_dataset(tmp_path, "validation"))


def test_metrics_and_loss_are_of_the_same_scores(strips):
    encoder, pool = WidthEncoder(), draw_pool(strips)
    scores = model_scores(encoder, strips)
    found = validation_metrics(encoder, strips, pool, 0.1, ["ndcg@5", "mrr"])
    assert found == mean_metrics(scores, relevance_of(strips), ["ndcg@5", "mrr"]) | {
        "loss": pool_loss(scores, pool, 0.1),
        "chance": math.log(4),
        "negatives": 3.0,
    }
