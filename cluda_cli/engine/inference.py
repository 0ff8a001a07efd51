"""Logits and train ids of whole images of any size, shared by validation, `eval`, `predict` and `pseudo-label`.

B windows, K classes, H W original size, h w resized size, n rows of a band, a b cells of the network's output grid.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.transforms import fit_box, normalise, resize_image
from cluda_cli.files import atomic
from cluda_cli.models.boxes import Size, window_corners
from cluda_cli.models.segmenter import Segmenter

T = TypeVar("T")
R = TypeVar("R")

# These bound memory; results do not depend on them.
WINDOWS_AT_ONCE = 4  # windows in one forward
PIXELS_AT_ONCE = 2**20  # pixels of the original image whose logits are alive at once, when only labels are wanted
THREADS = 4  # that decode images ahead of the network, or write results behind it


@torch.inference_mode()
def image_logits(network: Segmenter, image: Tensor, box: Size | None, evaluation: settings.Evaluation) -> Tensor:
    """Logits of one image at its original size.  # uint8 3 H W -> float32 K H W

    The image is resized to fit `box`, normalised, and seen whole or through sliding windows. Logits are resized
    bilinearly (half-pixel centres) to the network's input, then to the original size, as in the released evaluation
    of DAFormer and HRDA. The network runs in eval mode on its own device, where the result lies, and keeps its modes.
    """
    original = (image.shape[1], image.shape[2])
    return _coarse_logits(network, image, box, evaluation).band(range(original[0]), original)


@torch.inference_mode()
def predict_labels(
    network: Segmenter, image: Tensor, box: Size | None, evaluation: settings.Evaluation
) -> tuple[Tensor, Tensor]:
    """Most probable class and its softmax probability by `image_logits`.  # uint8 3 H W -> uint8 H W, float32 H W

    Logits at the original size exist for one band of rows at a time.
    """
    original = (image.shape[1], image.shape[2])
    coarse = _coarse_logits(network, image, box, evaluation)
    labels, confidences = [], []
    step = max(PIXELS_AT_ONCE // original[1], 1)
    for top in range(0, original[0], step):
        logits = coarse.band(range(top, min(top + step, original[0])), original)  # K n W
        best, label = logits.max(0)
        labels.append(label.to(torch.uint8))
        confidences.append((best - logits.logsumexp(0)).exp())
    return torch.cat(labels), torch.cat(confidences)


@dataclass(frozen=True)
class _Coarse:
    """Logits of a resized image on a grid that may reach beyond it."""

    logits: Tensor  # 1 K a b
    covered: Size  # what the grid covers: the resized image and its padding at bottom and right
    size: Size  # h w

    def band(self, rows: range, original: Size) -> Tensor:
        """Some rows of the logits at the original size, made from the coarse rows they need.  # K n W"""
        first, second, weight = _taps(rows, self.size[0], original[0])
        needed = range(int(first[0]), int(second[-1]) + 1)
        fine = _resize_rows(self.logits, _taps(needed, self.logits.shape[2], self.covered[0]), self.covered[1])
        fine = fine[..., : self.size[1]]  # without the padding at the right; `needed` has none of that at the bottom
        return _resize_rows(fine, (first - needed.start, second - needed.start, weight), original[1])[0]


def _taps(rows: range, source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both source rows and the weight of the second for some rows of an axis resized from `source` to `target`."""
    position = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    position = position.clamp(0, source - 1)
    first = position.long()
    return first, (first + 1).clamp(max=source - 1), (position - first).float()


def _resize_rows(logits: Tensor, taps: tuple[Tensor, Tensor, Tensor], width: int) -> Tensor:
    """Bilinear resizing to some rows and `width` columns.  # 1 K a b -> 1 K n width"""
    first, second, weight = (t.to(logits.device) for t in taps)
    rows = torch.lerp(logits[..., first, :], logits[..., second, :], weight[:, None])
    return F.interpolate(rows, (len(first), width), mode="bilinear", align_corners=False)


def _coarse_logits(network: Segmenter, image: Tensor, box: Size | None, evaluation: settings.Evaluation) -> _Coarse:
    """Resize, normalise, forward.  # uint8 3 H W"""
    size = fit_box((image.shape[1], image.shape[2]), box)
    device = next(network.parameters()).device
    resized = normalise(resize_image(image, size).to(device))  # 3 h w
    with _evaluating(network):
        if evaluation.mode == "whole":
            logits, covered = _forward(network, resized[None])
            return _Coarse(logits, covered, size)
        return _Coarse(_sliding_logits(network, resized, evaluation), size, size)


def _sliding_logits(network: Segmenter, image: Tensor, evaluation: settings.Evaluation) -> Tensor:
    """Mean of the logits of all windows that cover a pixel, as HRDA slides at test time.  # 3 h w -> 1 K h w

    Logits are upsampled to the window before they are summed. Windows are clipped to the image.
    """
    size = (image.shape[1], image.shape[2])
    high, wide = (min(window, length) for window, length in zip(evaluation.window, size, strict=True))
    corners = window_corners(size, (high, wide), evaluation.stride)
    coverage = image.new_zeros(size)
    total: Tensor | None = None
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        part = corners[start : start + WINDOWS_AT_ONCE]
        logits, covered = _forward(network, torch.stack([image[:, y : y + high, x : x + wide] for y, x in part]))
        logits = F.interpolate(logits, covered, mode="bilinear", align_corners=False)[..., :high, :wide]
        if total is None:
            total = logits.new_zeros(logits.shape[1], *size)
        for (y, x), window in zip(part, logits, strict=True):
            total[:, y : y + high, x : x + wide] += window
            coverage[y : y + high, x : x + wide] += 1
    assert total is not None
    return (total / coverage)[None]


def _forward(network: Segmenter, image: Tensor) -> tuple[Tensor, Size]:
    """Logits, and the padded size they cover.  # B 3 h w -> float32 B K a b

    Images are padded with zeros, the mean colour, to what the network can take.
    """
    multiple = network.pad_multiple
    bottom, right = (-(-max(length, network.smallest) // multiple) * multiple - length for length in image.shape[-2:])
    padded = F.pad(image, (0, right, 0, bottom))
    return network(padded).logits.float(), (padded.shape[2], padded.shape[3])


@contextmanager
def _evaluating(network: Segmenter) -> Iterator[None]:
    """Eval mode, then every module's own mode again: frozen batch norms differ from their network."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def overlapped(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
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
    """Write grey (H W) or RGB (H W 3) pixels atomically as PNG."""
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
