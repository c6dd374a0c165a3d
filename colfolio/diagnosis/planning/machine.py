"""Where a run is planned for: this machine, measured, or a GPU as its maker publishes it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from colfolio.attention import choose_attention
from colfolio.diagnosis.planning.numerics import Numerics
from colfolio.errors import RecipeError
from colfolio.models.precision import SettledPrecision, product_dtype, settled_precision
from colfolio.training import TrainSettings

# Of the speed of products of matrices, what a step is assumed to reach with all that is around
# them, which in half precision weighs more. On a CPU, steps of 30 to 100 million weights reached 25
# to 50 % in bf16 and 50 to 85 % in float32.
_HALF_SHARE, _WIDE_SHARE = 0.4, 0.7

_AMPERE = (8, 0)
_TERA = 1e12
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SECONDS = 0.3  # of measuring


@dataclass(frozen=True, slots=True)
class Machine:
    """What one rank has to itself.

    Args:
        name: for people.
        num_bytes: of memory.
        device: that it is, of this machine; None for a GPU known by name.
        capability: of a GPU.
        half_peak, wide_peak: operations a second in products of 16 bits and of float32, published;
            0 for this machine, where they are measured.
        sharers: ranks that share this device.
    """

    name: str
    num_bytes: int
    device: torch.device | None = None
    capability: tuple[int, int] = (0, 0)
    half_peak: float = 0.0
    wide_peak: float = 0.0
    sharers: int = 1

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device is None or self.device.type == "cuda"

    @property
    def has_fast_bf16(self) -> bool:
        """Of a GPU known by name: whether it multiplies bf16 natively."""
        return self.capability >= _AMPERE


@dataclass(frozen=True, slots=True)
class Speed:
    """Operations a second of a rank, and where the number comes from."""

    flops: float
    origin: str


def _gpu(
    name: str, gigabytes: int, capability: tuple[int, int], half: float, wide: float
) -> Machine:
    return Machine(name, gigabytes * 10**9, None, capability, half * _TERA, wide * _TERA)


# Memory, and dense products of 16 bits accumulated in float32 and of float32 without TF32, from
# the makers' data sheets; of H100, H200 and A100 those of the SXM form.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100-80gb", 80, (9, 0), 989.0, 67.0),
        _gpu("h200-141gb", 141, (9, 0), 989.0, 67.0),
        _gpu("a100-80gb", 80, (8, 0), 312.0, 19.5),
        _gpu("a100-40gb", 40, (8, 0), 312.0, 19.5),
        _gpu("l40s-48gb", 48, (8, 9), 362.0, 91.6),
        _gpu("rtx4090-24gb", 24, (8, 9), 165.0, 82.6),
        _gpu("t4-16gb", 16, (7, 5), 65.0, 8.1),
        _gpu("v100-32gb", 32, (7, 0), 125.0, 15.7),
    )
}


def named_gpu(name: str) -> Machine:
    """A GPU of the table.

    Raises:
        RecipeError: it is not in it.
    """
    if name not in GPUS:
        raise RecipeError(f"--gpu {name}: is none of {', '.join(GPUS)}")
    return GPUS[name]


def this_machine(ranks: int) -> Machine:
    """What each of some ranks has here: a GPU of its own, or its part of the memory."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        found = torch.cuda.get_device_properties(device)
        return Machine(found.name, found.total_memory, device)
    cores = os.cpu_count() or 1
    name = f"this machine ({cores} cores)"
    return Machine(name, memory_here() // ranks, torch.device("cpu"), sharers=ranks)


def numerics_of(settings: TrainSettings, machine: Machine, ranks: int) -> Numerics:
    """What a recipe leaves to the machine, settled for it.

    Raises:
        ColfolioError: the machine lacks the kernel that the recipe names.
    """
    is_gathered = settings.parallel == "fsdp2" and ranks > 1
    device = machine.device
    if device is not None:
        precision = settled_precision(settings.precision, device)
        dtype = product_dtype(precision, device)
        attention = choose_attention(settings.attention, device, dtype)
        return Numerics(precision, attention, machine.is_cuda, is_gathered)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if machine.has_fast_bf16 else "fp32"
    has_flash = machine.has_fast_bf16 and precision != "fp32"
    attention = settings.attention
    if attention == "auto":
        attention = "varlen" if has_flash else "sdpa"
    if attention in ("varlen", "flash_attention_2") and not has_flash:
        raise RecipeError(
            f"attention {attention} needs half precision on a GPU of the Ampere generation or "
            f"later, not {precision} on {machine.name}; choose auto, which takes sdpa there"
        )
    return Numerics(precision, attention, is_cuda=True, is_gathered=is_gathered)


def speed_of(machine: Machine, numerics: Numerics, rows: int, width: int, inner: int) -> Speed:
    """How fast a rank computes: by the table, or by a product that is timed now.

    Args:
        rows, width, inner: of a product as the model runs it: tokens, hidden size, feed-forward.
    """
    share = _HALF_SHARE if numerics.is_half else _WIDE_SHARE
    if machine.device is None:
        is_fast = numerics.precision == "fp16" or (numerics.is_half and machine.has_fast_bf16)
        peak = machine.half_peak if is_fast else machine.wide_peak
        origin = f"{peak / _TERA:.3g} TFLOP/s published, {share:.0%} of it assumed"
        return Speed(peak * share, origin)
    measured = _measured(machine.device, numerics.precision, rows, width, inner) / machine.sharers
    origin = f"{measured / _TERA:.3g} TFLOP/s measured in a product, {share:.0%} assumed"
    return Speed(measured * share, origin)


def _measured(
    device: torch.device, precision: SettledPrecision, rows: int, width: int, inner: int
) -> float:
    """Operations a second of a product of matrices, the best of a few."""
    dtype = product_dtype(precision, device)
    left = torch.ones(rows, width, device=device, dtype=dtype)
    right = torch.ones(width, inner, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        product = left @ right
        product[-1, -1].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * width * inner / best


def memory_here() -> int:
    """Memory of the machine, or of the container that this process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _CGROUP_LIMITS):
        try:
            sizes.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not Linux, or "max"
            continue
    return min(sizes)
