"""Work that overlaps with the network: threads that read and write, and copies to and from a GPU. H W pixels."""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cluda_cli.distributed.place import usable_cores
from cluda_cli.files import atomic

T = TypeVar("T")
R = TypeVar("R")

FEWEST_THREADS, MOST_THREADS = 4, 16
"""Bounds of the number of threads that read images or write results; reading waits for the disk, so few cores do."""
PIXELS_AHEAD = 2**26
"""Pixels of images that threads hold at a time; about 10 bytes each while one is decoded."""


def pin_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """Pin the memory of a tensor if `device` is a GPU, so that it copies the tensor while it computes."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a pinned tensor to the device. The caller does not wait for a GPU."""
    return tensor.to(device, non_blocking=device.type == "cuda")


class HostCopy:
    """A copy of a tensor in main memory. Only `numpy` waits for the GPU to finish the copy."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self._tensor = tensor.to("cpu", non_blocking=on_gpu)
        self.shape = tensor.shape
        self._arrived = torch.cuda.current_stream(tensor.device).record_event() if on_gpu else None

    def numpy(self) -> NDArray[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.numpy()


def prefetch(
    function: Callable[[T], R], items: Iterable[T], count_pixels: Callable[[T], int] = lambda _: 0
) -> Iterator[R]:
    """`map` in threads, one for each usable core within bounds, as many items ahead as there are threads.

    Results keep their order. An exception is raised at its item. Items that are ahead have at most PIXELS_AHEAD pixels
    together, as `count_pixels` counts them. A larger one is alone.
    """
    threads = min(max(usable_cores(), FEWEST_THREADS), MOST_THREADS)
    pending: deque[tuple[Future[R], int]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pixels = count_pixels(item)
                while pending and pixels + sum(ahead for _, ahead in pending) > PIXELS_AHEAD:
                    yield pending.popleft()[0].result()
                pending.append((pool.submit(function, item), pixels))
                if len(pending) > threads:
                    yield pending.popleft()[0].result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:  # after an error or Ctrl-C no other item begins
                future.cancel()


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write grey (H W) or RGB (H W 3) pixels atomically as PNG.

    For an overlay, run-length compression takes a quarter of the time of Pillow's default and gives as many bytes.
    """
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_type=zlib.Z_RLE)
