"""What training steps cost: their time as training does them, memory, the largest batch that fits, loading."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch

from cluda_cli.data.batch import Batch, to_device
from cluda_cli.data.datasets import Datasets
from cluda_cli.data.streams import Steps, count_workers, draws
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.errors import CludaError
from cluda_cli.measure.spans import wait_for_device
from cluda_cli.settings import Settings

MOST_IMAGES = 256
"""No batch with more images per domain is tried."""
TIMED_BATCHES = 3
"""Batches whose loading is timed, after one that is not."""


@dataclass(frozen=True)
class Spread:
    """Seconds of something that was timed several times."""

    median: float
    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        return cls(statistics.median(seconds), statistics.fmean(seconds), min(seconds), max(seconds))


def time_steps(run: Run, stream: Iterator[Batch], count: int, advance: Callable[[], None]) -> list[float]:
    """Seconds of each of `count` steps with their batches.

    Nothing waits for a GPU between them: its own events tell when it came from one step to the next.
    """
    marks = [_mark(run.device)]
    for _ in range(count):
        training_step(run, to_device(next(stream), run.device))
        marks.append(_mark(run.device))
        advance()
    wait_for_device(run.device)
    if run.device.type == "cuda":
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]
    return [end - begin for begin, end in pairwise(marks)]


def _mark(device: torch.device) -> Any:
    """Mark this moment: a recorded event on a CUDA device, elsewhere the time in seconds."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    wait_for_device(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Memory:
    """Peak memory in use between two moments, in bytes; None where the system does not report it."""

    what: str
    """Which memory, and how it was measured."""
    peak: int | None
    reserved: int | None = None
    """GPU only: peak of what torch's allocator reserved."""
    total: int | None = None
    """GPU only: memory of the device."""


class MemoryWatch:
    """Measures the peak memory of a device from its construction on; construct it before the networks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = _peak_resident()
        if device.type == "cuda":
            torch.cuda.init()  # without it there is no peak to reset
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> Memory:
        if self.device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            return Memory("GPU memory, peak of tensors", peak, reserved, total)
        if self.device.type == "mps":
            return Memory("GPU memory in use after the steps", torch.mps.driver_allocated_memory())
        what = "main memory of this process, growth of its peak (loader processes have their own)"
        return Memory(what, None if self._before is None else _peak_resident() - self._before)


def _peak_resident() -> int | None:
    """Peak resident memory of this process, in bytes; None on systems that do not count it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def find_largest_step(run: Run, batch: Batch) -> int:
    """Images per domain of the largest step that fits, made of those of `batch`; see `find_largest_batch`.

    Without `torch.compile`, which would compile for each size anew, and whose steps take less memory as a rule.
    """
    usual, run.forward = run.forward, run.student
    try:
        return find_largest_batch(partial(step_fits, run, batch), len(batch["target"].image))
    finally:
        run.forward = usual


def find_largest_batch(fits: Callable[[int], bool], start: int, most: int = MOST_IMAGES) -> int:
    """The largest batch that fits, at most `most` unless `start` is more; 0 if not even one image fits.

    Doubles from `start` until a batch does not fit and then halves the gap, down to an eighth of what fits.
    """
    low, high = (start, 0) if fits(start) else (0, start)  # `high` does not fit; 0: none found yet
    while not high and low < most:
        middle = min(2 * low, most)
        low, high = (middle, 0) if fits(middle) else (low, middle)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_fits(run: Run, batch: Batch, images: int) -> bool:
    """Whether a step with so many images per domain, made of those of `batch`, fits into the device's memory."""
    fits = True
    try:
        index = (torch.arange(images) % len(batch["target"].image)).to(run.device)
        larger = {name: crops.select(index) for name, crops in batch.items()}
        training_step(run, larger)
        wait_for_device(run.device)
    except torch.OutOfMemoryError:
        fits = False
    # The exception kept its frames, and with them their tensors, alive until here.
    larger = None
    run.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


@dataclass(frozen=True)
class Loading:
    """How fast batches are made."""

    processes: int
    batches_per_second: float
    """Of one process."""
    wanted: int
    """Processes that data.workers asks for; cores bound them."""

    def seconds_per_step(self) -> float:
        """Lower bound of a step's seconds; 0 without loader processes, where loading is a part of the step."""
        return 1 / (self.processes * self.batches_per_second) if self.processes else 0.0


def measure_loading(settings: Settings, datasets: Datasets, first: int) -> Loading:
    """Time some batches, made in this process on one thread, as a loader process makes them."""
    data, threads = settings.data, torch.get_num_threads()
    drawn = draws(datasets.sources, datasets.unlabelled, data, datasets.labelled)
    steps = Steps(drawn, settings.training.seed, range(data.batch_size))
    torch.set_num_threads(1)
    try:
        for i in range(TIMED_BATCHES + 1):
            if i == 1:
                began = time.perf_counter()
            batch = steps[first + i, None]
            if isinstance(batch, CludaError):
                raise batch
        return Loading(count_workers(data), TIMED_BATCHES / (time.perf_counter() - began), data.workers)
    finally:
        torch.set_num_threads(threads)
