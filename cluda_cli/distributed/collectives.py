"""The processes that train one run together, each with its own device and its own images, and their collectives.

They compute what one process computes with the joint batch, of which each rank holds the images at its positions. A
rank runs backward on its own loss. The mean of these losses over the ranks is the loss of the joint batch, and the mean
of the gradients is its gradient.

A single process never touches torch.distributed: a sum, a mean or gathered rows are then the argument itself.
"""

import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor

from cluda_cli import console
from cluda_cli.distributed.place import Place, read_place
from cluda_cli.errors import CludaError, EnvironmentProblem, SettingsError, first_line

ALONE = Place(rank=0, local_rank=0, world_size=1, prints=True)
BUCKET = 2**24
"""Gradient elements of one all-reduce; so many that its latency costs little beside the transfer."""

_place = ALONE


class RankLost(Exception):  # noqa: N818  the rank that has ended reports the error
    """Another process has ended while this one waited for it in a collective."""


def rank() -> int:
    """Number of this process; rank 0 writes the files and prints."""
    return _place.rank


def world_size() -> int:
    """Number of processes."""
    return _place.world_size


@contextmanager
def process_group() -> Iterator[None]:
    """Form a process group with the other ranks of the run, if there are any, for the length of the block.

    Only the first rank that fails prints its error; the others exit with their code and print nothing. Raises
    EnvironmentProblem if the ranks cannot connect.
    """
    global _place
    place = read_place()
    if place is None:
        yield
        return
    if place.rank == 0:
        console.unmute()
    store = _init_process_group(place)
    _place = place
    try:
        yield
        any_rank(False)  # a rank that ended now would fail the collectives of the others
        dist.destroy_process_group()
    except RankLost:
        raise SystemExit(1) from None
    except (Exception, KeyboardInterrupt) as problem:
        if not _is_first_failure(store):
            raise SystemExit(problem.exit_code if isinstance(problem, CludaError) else 1) from None
        console.unmute()
        raise
    finally:
        _place = ALONE


def _init_process_group(place: Place) -> dist.Store:
    """Connect with gloo for tensors in main memory and NCCL for those on GPUs; return the store of the group."""
    try:
        store, _, _ = next(iter(dist.rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.world_size)
    except (RuntimeError, ValueError) as error:
        what = f"the {place.world_size} processes of the run do not meet ({first_line(error)})"
        raise EnvironmentProblem(what, "--devices", "check MASTER_ADDR and MASTER_PORT, and the network") from error
    return store


def _is_first_failure(store: dist.Store) -> bool:
    """Whether no other rank has failed before this one."""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # rank 0 serves the store and has ended, after it printed its error
        return False


def local_device(wanted: str) -> str:
    """The device of this rank: the GPU with its local rank where `wanted` is auto or cuda, otherwise `wanted`.

    Raises SettingsError for the name of one GPU, EnvironmentProblem if this machine has too few GPUs.
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
    """Positions in the joint batch of this rank's images. Raises SettingsError if not all ranks get equally many."""
    each, rest = divmod(batch_size, world_size())
    if rest:
        what = f"{batch_size} images per domain cannot be shared evenly among {world_size()} devices"
        raise SettingsError(what, "data.batch_size", f"give a multiple of {world_size()}")
    return range(rank() * each, (rank() + 1) * each)


def local_rows(rows: Tensor) -> Tensor:
    """The rows of this rank out of those of the joint batch; world_size * n ... -> n ..."""
    return rows if world_size() == 1 else rows.chunk(world_size())[rank()]


@contextmanager
def _raise_rank_lost() -> Iterator[None]:
    """Turn the error of a collective whose peer has ended into RankLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost from error


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks, without a gradient."""
    if world_size() == 1:
        return tensor
    summed = tensor.detach().clone()
    with _raise_rank_lost():
        dist.all_reduce(summed)
    return summed


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, without a gradient."""
    return tensor if world_size() == 1 else all_reduce_sum(tensor) / world_size()


def all_reduce_any(mask: Tensor) -> Tensor:
    """Where a boolean mask, of one shape on all ranks, is set on any of them."""
    return mask if world_size() == 1 else all_reduce_sum(mask.int()) > 0


def all_gather_rows(rows: Tensor) -> Tensor:
    """All-gather the rows of all ranks in the order of the joint batch; n ... -> world_size * n ...

    The caller must compute the same loss from them on every rank. The backward pass then needs no all-reduce: the sum
    over the ranks of the gradient of a row is world_size times its gradient on this rank.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        own = rows.byte() if rows.dtype == torch.bool else rows.contiguous()
        gathered = [torch.empty_like(own) for _ in range(world_size())]
        with _raise_rank_lost():
            dist.all_gather(gathered, own)
        return torch.cat(gathered).to(rows.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return local_rows(gradient) * world_size()


def gather_tensor(tensor: Tensor) -> Tensor:
    """All-gather a sharded tensor; any other is returned as it is. All ranks must call it.

    The gradient of a sharded parameter is this rank's part of that of the whole. So every rank must compute the same
    loss from what it gathers.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype, such as gradients, by their mean over the ranks, in place."""
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


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, such as the running statistics that each rank has of its own images."""
    for buffer in module.buffers() if world_size() > 1 else ():
        with _raise_rank_lost():
            dist.broadcast(buffer, src=0)


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank; all ranks must call it."""
    return bool(all_reduce_any(torch.tensor(flag)))


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise on all ranks the error that the block raises on one of them, that of the lowest rank if several fail.

    All ranks must enter and leave the block. The other ranks get a copy with the traceback of the rank that failed, so
    the class of the error, its message and its exit code are those that one process would give.
    """
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
    copies: list[Exception | None] = [None] * world_size()
    with _raise_rank_lost():
        dist.all_gather_object(copies, problem and _copy_for_other_ranks(problem))
    failed, copy = next((r, error) for r, error in enumerate(copies) if error is not None)
    raise problem if problem is not None and failed == rank() else copy


def _copy_for_other_ranks(problem: Exception) -> Exception:
    """The error with its traceback as a note; a RuntimeError with its first line if it cannot be pickled."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(problem))
    except Exception:  # the constructor of the error decides what goes wrong
        copy = RuntimeError(first_line(problem))
    copy.add_note(f"It was raised by rank {rank()}:\n" + "".join(traceback.format_exception(problem)))
    return copy


def convert_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Let the batch norms below `module` normalise with the statistics of all ranks, where they run on GPUs.

    Parameters, buffers and their names stay. torch synchronises no batch norm on a CPU: each rank then normalises with
    its own images.
    """
    if world_size() > 1 and device.type == "cuda":
        convert_sync_batchnorm(module)
