"""Jobs spread over processes that survive a crash of one of them and never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int,
    on_done: Callable[[int], None],
    on_crash: Callable[[Job], Result],
) -> list[Result]:
    """The result of each job, in the order of the jobs.

    Args:
        work: a function of a module, so that a fresh process can import it.
        jobs: started in this order.
        processes: how many work at once; with 1, or one job, all is done in this process.
        on_done: told the number of each job that is done.
        on_crash: the result of a job whose process died (a fault in a native library); it is tried
            twice, the second time alone.
    """
    results: dict[int, Result] = {}

    def keep(number: int, result: Result) -> None:
        results[number] = result
        on_done(number)

    if processes == 1 or len(jobs) <= 1:
        for number, job in enumerate(jobs):
            keep(number, work(job))
        return [results[number] for number in range(len(jobs))]
    _run_pool(work, jobs, range(len(jobs)), processes, keep)
    for number in range(len(jobs)):
        if number not in results:
            _run_pool(work, jobs, [number], 1, keep)
        if number not in results:
            keep(number, on_crash(jobs[number]))
    return [results[number] for number in range(len(jobs))]


def _run_pool(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    numbers: Sequence[int],
    processes: int,
    keep: Callable[[int, Result], None],
) -> None:
    """Run the numbered jobs; those that a dying process took with it are left without result."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(numbers)), context, initializer=_start_worker)
    try:
        futures: dict[Future[Result], int] = {}
        for number in numbers:
            futures[pool.submit(work, jobs[number])] = number
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                continue
            keep(futures[future], result)
    except BrokenProcessPool:  # died while jobs were still being handed over
        return
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
