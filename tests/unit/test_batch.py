import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colfolio.batch import ContrastiveBatch, MultiVectors, Packed, offsets_of

lengths_of_rows = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def vectors_of(lengths, dim=3):
    return [torch.randn(length, dim) for length in lengths]


def packed(**changed):
    values = {
        "token_ids": torch.arange(5),
        "offsets": torch.tensor([0, 2, 5]),
        "position_ids": torch.zeros(3, 5, dtype=torch.int64),
        "patches": torch.zeros(4, 6),
        "grid_thw": torch.tensor([[1, 2, 2]]),
        "grid_offsets": torch.tensor([0, 0, 1]),
    }
    return Packed(**(values | changed))


@given(lengths_of_rows)
def test_rows_come_back_as_they_were_packed(lengths):
    rows = vectors_of(lengths)
    many = MultiVectors.from_list(rows)
    assert len(many) == len(rows)
    assert many.lengths.tolist() == lengths
    for mine, theirs in zip(many, rows, strict=True):
        assert torch.equal(mine, theirs)


@given(lengths_of_rows, lengths_of_rows)
def test_cat_keeps_all_rows_in_order(first, second):
    rows = vectors_of(first + second)
    parts = [MultiVectors.from_list(rows[: len(first)]), MultiVectors.from_list(rows[len(first) :])]
    together = MultiVectors.cat(parts)
    assert torch.equal(together.offsets, MultiVectors.from_list(rows).offsets)
    assert torch.equal(together.vectors, torch.cat(rows))


def test_a_row_is_counted_from_the_end_too_and_never_past_it():
    many = MultiVectors.from_list(vectors_of([1, 2, 3]))
    assert torch.equal(many[-1], many[2])
    for row in (3, -4):
        with pytest.raises(IndexError, match=f"row {row} of 3 rows"):
            many[row]


def test_select_gives_the_named_rows_in_the_given_order():
    many = MultiVectors.from_list(vectors_of([1, 2, 3]))
    picked = many.select([2, 0, 2])
    assert picked.lengths.tolist() == [3, 1, 3]
    assert torch.equal(picked[1], many[0])
    assert torch.equal(picked[2], many[2])


def test_a_row_carries_gradient_to_the_packed_vectors():
    vectors = torch.randn(4, 2, requires_grad=True)
    MultiVectors(vectors, torch.tensor([0, 1, 4]))[1].sum().backward()
    assert vectors.grad.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]


def test_to_changes_the_dtype_and_keeps_the_offsets():
    many = MultiVectors.from_list(vectors_of([1, 2])).to(torch.bfloat16)
    assert many.vectors.dtype == torch.bfloat16
    assert many.offsets.dtype == torch.int64


def test_from_list_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        MultiVectors.from_list([])


@pytest.mark.parametrize("offsets", [[], [1, 4], [0, 3], [0, 5], [0, 3, 2, 4]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets must start at 0, never fall, and end at the 4"):
        MultiVectors(torch.zeros(4, 2), torch.tensor(offsets, dtype=torch.int64))


def test_offsets_of_counts_empty_rows():
    assert offsets_of([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert offsets_of([]).tolist() == [0]
    assert offsets_of(torch.tensor([1, 1])).tolist() == [0, 1, 2]


def test_grids_that_need_other_patches_than_came_are_refused():
    with pytest.raises(ValueError, match=r"\[\[1, 2, 4\]\] need 8 patches, found 4"):
        packed(grid_thw=torch.tensor([[1, 2, 4]]))


def test_packed_tokens_and_offsets_fit():
    assert packed().lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="5 rows of token_ids"):
        packed(offsets=torch.tensor([0, 2, 4]))


def test_moving_a_batch_keeps_offsets_and_grids():
    masks = torch.eye(2, dtype=torch.bool)
    teacher = torch.full((2, 2), 0.5)
    ids = torch.arange(2), torch.arange(2, 4)
    batch = ContrastiveBatch(packed(), packed(), masks, ~masks, *ids, teacher=teacher).to("cpu")
    assert batch.queries.offsets.tolist() == [0, 2, 5]
    assert batch.documents.grid_thw.tolist() == [[1, 2, 2]]
    assert torch.equal(batch.positives, masks)
    assert torch.equal(batch.ignored, ~masks)
    assert torch.equal(batch.document_ids, ids[1])
    assert torch.equal(batch.teacher, teacher)


def test_selected_rows_are_what_was_packed_alone(shared_retriever, texts, pages):
    collator = shared_retriever.collator
    for pack, inputs in ((collator.queries, texts), (collator.documents, pages)):
        for rows in ([2], [4, 0, 4], list(range(len(inputs)))):
            mine, alone = pack(inputs).select(rows), pack([inputs[row] for row in rows])
            for name in Packed.__dataclass_fields__:
                assert torch.equal(getattr(mine, name), getattr(alone, name)), name


def test_rows_of_a_packed_batch_are_what_was_packed_alone(shared_retriever, texts, pages):
    collator = shared_retriever.collator
    for pack, inputs in ((collator.queries, texts), (collator.documents, pages)):
        together = pack(inputs)
        for begin, end in ((0, len(inputs)), (2, 5), (1, 2), (3, 3)):
            mine, alone = together.rows(begin, end), pack(inputs[begin:end])
            for name in Packed.__dataclass_fields__:
                assert torch.equal(getattr(mine, name), getattr(alone, name)), name


@pytest.mark.parametrize(("begin", "end"), [(-1, 1), (1, 0), (0, 3)])
def test_rows_that_are_not_there_are_named(begin, end):
    with pytest.raises(IndexError, match=f"rows {begin} to {end} of 2 rows"):
        packed().rows(begin, end)
