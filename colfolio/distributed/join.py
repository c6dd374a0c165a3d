"""Which world a process finds itself in, as its launcher says, and how it joins it.

- `torchrun`, `accelerate launch` and `colfolio` itself set RANK, WORLD_SIZE, LOCAL_RANK,
  MASTER_ADDR and MASTER_PORT;
- `srun` sets SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID;
- Ray Train, or a program of the user's own, has initialised the process group;
- else it is a world of one.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from colfolio.distributed.world import World
from colfolio.errors import ColfolioError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# `srun` sets the number of tasks of the step; `SLURM_NTASKS` is set in a batch script too, where
# only one process runs
_SLURM = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
_SLURM_PORTS = range(15_000, 25_000)


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all, and where they meet, as `init_process_group` takes it."""

    rank: int
    size: int
    local_rank: int
    meeting_point: str


def is_in_world() -> bool:
    """Whether a launcher started this process as one of a world, even of one."""
    return dist.is_initialized() or find_place(os.environ) is not None


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """The world that this process finds itself in; it is left again at the end.

    A process group that is there already is used and kept. The rank's GPU becomes the current one.
    After an error the group is left to the end of the process: others may still wait in it, and to
    leave it in order could mean to wait for them.

    Args:
        device: what the user asked for; None takes a GPU if there is one. Which of the GPUs a rank
            has is not the user's to say.

    Raises:
        ColfolioError: the launcher's variables are incomplete or wrong, or the ranks of a host
            need more GPUs than it has.
    """
    if dist.is_initialized():
        host = dist.new_group(backend="gloo")
        assert isinstance(host, dist.ProcessGroup)
        yield _described(host)
        return
    place = find_place(os.environ)
    if place is None or place.size == 1:
        yield World()
        return
    uses_cuda = _uses_cuda(device, place.size)
    if uses_cuda:
        torch.cuda.set_device(_gpu_of(place.local_rank, torch.cuda.device_count()))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if uses_cuda else "gloo",
        init_method=place.meeting_point,
        rank=place.rank,
        world_size=place.size,
    )
    world = _described(None)
    if uses_cuda:
        _check_gpus(world)
    yield world
    dist.destroy_process_group()


def end_rank(code: int) -> None:
    """End this process with `code` if a launcher started it as a rank; else do nothing.

    The interpreter is not wound up. A thread of gloo outlives its group wherever `fully_shard` has
    seen it, and may still hold Python objects of the last exchange: when it gives them back to an
    interpreter that is being wound up, it aborts the process (SIGABRT), after all work is done.
    """
    if not any(names[0] in os.environ for names in (_LAUNCHER, _SLURM)):
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What the launcher's variables say; None if there is no launcher.

    Raises:
        ColfolioError: some of them are missing, or not numbers that fit together.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        _check_complete(environment, _LAUNCHER)
        names, meeting_point = _LAUNCHER[:3], "env://"
    elif "SLURM_STEP_NUM_TASKS" in environment:
        _check_complete(environment, _SLURM)
        names, meeting_point = _SLURM[:3], _slurm_meeting_point(environment)
    else:
        return None
    rank, size, local_rank = (_number(environment, name) for name in names)
    if not 0 <= rank < size or local_rank > rank:
        raise ColfolioError(
            f"{names[0]} must be below {names[1]}, and {names[2]} not above it: found {rank}, "
            f"{size} and {local_rank}; start all ranks by one launcher"
        )
    return Place(rank, size, local_rank, meeting_point)


def _check_complete(environment: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        present = [name for name in names if name in environment]
        raise ColfolioError(
            f"{' and '.join(present)} set, but not {' and '.join(missing)}: start all ranks by "
            "torchrun, accelerate launch or srun, or unset them to train in one process"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ColfolioError(
            f"{name} must be a whole number, found {environment[name]!r}; the launcher sets it"
        ) from None


def _slurm_meeting_point(environment: Mapping[str, str]) -> str:
    """The first host of the step, and a port that follows from the job.

    >>> _slurm_meeting_point({"SLURM_STEP_NODELIST": "gpu[07-09,12],big1", "SLURM_JOB_ID": "3"})
    'tcp://gpu07:15003'
    """
    hosts = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"])
    steps = _number(environment, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environment else 0
    number = _number(environment, "SLURM_JOB_ID") + steps
    host = environment.get("MASTER_ADDR", hosts.split(",")[0])
    port = environment.get("MASTER_PORT", _SLURM_PORTS[number % len(_SLURM_PORTS)])
    return f"tcp://{host}:{port}"


def _uses_cuda(device: str | None, size: int) -> bool:
    if device is None:
        return torch.cuda.is_available()
    if device not in ("cpu", "cuda"):
        raise ColfolioError(
            f"device {device!r}: each of {size} ranks takes the device of its own number; "
            "ask for cuda or cpu, or train in one process"
        )
    return device == "cuda"


def _gpu_of(local_rank: int, num_gpus: int) -> int:
    """The number of a rank's GPU; a rank that sees one alone was given it by its launcher."""
    if num_gpus == 1:
        return 0
    if local_rank >= num_gpus:
        raise ColfolioError(
            f"LOCAL_RANK is {local_rank}, but {num_gpus} GPUs are visible here (see "
            "CUDA_VISIBLE_DEVICES): start at most as many ranks on a host as it has GPUs, "
            "or ask for the device cpu"
        )
    return local_rank


def _described(host: dist.ProcessGroup | None) -> World:
    """This rank of the default group; ranks of one host are counted by its name."""
    rank, name = dist.get_rank(), socket.gethostname()
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, name, group=host)
    return World(rank, len(names), names[:rank].count(name), names.count(name), host)


def _check_gpus(world: World) -> None:
    """Two ranks that each see one GPU may see the same, which NCCL refuses later and darkly."""
    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    gpus = world.gather_objects(gpu)
    first = gpus.index(gpu)
    if first != world.rank:
        raise ColfolioError(
            f"LOCAL_RANK {world.local_rank}: ranks {first} and {world.rank} have the same GPU "
            f"({gpu}); start at most as many ranks on a host as it has GPUs"
        )
