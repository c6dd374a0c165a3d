"""As many processes of `colfolio` as ranks on this host, started, watched and stopped together.

The processes find each other by the same variables as under `torchrun`, and by a store that this
process keeps, so that no port is guessed. `torchrun` itself would answer every failure with exit
code 1 and a stack of its own, and kill ranks that still save half a minute after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from colfolio.distributed.join import is_in_world
from colfolio.errors import ColfolioError

_HOST = "127.0.0.1"
_INTERRUPTED = 130
# How long ranks may go on after one has failed, before they are ended, and then killed: those that
# fail too say so themselves, the others wait for the one that is gone.
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_INTERRUPT = 3


def launch(argv: Sequence[str], ranks: int) -> int:
    """Run `colfolio` with these arguments in so many processes; returns its exit code.

    Output passes through. Ctrl-C reaches every rank once each time, and the third time kills them.

    Args:
        argv: what follows `colfolio` on the command line.

    Returns:
        That of the first rank to fail, if any does; else 130 if the ranks were interrupted.

    Raises:
        ColfolioError: this process is itself a rank of a world.
    """
    if is_in_world():
        raise ColfolioError(
            "this process is a rank of a world already (RANK or SLURM_PROCID is set): it starts "
            "no further ranks; let the launcher start as many as are needed"
        )
    # -P: as from the console script, modules of the working folder are not imported
    return run_ranks([sys.executable, "-P", "-m", "colfolio.cli", *argv], ranks)


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Run a command in so many processes that can join one world; see `launch`."""
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        _HOST, 0, is_master=True, wait_for_workers=False
    )
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarding(processes):
            for rank in range(ranks):
                processes.append(_start(command, rank, ranks, store.port))
            return _wait(processes)
    finally:
        for process in processes:
            process.kill()  # none is left, unless an error ended the waiting


def _start(command: Sequence[str], rank: int, ranks: int, port: int) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = (
        {"OMP_NUM_THREADS": str(threads)}
        | os.environ
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here: rank 0 opens none
        }
    )
    # in a group of its own, a rank gets Ctrl-C from here and not from the terminal as well
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, end those that do not follow."""
    result, failed_at = 0, float("inf")
    while any(process.poll() is None for process in processes):
        for process in processes:
            code = _exit_code(process)
            if code not in (None, 0, _INTERRUPTED) and failed_at == float("inf"):
                result, failed_at = code, time.monotonic()
        late = time.monotonic() - failed_at
        if late > _GRACE_SECONDS:
            _signal(processes, signal.SIGTERM if late < 2 * _GRACE_SECONDS else signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    codes = [_exit_code(process) or 0 for process in processes]
    return result or next((code for code in codes if code not in (0, _INTERRUPTED)), max(codes))


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """As a shell says it: 128 and the signal for a process that one ended."""
    code = process.poll()
    return 128 - code if code is not None and code < 0 else code


def _signal(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


@contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals that this process receives go to all ranks."""
    interrupts = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        _signal(processes, signal.SIGKILL if interrupts >= _LAST_INTERRUPT else number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
