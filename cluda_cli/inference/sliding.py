"""Logits and train ids of whole images of any size, for validation, `eval`, `predict` and `pseudo-label`.

B images or windows, K classes, H W original size, h w resized size, n rows of a band, a b cells of the network's
logits.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.transforms import fit_box, resize_image
from cluda_cli.inference.prefetch import pin_memory, to_device
from cluda_cli.models.boxes import Size
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.models.windows import average_windows

T = TypeVar("T")

COLUMNS = 128  # columns of logits that one matrix product resizes


@dataclass(frozen=True)
class PixelBudget:
    """How many pixels are in memory at a time. Results depend on it by rounding only."""

    forward: int
    """Pixels of all images or windows in one forward. A single image or window may have more."""
    band: int
    """Pixels of the original image whose logits exist at a time, when only labels are wanted."""


# On a CPU, batches help with tiny images only, and a band should fit into the cache.
CPU = PixelBudget(forward=2**16, band=2**15)
GPU = PixelBudget(forward=2**22, band=2**20)


@dataclass(frozen=True)
class ResizedImage:
    """An image at the size that the network sees, in main memory."""

    pixels: Tensor  # uint8 3 h w
    original: Size  # H W


def fit_image(image: Tensor, box: Size | None, device: torch.device) -> ResizedImage:
    """Resize an image, uint8 3 H W, to fit `box`. Its memory is pinned if `device` is a GPU."""
    size = (image.shape[1], image.shape[2])
    return ResizedImage(pin_memory(resize_image(image, fit_box(size, box)), device), size)


@torch.inference_mode()
def image_logits(network: Segmenter, image: Tensor, box: Size | None, evaluation: settings.Evaluation) -> Tensor:
    """Logits of one image at its original size.  # uint8 3 H W -> float32 K H W

    The image is resized to fit `box` and normalised. The network sees it whole or in sliding windows. Logits are
    resized bilinearly (half-pixel centres) to the network's input, then to the original size, as in the released
    evaluation of DAFormer and HRDA. The network runs in eval mode, and its modes are restored. The result is on the
    network's device.
    """
    resized = fit_image(image, box, _device(network))
    return torch.cat(list(_run_network(network, [resized], evaluation).resize(0, resized.original)), dim=1)


@torch.inference_mode()
def predict_labels(
    network: Segmenter, images: Sequence[ResizedImage], evaluation: settings.Evaluation, *, confidence: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Most probable class by `image_logits`, and on request its softmax probability.  # uint8 H W, float32 H W

    The images have one resized size. The results are on the network's device. Logits at the original size exist for one
    band of rows at a time. No operation waits for a GPU.
    """
    padded = _run_network(network, images, evaluation)
    results: list[tuple[Tensor, Tensor | None]] = []
    for i, image in enumerate(images):
        bands = [_pick_classes(logits, confidence) for logits in padded.resize(i, image.original)]
        label = torch.cat([label for label, _ in bands])
        results.append((label, torch.cat([c for _, c in bands if c is not None]) if confidence else None))
    return results


