"""Peak memory of a call in a fresh process, beyond what the process held before it."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Blocks above it go back to the system when they are freed, so that the resident size is that of
# tensors. By itself the limit grows with what is freed, and the peak holds what nobody uses.
_BLOCKS_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
# as the command line has it: else oneDNN keeps what it made for every shape that it has seen
_FEW_SHAPES_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def tell_from_fresh_process(script: str, *arguments: str) -> str:
    """The last line that a script prints, run with these arguments in a process of its own."""
    told = subprocess.run(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | _BLOCKS_RETURNED | _FEW_SHAPES_KEPT,
    )
    return told.stdout.splitlines()[-1]


def resident_bytes() -> int:
    """What this process holds now, after what it holds for nothing went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _bytes_of("VmRSS")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that this process holds while a call runs."""
    resident_bytes()
    _CLEAR.write_text("5")  # the peak begins anew
    call()
    return _bytes_of("VmHWM")


def _bytes_of(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
