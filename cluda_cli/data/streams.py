"""Endless, resumable batches of crops.

Batch number t is a function of (seed, t, law) alone: any process can make it, in any order, without what came before.
"""

import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cluda_cli import settings
from cluda_cli.data.batch import Batch, Crops
from cluda_cli.data.cache import SPLIT
from cluda_cli.data.draws import Draw, LabelledImages, Law, ReferenceImages, Sources, TargetImages, require_classes
from cluda_cli.data.index import Index, joint_classes
from cluda_cli.distributed.children import STOP_SIGNALS, end_with_parent, kill_children
from cluda_cli.distributed.place import usable_cores
from cluda_cli.errors import CludaError, EnvironmentProblem
from cluda_cli.seeds import derive_seed

LOOKAHEAD = 20
"""Batches that are requested ahead of their step at most; so old is the state that a law may depend on."""

DRAWN_LIKE = {"reference": "target"}
"""Crops that are drawn with the generator of others, so that they show the same place."""


def batches(
    sources: Sequence[Index],
    target: Index,
    data: settings.Data,
    seed: int,
    start: int,
    stop: int,
    *,
    labelled: Index | None = None,
    pin_memory: bool = False,
    positions: range | None = None,
    source_law: Callable[[int], Law] = lambda _: None,
    paired: bool = False,
) -> Generator[Batch, None, None]:
    """The batches of steps start, ..., stop - 1, made by loader processes; without any, the same batches.

    `target` has the training images that are used without labels, `labelled` those of the target that have labels.

    Close it (contextlib.closing) to end the processes when not all batches are wanted. There are `data.workers`
    processes, at most one for each usable core.

    `pin_memory` speeds up copies to a CUDA device and needs one. `positions` are the images wanted of each batch;
    unset: all of them. `source_law` gives the class probabilities of labelled images for the batch of a step when that
    batch is requested, at most `LOOKAHEAD` steps before its turn. `paired` adds the paired pictures of target images.

    Raises DataError at once if a source has no labels, a domain no training images, all labels the same class, or no
    image a paired picture that is asked for; SettingsError if the margins leave nothing of a target image; while
    iterating, DataError that names an unreadable file.
    """
    positions = range(data.batch_size) if positions is None else positions
    steps = Steps(draws(sources, target, data, labelled, paired), seed, positions)
    workers = min(count_workers(data), max(stop - start, 0))
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=((step, source_law(step)) for step in range(start, stop)),
        num_workers=workers,
        prefetch_factor=min(2, LOOKAHEAD // workers) if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=_context() if workers else None,
        generator=torch.Generator(),  # the loader would draw from the global one
    )
    return _iterate(loader)


def count_workers(data: settings.Data) -> int:
    """Loader processes of a long run: `data.workers`, at most one for each usable core and for each batch ahead."""
    return min(data.workers, usable_cores(), LOOKAHEAD)


def draws(
    sources: Sequence[Index], target: Index, data: settings.Data, labelled: Index | None = None, paired: bool = False
) -> dict[str, Draw]:
    """How the crops of each name are drawn; names without images are left out."""
    truth = [*sources, *([labelled] if labelled else [])]
    found: dict[str, Draw] = {}
    if sources:
        found["source"] = Sources(sources, joint_classes(truth), data)
    if labelled and labelled.labelled(SPLIT):
        kind = "labelled target"
        found["labelled"] = LabelledImages(labelled, joint_classes(truth), data, data.target_box, kind)
    require_classes(truth)
    found["target"] = TargetImages(target, data)
    return found | {"reference": ReferenceImages(target, data)} if paired else found


class Steps(Dataset["Batch | CludaError"]):
    """The batches by step and law."""

    def __init__(self, draws: Mapping[str, Draw], seed: int, positions: range) -> None:
        self.draws, self.seed, self.positions = draws, seed, positions

    def __getitem__(self, request: tuple[int, Law]) -> "Batch | CludaError":
        """One batch. An error is returned, not raised: a loader process would wrap it in its traceback."""
        step, law = request
        try:
            return {
                name: Crops.stack([draw(self._generator(name, step, i), law) for i in self.positions])
                for name, draw in self.draws.items()
            }
        except CludaError as error:
            return error

    def _generator(self, name: str, step: int, position: int) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, DRAWN_LIKE.get(name, name), step, position))


def _iterate(loader: "DataLoader[Batch | CludaError]") -> Generator[Batch, None, None]:
    """Pass batches on and raise what the loader processes report."""
    try:
        for batch in loader:
            if isinstance(batch, CludaError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # A process that dies shows as the loader's own error, or as a broken connection. An error that a process
        # reports ("Caught ... in DataLoader worker") is a fault of this program and stays as it is.
        died = str(error).startswith("DataLoader worker") or not isinstance(error, RuntimeError)
        if not loader.num_workers or not died or "in DataLoader worker" in str(error):
            raise
        if "path too long" in str(error):  # of the sockets between the processes
            what = "is too long a path for the sockets of loader processes"
            raise EnvironmentProblem(what, tempfile.gettempdir(), "set TMPDIR to a short path, such as /tmp") from error
        kill_children()  # the others would wait for more requests, and this process for their end
        raise EnvironmentProblem(
            "a loader process ended unexpectedly", "data.workers", "memory may be short: lower data.workers, or set 0"
        ) from error


def _context() -> multiprocessing.context.BaseContext:
    """Processes that start clean: a plain fork of a process with GPU and progress threads can hang."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not in each process
    return context


def _start_worker(_: int) -> None:
    """Leave stopping to the training process, which saves first and then ends its loaders.

    Ctrl-C and a scheduler's SIGTERM reach all processes at once; a second SIGTERM comes from the training process. When
    that process is killed, its loaders end by themselves: the loader's own watch sees only the server that forks.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    end_with_parent()
