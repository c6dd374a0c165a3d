import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colfolio.data.patches import PixelBudget, target_size, to_patches
from colfolio.errors import DocumentError

BUDGET = PixelBudget(min_pixels=784, max_pixels=50176)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_sides_become_multiples_of_a_token_within_the_budget(height, width):
    if max(height, width) > 200 * min(height, width):
        return
    rows, columns = target_size(height, width, BUDGET)
    assert rows % 28 == columns % 28 == 0
    assert rows >= 28
    assert columns >= 28
    # one side of an elongated image stays a token wide, whatever the budget
    assert rows * columns <= BUDGET.max_pixels or min(rows, columns) == 28


def test_an_image_that_fits_keeps_its_size():
    assert target_size(56, 392, BUDGET) == (56, 392)


@pytest.mark.parametrize("size", [(1, 201), (5000, 24), (0, 10), (10, 0), (0, 0)])
def test_an_image_without_area_or_far_too_long_is_refused(size):
    with pytest.raises(DocumentError, match=f"{size[0]} x {size[1]} pixels"):
        target_size(*size, BUDGET)


def test_a_grid_counts_patches_in_time_height_and_width():
    clips = [np.zeros((1, 56, 28, 3), np.uint8), np.zeros((5, 28, 84, 3), np.uint8)]
    patches, grids = to_patches(clips, BUDGET)
    assert grids.tolist() == [[1, 4, 2], [3, 2, 6]]
    assert patches.shape == (8 + 36, BUDGET.patch_dim)


def test_nothing_gives_nothing():
    patches, grids = to_patches([], BUDGET)
    assert patches.shape == (0, BUDGET.patch_dim)
    assert grids.shape == (0, 3)


def test_the_last_frame_is_repeated_to_fill_a_patch_in_time(random_image):
    frames = np.stack([random_image(28, 28, seed=n) for n in range(3)])
    padded = np.concatenate([frames, frames[-1:]])
    for mine, theirs in zip(
        to_patches([frames], BUDGET), to_patches([padded], BUDGET), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_pixels_are_normalised_by_channel():
    image = np.full((1, 28, 28, 3), (255, 0, 0), np.uint8)
    patches, _ = to_patches([image], BUDGET)
    red, green, _ = patches.reshape(-1, 3, 2, 14, 14).transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(red, torch.full_like(red, (1 - 0.48145466) / 0.26862954))
    torch.testing.assert_close(green, torch.full_like(green, -0.4578275 / 0.26130258))


def test_four_patches_of_one_token_stand_behind_one_another():
    image = np.zeros((1, 56, 56, 3), np.uint8)
    for number, (row, column) in enumerate(np.ndindex(4, 4)):
        image[0, 14 * row : 14 * (row + 1), 14 * column : 14 * (column + 1)] = number
    patches, _ = to_patches([image], BUDGET)
    order = patches[:, 0].argsort(stable=True)  # patch number -> place
    assert order.argsort().tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize(
    "values",
    [
        {"min_pixels": 9999, "max_pixels": 999},
        {"min_pixels": 0},
        {"patch": 0},
        {"std": (0.5, 0.0, 0.5)},
        {"mean": (0.5, float("nan"), 0.5)},
    ],
)
def test_a_budget_that_no_image_can_meet_is_refused(values):
    with pytest.raises(ValueError, match=r"pixels|greater|std above 0"):
        PixelBudget(**values)
