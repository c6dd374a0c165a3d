"""`to_patches` equals the image processor of `transformers`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessorPil

from colfolio.data.patches import PixelBudget, target_size, to_patches
from colfolio.models.families import FAMILIES

DEFAULT = PixelBudget()
BUDGETS = [
    DEFAULT,
    PixelBudget(min_pixels=28 * 28 * 20, max_pixels=28 * 28 * 30),
    FAMILIES["qwen3_vl"].pixel_budget,
]


def processed(images, budget):
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels},
        patch_size=budget.patch,
        image_mean=list(budget.mean),
        image_std=list(budget.std),
    )
    features = processor(images=images, return_tensors="pt", input_data_format="channels_last")
    return features["pixel_values"], features["image_grid_thw"]


def assert_equal(images, budget):
    patches, grids = to_patches([image[None] for image in images], budget)
    their_patches, their_grids = processed(images, budget)
    assert torch.equal(grids, their_grids)
    torch.testing.assert_close(patches, their_patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", BUDGETS, ids=["default", "narrow", "qwen3_vl"])
@pytest.mark.parametrize(
    "size", [(56, 84), (57, 85), (1, 1), (7, 300), (301, 29), (333, 211), (640, 480), (14, 2000)]
)
def test_an_image_of_any_size_gives_the_librarys_patches(size, budget, random_image):
    assert_equal([random_image(*size)], budget)


def test_images_of_several_sizes_keep_their_order(random_image):
    sizes = [(56, 84), (28, 28), (56, 84), (99, 31), (28, 28)]
    assert_equal([random_image(*size, seed=n) for n, size in enumerate(sizes)], BUDGETS[0])


@settings(max_examples=200)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from(BUDGETS))
def test_every_size_ends_on_the_librarys_grid(height, width, budget):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) > 200 * min(height, width):
        return
    theirs = smart_resize(height, width, budget.factor, budget.min_pixels, budget.max_pixels)
    assert target_size(height, width, budget) == theirs


def test_a_still_image_equals_a_clip_of_two_equal_frames(random_image):
    image = random_image(56, 84)
    still, _ = to_patches([image[None]], DEFAULT)
    clip, grid = to_patches([np.stack([image, image])], DEFAULT)
    assert torch.equal(still, clip)
    assert grid.tolist() == [[1, 4, 6]]
