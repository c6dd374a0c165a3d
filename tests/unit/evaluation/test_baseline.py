import numpy as np
import pytest
import torch

from colfolio.data.dataset import load_dataset
from colfolio.evaluation.baseline import (
    baseline_scores,
    dataset_baseline,
    extent_of,
    fit_extent_line,
    fit_line,
    guess_line,
    image_extents,
    ink_width,
)
from colfolio.evaluation.metrics import mean_metrics


def bar(left: int, right: int, height: int = 28, ground: int = 255, ink: int = 20) -> np.ndarray:
    image = np.full((height, 200, 3), ground, dtype=np.uint8)
    image[height // 4 : 3 * height // 4, left:right] = ink
    return image


def test_ink_width_is_from_the_first_to_the_last_column_with_ink():
    two_words = bar(10, 40)
    two_words[:, 60:90] = bar(60, 90)[:, 60:90]
    assert ink_width(two_words) == 80


@pytest.mark.parametrize(("ground", "ink"), [(255, 0), (200, 60), (20, 240), (120, 255)])
def test_ink_width_does_not_depend_on_the_colours(ground, ink):
    assert ink_width(bar(30, 130, ground=ground, ink=ink)) == 100


def test_ink_width_is_measured_at_strip_height():
    assert ink_width(bar(20, 120, height=56)) == 50


@pytest.mark.parametrize("grey", [0, 255, 128])
def test_an_empty_image_has_no_ink(grey):
    empty = np.full((28, 84, 3), grey, dtype=np.uint8)
    assert ink_width(empty) == 0


def test_a_line_is_fitted_by_least_squares():
    line = fit_line([1, 2, 3, 4], np.array([12.0, 22.0, 32.0, 42.0]), "ink width")
    assert (line.slope, line.intercept) == pytest.approx((10.0, 2.0))


def test_texts_of_one_length_give_a_flat_line():
    line = fit_line([5, 5, 5], np.array([10.0, 20.0, 30.0]), "ink width")
    assert (line.slope, line.intercept) == (0.0, 20.0)


def test_a_guessed_line_needs_no_pairs():
    line = guess_line([10, 20, 30], np.array([100.0, 400.0, 200.0, 150.0]), "ink width")
    assert (line.slope, line.intercept) == (175.0 / 20, 0.0)


def test_the_baseline_prefers_the_image_whose_ink_fits_the_text():
    line = fit_line([1, 2], np.array([10.0, 20.0]), "ink width")
    scores = baseline_scores(["abc", "abcdef"], np.array([58.0, 31.0, 5.0]), line)
    torch.testing.assert_close(scores, -torch.tensor([[28.0, 1.0, 25.0], [2.0, 29.0, 55.0]]))


def test_a_line_from_another_split_orders_strips_by_width(strips_folder, strips):
    line = fit_extent_line(load_dataset(strips_folder, "train"))
    assert line.slope == pytest.approx(10.0)
    scores, extent = dataset_baseline(strips, line)
    assert extent == "ink width"
    assert mean_metrics(scores, torch.eye(4, dtype=torch.bool))["recall@1"] == 1.0


def test_the_split_is_read_only_as_far_as_asked(strips_folder, monkeypatch):
    dataset = load_dataset(strips_folder, "train")
    read, image = [], dataset.corpus.image
    monkeypatch.setattr(dataset.corpus, "image", lambda row: read.append(row) or image(row))
    fit_extent_line(dataset, max_pairs=2)
    assert read == [0, 2]


def test_a_line_that_measured_something_else_is_not_used(strips):
    wrong = fit_line([1, 2], np.array([0.1, 0.2]), "image size")
    assert torch.equal(dataset_baseline(strips, wrong)[0], dataset_baseline(strips)[0])


def test_images_taller_than_strips_are_measured_by_their_stored_size(strips, monkeypatch):
    assert extent_of(strips.corpus) == "ink width"
    monkeypatch.setattr(strips.corpus, "image_size", lambda row: (28 if row else 1100, 800))
    assert extent_of(strips.corpus) == "image size"
    assert extent_of(strips.corpus, [1, 2]) == "ink width"
    sizes = image_extents(strips.corpus, "image size")
    assert sizes.tolist() == [len(strips.corpus.encoded(row)) for row in range(4)]
