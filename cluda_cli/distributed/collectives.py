"""Several processes that train one run, each on its own device and with its own part of every batch.

The processes compute what one process with the joint batch computes. Rank r holds the images at its positions of that
batch. Every process runs backward on a loss whose mean over the processes is the joint loss; where it depends on the
images of others, its gradient is that of the sum over the processes, and the mean of all gradients is the joint one.

Alone, a process never touches torch.distributed: sums and gathered rows are then what goes in.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cluda_cli import console
from cluda_cli.distributed import launch
from cluda_cli.errors import CludaError, EnvironmentProblem, RunError, SettingsError, first_line

ALONE = launch.Place(rank=0, local_rank=0, world_size=1, talks=True)
BUCKET = 2**24
"""Numbers of a gradient that travel at once: enough that the start of a transfer costs nothing beside it."""

_place = ALONE


class RankLost(Exception):  # noqa: N818  the error is the peer's, and it has told it
    """Another process has ended while this one waited for it."""


def rank() -> int:
    """Number of this process; 0 writes files and talks."""
    return _place.rank


def world_size() -> int:
    return _place.world_size


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other processes of the run, if there are any, for the length of the block.

    Of all that goes wrong in the processes, only the first is told; the others end quietly, with their exit code.
    Raises EnvironmentProblem if the processes do not meet.
    """
    global _place
    place = launch.place()
    if place is None:
        yield
        return
    _end_with_launcher()
    if place.rank == 0:
        console.unmute()
    store = _meet(place)
    _place = place
    try:
        yield
        any_rank(False)  # nobody leaves while others work
        dist.destroy_process_group()
    except RankLost:
        raise SystemExit(1) from None
    except (Exception, KeyboardInterrupt) as problem:
        if not _first_to_tell(store):
            raise SystemExit(problem.exit_code if isinstance(problem, CludaError) else 1) from None
        console.unmute()
        raise
    finally:
        _place = ALONE


def _meet(place: launch.Place) -> dist.Store:
    """Tensors in main memory travel over gloo, those of GPUs over NCCL."""
    try:
        store, _, _ = next(iter(dist.rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.world_size)
    except (RuntimeError, ValueError) as error:
        what = f"the {place.world_size} processes of the run do not meet ({first_line(error)})"
        raise EnvironmentProblem(what, "--devices", "check MASTER_ADDR and MASTER_PORT, and the network") from error
    return store


def _first_to_tell(store: dist.Store) -> bool:
    try:
        return store.add("told", 1) == 1
    except RuntimeError:  # process 0 keeps the store: it has ended, and told why
        return False


def _end_with_launcher() -> None:
    """End when the launcher is killed outright, rather than hold the device for nobody."""
    parent = os.getppid()
    if os.environ.get(launch.LAUNCHER) != str(parent):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def local_device(wanted: str) -> str:
    """The name of this process's own device: of the GPU with its number where `wanted` is auto or cuda.

    Raises SettingsError for a name that means one device, EnvironmentProblem if there are too few.
    """
    if world_size() == 1 or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return wanted
    if wanted not in {"auto", "cuda"}:
        what = f'"{wanted}" is one device, the run has {world_size()} processes'
        remedy = "give auto, cuda or cpu; CUDA_VISIBLE_DEVICES chooses among GPUs"
        raise SettingsError(what, "training.device", remedy)
    have = torch.cuda.device_count()
    if _place.local_rank >= have:
        what = f"process {rank()} of {world_size()} needs GPU {_place.local_rank}, this machine has {have}"
        raise EnvironmentProblem(what, "--devices", "start as many processes as there are GPUs, or --device cpu")
    torch.cuda.set_device(_place.local_rank)
    return f"cuda:{_place.local_rank}"


def local_positions(batch_size: int) -> range:
    """Which images of the joint batch this process has. Raises SettingsError if they cannot be shared out evenly."""
    each, rest = divmod(batch_size, world_size())
    if rest:
        what = f"{batch_size} images per domain cannot be shared evenly among {world_size()} devices"
        raise SettingsError(what, "data.batch_size", f"give a multiple of {world_size()}")
    return range(rank() * each, (rank() + 1) * each)


def global_count(count: int) -> int:
    """Images of the joint batch where each process has `count`."""
    return count * world_size()


def local_rows(rows: Tensor) -> Tensor:
    """This process's rows of what was made for the joint batch."""
    return rows if world_size() == 1 else rows.chunk(world_size())[rank()]


@contextmanager
def _with_peers() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost from error


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, without a gradient."""
    if world_size() == 1:
        return tensor
    summed = tensor.detach().clone()
    with _with_peers():
        dist.all_reduce(summed)
    return summed


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the processes, without a gradient."""
    return tensor if world_size() == 1 else all_reduce_sum(tensor) / world_size()


def all_reduce_any(mask: Tensor) -> Tensor:
    """Where a boolean mask of the same shape is set in any process."""
    return mask if world_size() == 1 else all_reduce_sum(mask.int()) > 0


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, as many of each, in the order of the joint batch; n ... -> world_size * n ...

    Whoever makes a loss of them makes the same loss in all processes, which spares the way back: by the rule at the top
    of this file, the gradient of a row is world_size times what the loss of this process says.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        sent = rows.byte() if rows.dtype == torch.bool else rows.contiguous()
        parts = [torch.empty_like(sent) for _ in range(world_size())]
        with _with_peers():
            dist.all_gather(parts, sent)
        return torch.cat(parts).to(rows.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return local_rows(gradient) * world_size()


def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type, such as gradients, by their mean over the processes."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET or i == len(tensors) - 1:
            means = all_reduce_mean(torch.cat([t.flatten() for t in bucket])).split([t.numel() for t in bucket])
            for old, new in zip(bucket, means, strict=True):
                old.copy_(new.view_as(old))
            bucket = []


def any_rank(flag: bool) -> bool:
    """Whether it is true in any process; waits for all of them."""
    return bool(all_reduce_any(torch.tensor(flag)))


@contextmanager
def fail_together() -> Iterator[None]:
    """What each process does on its own: what fails in one, fails in all with the same error. Waits for all."""
    if world_size() == 1:
        yield
        return
    problem: Exception | None = None
    try:
        yield
    except RankLost:
        raise
    except Exception as error:
        problem = error
    if not any_rank(problem is not None):
        return
    sent = problem if isinstance(problem, CludaError) or problem is None else RunError(first_line(problem))
    received: list[CludaError | None] = [None] * world_size()
    with _with_peers():
        dist.all_gather_object(received, sent)
    raise problem or next(p for p in received if p is not None)
