from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colfolio.data.sampler import SamplerPosition, draws
from colfolio.errors import DatasetError

START = SamplerPosition()


def epoch(weights, rows, seed=0, number=0):
    batches = draws(weights, rows, seed, SamplerPosition(number, 0))
    return list(takewhile(lambda draw: draw.after.epoch == number, batches))


@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 3))
def test_every_query_comes_once_an_epoch(count, rows, number):
    if rows > count:
        return
    batches = epoch([1.0] * count, rows, number=number)
    drawn = [query for draw in batches for query in draw.queries]
    assert len(batches) == count // rows
    assert len(set(drawn)) == len(drawn) == count // rows * rows


def test_each_epoch_has_an_order_of_its_own():
    first, second = (epoch([1.0] * 12, 3, number=number) for number in (0, 1))
    assert [draw.queries for draw in first] != [draw.queries for draw in second]
    assert sorted(q for draw in first for q in draw.queries) == list(range(12))


def test_weights_are_expected_appearances_in_an_epoch():
    weights = [2.0, 1.0, 0.25, 0.0]
    counts = np.zeros(4)
    for number in range(400):
        for draw in epoch(weights, 1, number=number):
            counts[draw.queries] += 1
    assert counts[0] == 800
    assert counts[1] == 400
    assert 70 < counts[2] < 130
    assert counts[3] == 0


@given(st.integers(0, 5), st.integers(0, 14))
def test_going_on_from_any_position_equals_the_tail(seed, taken):
    weights = [1.0, 0.5, 2.0, 1.0, 0.3, 1.0, 1.0]
    whole = list(islice(draws(weights, 2, seed, START), 20))
    position = whole[taken - 1].after if taken else START
    for mine, theirs in zip(draws(weights, 2, seed, position), whole[taken:], strict=False):
        assert (mine.queries, mine.after) == (theirs.queries, theirs.after)
        assert mine.generator.random() == theirs.generator.random()
        if mine.after == whole[-1].after:
            break
    # generators were used up above, which a second drawing must not notice
    assert [draw.queries for draw in islice(draws(weights, 2, seed, START), 20)] == [
        draw.queries for draw in whole
    ]


def test_the_seed_decides_the_order():
    orders = [[draw.queries for draw in epoch([1.0] * 20, 4, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_every_batch_has_a_generator_of_its_own():
    numbers = [draw.generator.random() for draw in islice(draws([1.0] * 6, 2, 0, START), 9)]
    assert len(set(numbers)) == 9


@pytest.mark.parametrize("weights", [[1.0] * 3, [0.5] * 6, []])
def test_fewer_queries_than_rows_are_refused(weights):
    with pytest.raises(
        DatasetError,
        match=r"a batch has 4 queries.* only \d an epoch; set batch\.rows to \d or less",
    ):
        next(draws(weights, 4, 0, START))
