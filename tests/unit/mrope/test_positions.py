import pytest
import torch

from colfolio.batch import offsets_of
from colfolio.mrope import (
    IMAGE,
    TEXT,
    VIDEO,
    Qwen2_5VL,
    Qwen2VL,
    VideoRoPE,
    padded_position_ids,
    position_ids,
)

SECONDS = "qwen2_5_vl"


def grid_thw(grids):
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


def packed(rows):
    return torch.tensor([kind for row in rows for kind in row], dtype=torch.int64)


def positions_of(rows, images=(), videos=(), **options):
    offsets = offsets_of([len(row) for row in rows])
    return position_ids(packed(rows), offsets, grid_thw(images), grid_thw(videos), **options)


def padded_positions_of(types, mask, images=(), videos=(), **options):
    mask = torch.tensor(mask)
    return padded_position_ids(
        torch.tensor(types), mask, grid_thw(images), grid_thw(videos), **options
    )


def test_text_advances_all_three_rows_by_one():
    assert positions_of([[TEXT] * 3]).tolist() == [[0, 1, 2]] * 3


def test_an_image_takes_rows_and_columns_and_text_goes_on_behind_its_longest_side():
    row = [TEXT] + [IMAGE] * 6 + [TEXT, TEXT]
    temporal, height, width = positions_of([row], [[1, 4, 6]]).tolist()
    assert temporal == [0, 1, 1, 1, 1, 1, 1, 4, 5]
    assert height == [0, 1, 1, 1, 2, 2, 2, 4, 5]
    assert width == [0, 1, 2, 3, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("behind_time", "behind"), [(False, 2), (True, 6)])
def test_a_clip_takes_times_and_text_goes_on_behind_its_longer_side_or_all_three(
    behind_time, behind
):
    row = [VIDEO] * 12 + [TEXT]
    scheme = Qwen2VL(behind_time=behind_time)
    temporal, height, width = positions_of([row], [], [[6, 4, 2]], scheme=scheme).tolist()
    assert temporal == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, behind]
    assert height == [0, 1] * 6 + [behind]
    assert width == [0] * 12 + [behind]


def test_times_in_seconds_are_rounded_down_and_belong_to_clips_in_order():
    row = [VIDEO] * 4 + [TEXT] + [VIDEO] * 3
    clips = [[4, 2, 2], [3, 2, 2]]
    temporal = positions_of([row], [], clips, scheme=SECONDS, second_per_grid_ts=[0.4, 2.0])[0]
    assert temporal.tolist() == [0, 0, 1, 2, 1, 2, 6, 10]


def test_an_image_between_clips_takes_no_time_of_theirs():
    row = [VIDEO, VIDEO, IMAGE, VIDEO, VIDEO]
    temporal = positions_of(
        [row], [[1, 2, 2]], [[2, 2, 2], [2, 2, 2]], scheme=SECONDS, second_per_grid_ts=[1.5, 4.0]
    )[0]
    assert temporal.tolist() == [0, 3, 1, 2, 10]


def test_steps_of_an_image_are_not_spread_over_time():
    temporal = positions_of([[IMAGE] * 3], [[3, 2, 2]], scheme=Qwen2_5VL(tokens_per_second=9))[0]
    assert temporal.tolist() == [0, 1, 2]


def test_frames_of_videorope_are_centred_on_their_time():
    row = [TEXT, TEXT] + [VIDEO] * 6 + [TEXT]
    positions = positions_of([row], [], [[2, 2, 6]], scheme=VideoRoPE(temporal_spacing=2))
    temporal, height, width = positions.tolist()
    assert temporal == [0, 1, 2, 2, 2, 4, 4, 4, 5]
    assert height == [0, 1, 2, 2, 2, 4, 4, 4, 5]
    assert width == [0, 1, 1, 2, 3, 3, 4, 5, 5]


def test_every_row_begins_at_zero_and_rows_do_not_see_each_other():
    rows = [[TEXT] * 2, [IMAGE] * 2 + [TEXT], [TEXT], [TEXT, *[IMAGE] * 4]]
    grids = [[1, 2, 4], [1, 4, 4]]
    alone = [positions_of([rows[0]]), positions_of([rows[1]], grids[:1])]
    alone += [positions_of([rows[2]]), positions_of([rows[3]], grids[1:])]
    assert torch.equal(positions_of(rows, grids), torch.cat(alone, dim=1))


def test_empty_rows_and_an_empty_batch_are_no_special_case():
    assert positions_of([]).shape == (3, 0)
    assert positions_of([[]]).shape == (3, 0)
    assert positions_of([[], [TEXT], []]).tolist() == [[0]] * 3
    assert padded_position_ids(torch.zeros(0, 4, dtype=torch.int64)).shape == (3, 0, 4)
    assert padded_position_ids(torch.zeros(2, 0, dtype=torch.int64)).shape == (3, 2, 0)


