"""Runs a function of a test module in several processes that form a world over gloo.

Shapes and types in signatures are executed there too.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import install_import_hook
from torch.multiprocessing import start_processes

_TIMEOUT_SECONDS = 120.0


def run_in_ranks(function, size, folder, *arguments, timeout=_TIMEOUT_SECONDS):
    """What `function(world, *arguments)` returns on each rank, in the order of ranks.

    Args:
        function: at the top level of a module that a process can load by its path.
        size: how many processes.
        folder: an empty one, for what they exchange.

    Raises:
        ProcessRaisedException: with the traceback of the rank that failed.
        TimeoutError: they did not end in time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = sys.modules[function.__module__].__file__
    context = start_processes(
        _run_rank,
        (size, str(folder), source, function.__name__, arguments),
        nprocs=size,
        join=False,
        start_method="spawn",
    )
    assert context is not None
    end = time.monotonic() + timeout
    while not context.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} in {size} ranks: {timeout:.0f} s are over")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _run_rank(rank, size, folder, source, name, arguments):
    torch.set_num_threads(1)
    install_import_hook("colfolio", "beartype.beartype")
    spec = importlib.util.spec_from_file_location("in_ranks", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["in_ranks"] = module
    spec.loader.exec_module(module)

    from colfolio.distributed import World

    store = f"file://{Path(folder).absolute() / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    result = getattr(module, name)(World(rank, size, rank, size), *arguments)
    torch.save(result, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # as `end_rank` does, and for its reason
