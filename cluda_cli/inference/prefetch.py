"""What happens beside the network: decoding ahead of it, copies to and from a GPU, writing behind it. H W pixels."""

import os
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

from cluda_cli.files import atomic

T = TypeVar("T")
R = TypeVar("R")

THREADS = min(max(os.cpu_count() or 1, 4), 16)  # that decode images ahead of the network, or write results behind it


def pin_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that a GPU can copy while it computes; for other devices as it is."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A pinned tensor on the device; a GPU copies it when it comes to it."""
    return tensor.to(device, non_blocking=device.type == "cuda")


class Fetched:
    """A tensor on its way to main memory. Only who reads it waits for the GPU."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self._tensor = tensor.to("cpu", non_blocking=on_gpu)
        self._arrived = torch.cuda.current_stream(tensor.device).record_event() if on_gpu else None

    def numpy(self) -> NDArray[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.numpy()


def prefetch(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in order, computed in threads a few items ahead. An exception surfaces at its item."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # after an error or Ctrl-C nothing more is begun
                future.cancel()


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write grey (H W) or RGB (H W 3) pixels atomically as PNG.

    Run lengths alone take a quarter of the time of Pillow's usual compression of an overlay, and as many bytes.
    """
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_type=zlib.Z_RLE)