def test_a_row_of_padding_alone_is_no_special_case():
    positions = padded_positions_of([[IMAGE, TEXT], [TEXT, TEXT]], [[1, 1], [0, 0]], [[1, 2, 2]])
    assert positions.tolist() == [[[0, 1], [0, 0]]] * 3


def test_no_mask_and_no_grids_are_as_a_full_mask_and_empty_grids():
    types = torch.tensor([[TEXT, IMAGE], [IMAGE, TEXT]])
    grids = grid_thw([[1, 2, 2]] * 2)
    bare = padded_position_ids(types, image_grid_thw=grids)
    assert torch.equal(
        bare, padded_position_ids(types, torch.ones(2, 2), grids, video_grid_thw=grid_thw([]))
    )


@pytest.mark.parametrize("merge", [1, 3])
def test_the_merge_size_is_heeded(merge):
    positions = positions_of(
        [[IMAGE] * 2], [[1, merge, 2 * merge]], spatial_merge_size=merge
    ).tolist()
    assert positions == [[0, 0], [0, 0], [0, 1]]


def test_a_call_changes_nothing_that_a_later_call_reads():
    row, clip = [TEXT] * 3 + [VIDEO] * 8, [[2, 4, 4]]
    first = positions_of([row], [], clip)
    kept = first.clone()
    first.zero_()
    assert torch.equal(positions_of([row], [], clip), kept)


@pytest.mark.parametrize("scheme", ["qwen2_vl", "qwen2_vl_published", "qwen3_vl", "videorope"])
def test_nothing_waits_for_the_device_of_the_tokens(scheme):
    # the meta device has no values, so that whatever reads one fails there
    rows = [[TEXT, *[IMAGE] * 2], [VIDEO, TEXT, IMAGE], []]
    offsets, images = offsets_of([3, 3, 0]), grid_thw([[1, 2, 4], [1, 2, 2]])
    clip = grid_thw([[1, 2, 2]])
    positions = position_ids(packed(rows).to("meta"), offsets, images, clip, scheme)
    assert (positions.device.type, positions.shape) == ("meta", (3, 6))
    assert positions.dtype == torch.int64
    types = torch.tensor([[*rows[0], TEXT], [TEXT, *rows[1]]]).to("meta")
    for mask in (None, torch.ones(2, 4, device="meta"), torch.ones(2, 4)):
        positions = padded_position_ids(types, mask, images, clip, scheme)
        assert (positions.device.type, positions.shape) == ("meta", (3, 2, 4))


PAGE = [1, 4, 4]  # 4 tokens
TEXT_AND_PAGE = [TEXT, *[IMAGE] * 4]


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        # too few
        (
            [TEXT_AND_PAGE, [TEXT] + [IMAGE] * 3],
            [PAGE, PAGE],
            r"^row 1: image grid 1 \(\[1, 4, 4\]\) needs 4 .* from token 1 on, found 3$",
        ),
        ([[IMAGE] * 3 + [TEXT], [IMAGE] * 4], [PAGE, PAGE], r"^row 0: image grid 0 .*found 3$"),
        ([[TEXT], [], [IMAGE]], [PAGE], r"^row 2: image grid 0 .*token 0 on, found 1$"),
        # too many, with and without a grid left
        ([[IMAGE] * 5, [IMAGE] * 4], [PAGE, PAGE], r"^row 0: image grid 1 .*token 4 on, found 1$"),
        (
            [[IMAGE] * 4, [TEXT, IMAGE]],
            [PAGE],
            "^row 1: token 1 is a placeholder of images, but belongs to no grid: all 1 of image",
        ),
        # interrupted by text, by a clip, by the end of the row
        ([[TEXT], [IMAGE, IMAGE, TEXT, IMAGE, IMAGE]], [PAGE], r"^row 1: image grid 0 .*found 2$"),
        ([[TEXT, IMAGE, IMAGE], [IMAGE, IMAGE]], [PAGE], r"^row 0: image grid 0 .*1 on, found 2$"),
        # sizes that fit all tokens together, but not one by one
        ([[IMAGE, TEXT, *[IMAGE] * 4]], [PAGE, [1, 2, 2]], "^row 0: image grid 0 .*found 1$"),
        # unknown types
        ([[TEXT], [TEXT, 3]], [], "^row 1: token 1 has type 3; known are 0"),
        ([[TEXT], [-1]], [], "^row 1: token 0 has type -1; known are 0"),
        # no grids at all
        ([[TEXT], [TEXT, IMAGE]], [], "^row 1: token 1 is a placeholder of images, but image_grid"),
        ([[VIDEO], [TEXT]], [PAGE], "^row 0: token 0 is a placeholder of videos, but video_grid"),
        # grids left over
        ([TEXT_AND_PAGE, [TEXT]], [PAGE] * 2, r"^image grid 1 \(\[1, 4, 4\]\) is left over"),
        ([[TEXT]], [PAGE], "^image grid 0 .* is left over"),
        ([], [PAGE], "^image grid 0 .* is left over"),
    ],
)
def test_a_misfit_names_its_row_its_grid_and_both_numbers(rows, images, message):
    with pytest.raises(ValueError, match=message):
        positions_of(rows, images)
    if rows:
        length = max(map(len, rows))
        types = [row + [7] * (length - len(row)) for row in rows]
        mask = [[True] * len(row) + [False] * (length - len(row)) for row in rows]
        with pytest.raises(ValueError, match=message):
            padded_positions_of(types, mask, images)


