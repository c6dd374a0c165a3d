import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from colfolio.models import drawing
from colfolio.models.drawing import draw_normal

SHAPE = (37, 20)
# Drawn numbers are what two machines must agree on, and only a pinned hash lets a second machine
# say that it agrees. A change here makes every base of a seed another base.
PINNED = "e7f01f5e4df12445e14723cec232bb129e069cf454641da40e042d272f3f340d"


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def plain(count, std, seed, name):
    """The definition, a number at a time, in integers of Python."""
    key = hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little"))
    numbers = []
    for _ in range(count):
        total = 0
        for word in words.random_raw(3).tolist():
            total += sum(word >> (16 * lane) & 0xFFFF for lane in range(4))
        numbers.append((total - 12 * 0xFFFF // 2) * (std / math.sqrt(2**32 - 1)))
    return torch.tensor(numbers, dtype=torch.float64)


def test_drawn_numbers_are_the_sums_of_twelve_that_the_definition_names():
    expected = plain(math.prod(SHAPE), 0.5, 3, "weight").view(SHAPE)
    assert torch.equal(draw_normal(SHAPE, 0.5, 3, "weight", torch.float64), expected)
    assert torch.equal(draw_normal(SHAPE, 0.5, 3, "weight"), expected.float())


def test_block_size_never_changes_the_numbers(monkeypatch):
    whole = draw_normal(SHAPE, 1.0, 0, "weight")
    monkeypatch.setattr(drawing, "_BLOCK", 7)
    assert torch.equal(draw_normal(SHAPE, 1.0, 0, "weight"), whole)


def test_seed_and_name_make_the_numbers_and_a_longer_tensor_begins_alike():
    first = draw_normal((100,), 1.0, 0, "a")
    assert torch.equal(draw_normal((200,), 1.0, 0, "a")[:100], first)
    for seed, name in [(1, "a"), (0, "b"), (0, "\na")]:
        other = draw_normal((100,), 1.0, seed, name)
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_dtype_is_the_float32_draw_rounded(dtype):
    assert torch.equal(
        draw_normal(SHAPE, 1.0, 0, "a", dtype), draw_normal(SHAPE, 1.0, 0, "a").to(dtype)
    )


def test_moments_are_those_of_the_formula():
    numbers = draw_normal((1_000_000,), 0.02, 0, "a", torch.float64) / 0.02
    error = 1e-3  # a standard error of the mean of as many
    assert abs(numbers.mean()) < 4 * error
    assert abs(numbers.var() - 1) < 4 * error * math.sqrt(2)
    assert abs((numbers**4).mean() - 2.9) < 4 * error * math.sqrt(96)
    assert numbers.abs().max() < 6
    assert abs((numbers.abs() < 1).double().mean() - math.erf(1 / math.sqrt(2))) < 0.005


def test_a_tensor_without_numbers_has_its_shape():
    assert draw_normal((0, 3), 1.0, 0, "a").shape == (0, 3)


def test_no_global_generator_is_touched():
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw_normal(SHAPE, 1.0, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(("std", "seed"), [(1.0, -1), (-1.0, 0), (math.inf, 0), (math.nan, 0)])
def test_what_cannot_be_drawn_is_refused_by_name(std, seed):
    with pytest.raises(ValueError, match="for weight"):
        draw_normal(SHAPE, std, seed, "weight")


def test_numbers_are_those_that_every_machine_draws():
    assert digest(draw_normal(SHAPE, 1.0, 0, "weight")) == PINNED


def test_vector_units_threads_and_defaults_never_change_the_numbers():
    script = (
        "import torch; torch.set_default_dtype(torch.float64); torch.set_num_threads(2)\n"
        "from colfolio.models.drawing import draw_normal\n"
        "print(*draw_normal((5000,), 1.0, 0, 'a', torch.bfloat16).view(torch.int16).tolist())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    drawn = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    expected = draw_normal((5000,), 1.0, 0, "a", torch.bfloat16).view(torch.int16)
    assert [int(number) for number in drawn.stdout.split()] == expected.tolist()
