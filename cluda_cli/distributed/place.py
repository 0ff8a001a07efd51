"""Where this process runs: which rank of how many it is, and on how many cores. Imports no torch."""

import os
from dataclasses import dataclass
from multiprocessing import parent_process


@dataclass(frozen=True)
class Place:
    """Position of this process among those that train one run."""

    rank: int
    """0 .. world_size - 1; rank 0 writes the files and prints."""
    local_rank: int
    """Rank among the processes of this machine, which is also the number of its GPU."""
    world_size: int
    prints: bool
    """Whether it prints before the run begins: rank 0 under torchrun. With `--devices` the launcher has done so."""


def read_place() -> Place | None:
    """The place that the environment variables of torchrun give to this process; None for a run of one process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    if any(name not in os.environ for name in names) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    rank, local_rank, world_size = (int(os.environ[name]) for name in names[:3])
    return Place(rank, local_rank, world_size, prints=rank == 0 and parent_process() is None)


def usable_cores() -> int:
    """Number of cores that this process may run on, at least 1; a scheduler may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