def test_a_clip_that_interrupts_an_image_is_named():
    rows = [[TEXT], [IMAGE, IMAGE, VIDEO, IMAGE, IMAGE]]
    with pytest.raises(ValueError, match=r"^row 1: image grid 0 .*token 0 on, found 2$"):
        positions_of(rows, [PAGE], [[1, 2, 2]])


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([[2, 2, 4]], r"^row 1: video grid 0 \(\[2, 2, 4\]\) needs 4 .*token 0 on, found 3$"),
        ([[1, 2, 6]] * 2, r"^video grid 1 \(\[1, 2, 6\]\) is left over"),
    ],
)
def test_a_clip_that_does_not_fit_is_named_as_an_image_is(clips, message):
    with pytest.raises(ValueError, match=message):
        positions_of([[TEXT], [VIDEO] * 3], [], clips)


def test_padding_does_not_hide_a_misfit_or_make_one():
    types = [[TEXT, TEXT, IMAGE], [9, TEXT, IMAGE]]
    grids = [[1, 2, 2]] * 2
    assert padded_positions_of(types, [[1, 1, 1], [0, 1, 1]], grids).shape == (3, 2, 3)
    with pytest.raises(ValueError, match=r"^row 1: token 0 has type 9"):
        padded_positions_of(types, [[1, 1, 1], [1, 1, 1]], grids)
    with pytest.raises(ValueError, match=r"^row 1: token 2 .*belongs to no grid"):
        padded_positions_of(types, [[1, 1, 1], [0, 1, 1]], grids[:1])


def test_padding_inside_an_image_is_named():
    with pytest.raises(ValueError, match=r"^row 0: image grid 0 .*token 0 on, found 1$"):
        padded_positions_of([[IMAGE] * 3], [[1, 0, 1]], [[1, 2, 4]])


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        (
            [[TEXT], [IMAGE], [IMAGE] * 3],
            [[1, 2, 2], [1, 4, 3]],
            r"^row 2: image grid 1 is \[1, 4, 3\].*multiples of the merge size 2$",
        ),
        ([[TEXT], [IMAGE] * 3], [[1, 3, 4]], r"^row 1: image grid 0 is \[1, 3, 4\]"),
        ([[TEXT], [IMAGE]], [[1, 0, 4]], r"^row 1: image grid 0 is \[1, 0, 4\]"),
        ([[TEXT], [IMAGE]], [[0, 4, 4]], r"^row 1: image grid 0 is \[0, 4, 4\]"),
        ([[TEXT], [IMAGE]], [[1, -2, 4]], r"^row 1: image grid 0 is \[1, -2, 4\]"),
        ([[TEXT]], [[1, 4, 3]], r"^no row has .*: image grid 0 is \[1, 4, 3\]"),
    ],
)
def test_a_grid_that_does_not_divide_by_the_merge_size_is_named(rows, images, message):
    with pytest.raises(ValueError, match=message):
        positions_of(rows, images)


def test_frames_of_qwen3_vl_without_text_between_are_named():
    clip = [[3, 2, 4]]
    apart = [TEXT, VIDEO, VIDEO, TEXT, VIDEO, VIDEO, TEXT, VIDEO, VIDEO]
    assert positions_of([apart], [], clip, scheme="qwen3_vl").shape == (3, 9)
    message = r"^row 1: video grid 0 \(\[3, 2, 4\]\) has two frames without text between at token 6"
    with pytest.raises(ValueError, match=message):
        positions_of([[TEXT], apart[:6] + apart[7:]], [], clip, scheme="qwen3_vl")


def test_clips_of_qwen3_vl_may_stand_beside_one_another():
    positions = positions_of([[VIDEO, VIDEO]], [], [[1, 2, 2]] * 2, scheme="qwen3_vl")
    assert positions.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("seconds", [[], [1.0, 2.0], [-0.5], torch.tensor([1.0, 2.0])])
