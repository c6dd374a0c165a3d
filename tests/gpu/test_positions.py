"""On a GPU: the same positions as on the CPU, rotated alike, and nothing waits for the device."""

from contextlib import contextmanager

import pytest
import torch

from colfolio.batch import offsets_of
from colfolio.mrope import (
    IMAGE,
    SCHEMES,
    TEXT,
    VIDEO,
    cos_sin,
    inverse_frequencies,
    padded_position_ids,
    position_ids,
    rotate,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# frames apart from one another, as qwen3_vl wants them
FRAMES = [VIDEO, VIDEO, TEXT] * 3
ROWS = [[TEXT, *[IMAGE] * 6, TEXT], [TEXT] * 3, [], [*FRAMES, *[IMAGE] * 2, TEXT, TEXT]]
IMAGES = torch.tensor([[1, 4, 6], [1, 2, 4]])
CLIPS = {True: torch.tensor([[3, 4, 2]]), False: torch.tensor([[1, 4, 2]] * 3)}


@contextmanager
def no_waiting():
    """Whatever waits for the device in here raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed(device):
    types = torch.tensor([kind for row in ROWS for kind in row])
    return types.to(device), offsets_of([len(row) for row in ROWS])


def padded(device):
    length = max(map(len, ROWS))
    types = torch.tensor([[TEXT] * (length - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ROWS])
    return types.to(device), mask.to(device)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("ids", "inputs"), [(position_ids, packed), (padded_position_ids, padded)], ids=["N", "B, L"]
)
def test_positions_equal_those_of_the_cpu_and_nothing_waits(scheme, ids, inputs):
    clips = CLIPS[scheme == "qwen3_vl"]
    exact = ids(*inputs("cpu"), IMAGES, clips, scheme)
    on_gpu = inputs("cuda")
    with no_waiting():
        found = ids(*on_gpu, IMAGES, clips, scheme)
    assert found.is_cuda
    assert torch.equal(found.cpu(), exact)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_offsets_may_lie_on_the_device(scheme):
    types, offsets = packed("cuda")
    clips = CLIPS[scheme == "qwen3_vl"]
    found = position_ids(types, offsets.cuda(), IMAGES.cuda(), clips.cuda(), scheme)
    assert torch.equal(found.cpu(), position_ids(*packed("cpu"), IMAGES, clips, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_agrees_with_the_cpu_forward_and_backward(dtype):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 500, (3, 2, 40), generator=generator)
    drawn = torch.randn(2, 4, 40, 128, generator=generator).to(dtype)
    scheme, results = SCHEMES["qwen2_vl"], []
    for device in ("cpu", "cuda"):
        axes = scheme.axes(scheme.sections(64))
        angles = cos_sin(positions.to(device), inverse_frequencies(128), axes)
        states = drawn.to(device).requires_grad_()
        turned = rotate(states, states[:, :2], *angles)
        gradient = torch.autograd.grad(turned, states, [part.detach() for part in turned])[0]
        results.append([*turned, gradient])
    # cosines of the two devices differ in the last bits of an angle of hundreds of radians
    bound = 2**-6 if dtype == torch.bfloat16 else 1e-4
    for mine, exact in zip(results[1], results[0], strict=True):
        assert mine.is_cuda
        torch.testing.assert_close(mine.cpu(), exact, atol=bound, rtol=bound)