def segment(
    network: Segmenter,
    images: Iterable[tuple[ResizedImage, T]],
    evaluation: settings.Evaluation,
    *,
    confidence: bool = False,
) -> Iterator[tuple[T, Tensor, Tensor | None]]:
    """Predict the labels of many images with `predict_labels`, in order.

    Each image comes with a key, and its result is yielded as (key, label, confidence). Consecutive images of one
    resized size share a forward.
    """
    budget = choose_budget(_device(network)).forward
    for (height, width), same_size in groupby(images, key=lambda pair: pair[0].pixels.shape[1:]):
        at_once = max(budget // (height * width), 1)
        while batch := list(islice(same_size, at_once)):
            results = predict_labels(network, [image for image, _ in batch], evaluation, confidence=confidence)
            for (_, key), result in zip(batch, results, strict=True):
                yield key, *result


def choose_budget(device: torch.device) -> PixelBudget:
    return CPU if device.type == "cpu" else GPU


def _device(network: Segmenter) -> torch.device:
    return next(network.parameters()).device


def _pick_classes(logits: Tensor, confidence: bool) -> tuple[Tensor, Tensor | None]:
    """Class with the largest logit, the first of equals, and its probability.  # K n W -> uint8 n W, float32 n W

    On a CPU, argmax over the outermost axis takes as long as all the resizing. This takes a third of that.
    """
    best = logits.amax(0)
    lost = (logits < best).view(torch.uint8).mul_(255)
    lost |= torch.arange(len(logits), dtype=torch.uint8, device=logits.device)[:, None, None]  # the class, or 255
    return lost.amin(0), (best - logits.logsumexp(0)).exp() if confidence else None


@dataclass(frozen=True)
class _PaddedLogits:
    """Logits of resized images that may be padded at bottom and right."""

    logits: Tensor  # B K a b
    padded: Size  # pixels that the logits cover: the resized image and its padding
    size: Size  # h w

    def resize(self, i: int, original: Size) -> Iterator[Tensor]:
        """Resize the logits of image i to its original size and yield them in bands of rows.  # K n W"""
        logits, device = self.logits[i], self.logits.device
        (height, width), (rows, columns) = original, logits.shape[1:]
        wide = logits.new_empty(len(logits), rows, width)  # K a W
        for out, cells, weights in _build_resizing((columns, self.padded[1], self.size[1], width), COLUMNS, device):
            wide[..., out] = logits[..., cells] @ weights.T
        step = max(choose_budget(device).band // width, 1)
        for _, cells, weights in _build_resizing((rows, self.padded[0], self.size[0], height), step, device):
            yield weights @ wide[:, cells]


@lru_cache(maxsize=16)
def _build_resizing(
    lengths: tuple[int, int, int, int], step: int, device: torch.device
) -> tuple[tuple[slice, slice, Tensor], ...]:
    """The matrix that resizes one axis of the logits to the original image, in blocks of `step` original positions.

    `lengths` are those of one axis: cells of the logits, pixels of the padded image, of the resized image and of the
    original image. The matrix resizes bilinearly twice: from cells to padded pixels, whose padding is dropped, and from
    there to original pixels. A block has its original positions, the cells that they read, and the weights of these.
    """
    cells, padded, resized, original = lengths
    matrix = _resize_rows(_resize_rows(torch.eye(cells), padded)[:resized], original)  # original x cells
    blocks = []
    for start in range(0, original, step):
        out = slice(start, min(start + step, original))
        used = matrix[out].any(0).nonzero()
        needed = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((out, needed, matrix[out, needed].contiguous().to(device)))
    return tuple(blocks)


def _resize_rows(matrix: Tensor, count: int) -> Tensor:
    """Resize rows bilinearly (half-pixel centres, clamped edges) to `count` rows."""
    position = (torch.arange(count, dtype=torch.float64) + 0.5) * (len(matrix) / count) - 0.5
    position = position.clamp(0, len(matrix) - 1)
    first = position.long()
    second = (first + 1).clamp(max=len(matrix) - 1)
    return torch.lerp(matrix[first], matrix[second], (position - first).float()[:, None])


def _run_network(network: Segmenter, images: Sequence[ResizedImage], evaluation: settings.Evaluation) -> _PaddedLogits:
    """Normalise images of one resized size and compute their logits, whole or in sliding windows."""
    device = _device(network)
    batch = torch.stack([network.normalisation.apply(to_device(image.pixels, device)) for image in images])  # B 3 h w
    size = (batch.shape[2], batch.shape[3])
    with eval_mode(network):
        if evaluation.mode == "whole":
            return _PaddedLogits(*_forward(network, batch), size)
        return _PaddedLogits(_sliding_logits(network, batch, evaluation), size, size)


def _sliding_logits(network: Segmenter, images: Tensor, evaluation: settings.Evaluation) -> Tensor:
    """Mean of the logits of all windows that cover a pixel, as HRDA evaluates.  # B 3 h w -> B K h w

    The logits of a window are upsampled to its pixels before they are averaged.
    """

    def compute_logits(windows: Tensor) -> Tensor:
        logits, padded = _forward(network, windows)
        upsampled = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        return upsampled[..., : windows.shape[2], : windows.shape[3]]

    window = math.prod(min(pair) for pair in zip(evaluation.window, images.shape[2:], strict=True))  # pixels
    at_once = max(choose_budget(images.device).forward // window, 1)
    return average_windows(images, evaluation.window, evaluation.stride, compute_logits, windows_at_once=at_once)


def _forward(network: Segmenter, image: Tensor) -> tuple[Tensor, Size]:
    """Logits, and the size of the padded images that they cover.  # B 3 h w -> float32 B K a b

    Images are padded with zeros, the mean colour, to a size that fits the network.
    """
    multiple = network.pad_multiple
    bottom, right = (-(-max(length, network.smallest) // multiple) * multiple - length for length in image.shape[-2:])
    padded = F.pad(image, (0, right, 0, bottom))
    return network(padded).logits.float(), (padded.shape[2], padded.shape[3])


@contextmanager
def eval_mode(network: Segmenter) -> Iterator[None]:
    """Set eval mode, then restore the mode of every module: frozen batch norms differ from their network."""
    in_training = [module for module in network.modules() if module.training]
    if in_training:
        network.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