def test_seconds_of_another_number_than_clips_or_below_zero_are_refused(seconds):
    with pytest.raises(
        ValueError, match=r"seconds of each of 1 clips, at least 0 and below 1e.09, received"
    ):
        positions_of([[VIDEO] * 2], [], [[2, 2, 2]], scheme=SECONDS, second_per_grid_ts=seconds)


@pytest.mark.parametrize("scheme", ["qwen2_vl", "qwen3_vl", "videorope"])
def test_seconds_are_refused_by_a_scheme_without_time(scheme):
    with pytest.raises(ValueError, match=r"second_per_grid_ts is set, but \w+\(.*no use for time"):
        positions_of([[VIDEO]], [], [[1, 2, 2]], scheme=scheme, second_per_grid_ts=[1.0])


def test_an_unknown_scheme_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"scheme 'mrope' is none of qwen2_vl, .*videorope"):
        positions_of([[TEXT]], scheme="mrope")


@pytest.mark.parametrize("mask", [(2,), (2, 4), (3, 2), (1, 2, 3)])
def test_a_mask_of_another_shape_is_refused_with_both_shapes(mask):
    types = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"received \[2, 3\] and \[" + ", ".join(map(str, mask))):
        padded_position_ids(types, torch.ones(mask))


def test_padded_token_types_have_two_dimensions():
    with pytest.raises(ValueError, match=r"must be \[batch, length\].*received \[3\] and None"):
        padded_position_ids(torch.zeros(3, dtype=torch.int64))


def test_the_number_that_stands_for_padding_is_an_unknown_type_like_any_other():
    with pytest.raises(ValueError, match=r"^row 1: token 1 has type -100"):
        positions_of([[TEXT], [TEXT, -100]])


@pytest.mark.parametrize("offsets", [[0, 2], [0, 5], [], [1, 3], [0, 2, 1, 3]])
def test_offsets_that_do_not_cut_all_tokens_into_rows_are_refused(offsets):
    with pytest.raises(ValueError, match=r"offsets must start at 0, never fall.* 3; received"):
        position_ids(torch.zeros(3, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64))


def test_a_placeholder_of_the_wrong_kind_is_refused_where_the_number_of_both_fits():
    with pytest.raises(ValueError, match=r"^row 0: token 4 is a placeholder of videos, but"):
        positions_of([[VIDEO] * 5], [[1, 2, 2]], [[1, 4, 4]])


def test_frames_of_one_clip_in_two_rows_are_refused():
    with pytest.raises(ValueError, match=r"^row 1: video grid 0 .*in this row and in row 0"):
        positions_of([[VIDEO, TEXT], [TEXT, VIDEO]], [], [[2, 2, 2]], scheme="qwen3_vl")


@pytest.mark.parametrize("grids", [torch.ones(3).long(), torch.ones(2, 2).long(), torch.ones(1, 3)])
def test_grids_of_another_form_are_refused(grids):
    with pytest.raises(ValueError, match=r"image_grid_thw must be whole numbers \[grids, 3\]"):
        position_ids(torch.ones(1, dtype=torch.int64), torch.tensor([0, 1]), grids)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
def test_seconds_that_are_no_number_are_refused(seconds):
    with pytest.raises(ValueError, match="second_per_grid_ts"):
        positions_of([[VIDEO] * 2], [], [[2, 2, 2]], scheme=SECONDS, second_per_grid_ts=[seconds])


@pytest.mark.parametrize("scheme", ["qwen2_vl", SECONDS])
def test_seconds_without_a_clip_are_refused(scheme):
    with pytest.raises(ValueError, match="second_per_grid_ts"):
        positions_of([[IMAGE]], [[1, 2, 2]], scheme=scheme, second_per_grid_ts=[1.0])


def test_a_grid_that_does_not_divide_is_named_where_tokens_cannot_be_read():
    with pytest.raises(ValueError, match=r"image grid 0 is \[1, 3, 4\]"):
        position_ids(torch.ones(3).long().to("meta"), offsets_of([3]), grid_thw([[1, 3, 4]]))


def test_a_clip_of_qwen3_vl_that_lacks_a_frame_is_named_with_the_number_of_frames():
    with pytest.raises(ValueError, match=r"video grid 0 .*1 of (its )?2 frames"):
        positions_of([[TEXT, VIDEO, TEXT]], [], [[2, 2, 2]], scheme="qwen3_vl")


def test_a_default_device_changes_nothing_now_or_later():
    types, offsets, grids = packed([[IMAGE] * 5]), offsets_of([5]), grid_thw([[1, 2, 10]])
    with torch.device("meta"):
        under = position_ids(types, offsets, grids)
    assert torch.equal(under, position_ids(types, offsets, grids))
