import pytest
import torch

from colfolio.batch import offsets_of
from colfolio.mrope import IMAGE, TEXT, VIDEO, position_ids


def positions_of(rows, grids, merge=2):
    types = torch.tensor([kind for row in rows for kind in row], dtype=torch.int64)
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    return position_ids(types, offsets_of([len(row) for row in rows]), grid_thw, merge)


def test_text_advances_all_three_rows_by_one():
    assert positions_of([[TEXT] * 3], []).tolist() == [[0, 1, 2]] * 3


def test_an_image_takes_rows_and_columns_and_text_goes_on_behind_its_longest_side():
    row = [TEXT] + [IMAGE] * 6 + [TEXT, TEXT]
    temporal, height, width = positions_of([row], [[1, 4, 6]]).tolist()
    assert temporal == [0, 1, 1, 1, 1, 1, 1, 4, 5]
    assert height == [0, 1, 1, 1, 2, 2, 2, 4, 5]
    assert width == [0, 1, 2, 3, 1, 2, 3, 4, 5]


def test_a_clip_takes_times_and_text_goes_on_behind_the_largest_of_all_three():
    row = [VIDEO] * 12 + [TEXT]
    temporal, height, width = positions_of([row], [[6, 4, 2]]).tolist()
    assert temporal == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert height == [0, 1] * 6 + [6]
    assert width == [0] * 12 + [6]


def test_every_row_begins_at_zero_and_rows_do_not_see_each_other():
    rows = [[TEXT] * 2, [IMAGE] * 2 + [TEXT], [TEXT], [TEXT, *[IMAGE] * 4]]
    grids = [[1, 2, 4], [1, 4, 4]]
    together = positions_of(rows, grids)
    alone = [positions_of([rows[0]], []), positions_of([rows[1]], grids[:1])]
    alone += [positions_of([rows[2]], []), positions_of([rows[3]], grids[1:])]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_empty_rows_and_an_empty_batch_are_no_special_case():
    assert positions_of([], []).shape == (3, 0)
    assert positions_of([[]], []).shape == (3, 0)
    assert positions_of([[], [TEXT], []], []).tolist() == [[0]] * 3


@pytest.mark.parametrize("merge", [1, 3])
def test_the_merge_size_is_heeded(merge):
    row = [IMAGE] * 2
    assert positions_of([row], [[1, merge, 2 * merge]], merge).tolist() == [[0, 0], [0, 0], [0, 1]]


def test_a_grid_that_does_not_divide_by_the_merge_size_is_named():
    with pytest.raises(ValueError, match=r"grid 1 is \[1, 4, 3\].*multiples of the merge size 2"):
        positions_of([[IMAGE] * 3], [[1, 2, 2], [1, 4, 3]])


def test_a_grid_without_tokens_is_named():
    with pytest.raises(ValueError, match=r"grid 0 is \[1, 0, 4\]"):
        positions_of([[TEXT]], [[1, 0, 4]])


def test_placeholders_that_text_interrupts_are_named():
    with pytest.raises(ValueError, match="row 1: grid 0 needs 4 placeholder tokens"):
        positions_of([[TEXT], [IMAGE, IMAGE, TEXT, IMAGE, IMAGE]], [[1, 4, 4]])


def test_placeholders_that_reach_into_the_next_row_are_named():
    with pytest.raises(ValueError, match="row 0: grid 0 needs 4 placeholder tokens"):
        positions_of([[TEXT, IMAGE, IMAGE], [IMAGE, IMAGE]], [[1, 4, 4]])


@pytest.mark.parametrize("found", [1, 3])
def test_too_few_placeholders_name_row_grid_and_both_numbers(found):
    rows = [[TEXT, *[IMAGE] * 4], [TEXT] + [IMAGE] * found]
    with pytest.raises(ValueError, match=f"row 1: grid 1 needs 4 placeholder tokens.*{found}"):
        positions_of(rows, [[1, 4, 4], [1, 4, 4]])


def test_too_few_placeholders_in_an_early_row_name_that_row():
    rows = [[IMAGE] * 3 + [TEXT], [IMAGE] * 4]
    with pytest.raises(ValueError, match="row 0: grid 0 needs 4 placeholder tokens"):
        positions_of(rows, [[1, 4, 4], [1, 4, 4]])


def test_a_grid_without_any_placeholder_left_is_named():
    with pytest.raises(ValueError, match="grid 1 needs 4 placeholder tokens"):
        positions_of([[IMAGE] * 4, [TEXT]], [[1, 4, 4], [1, 4, 4]])


def test_too_many_placeholders_name_their_row():
    with pytest.raises(ValueError, match=r"row 1: placeholder token 5 .*no grid"):
        positions_of([[IMAGE] * 4, [TEXT, IMAGE]], [[1, 4, 4]])


def test_placeholders_without_any_grid_name_their_row():
    with pytest.raises(ValueError, match=r"row 1: placeholder token 1 .*no grid"):
        positions_of([[TEXT], [IMAGE]], [])
