"""Logits and train ids of whole images of any size, shared by validation, `eval`, `predict` and `pseudo-label`.

B images or windows, K classes, H W original size, h w resized size, n rows of a band, a b cells of the network's output
grid.
"""

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
from cluda_cli.models.boxes import Size, window_corners
from cluda_cli.models.segmenter import Segmenter

T = TypeVar("T")

COLUMNS = 128  # columns of logits resized by one product of matrices


@dataclass(frozen=True)
class Limits:
    """What is alive at once; results depend on it by rounding only."""

    forward: int
    """Pixels of images or windows in one forward, if more than one fit."""
    band: int
    """Pixels of the original image whose logits are alive, when only labels are wanted."""


# On a CPU, batches save calls for tiny images and nothing else, and a band should stay in its cache.
CPU = Limits(forward=2**16, band=2**15)
GPU = Limits(forward=2**22, band=2**20)


@dataclass(frozen=True)
class Frame:
    """An image at the size the network sees, in main memory."""

    pixels: Tensor  # uint8 3 h w
    original: Size  # H W

    @classmethod
    def of(cls, image: Tensor, box: Size | None, device: torch.device) -> "Frame":
        """An image (uint8 3 H W) resized to fit `box`, where `device` can copy it from while it computes."""
        size = (image.shape[1], image.shape[2])
        return cls(pin_memory(resize_image(image, fit_box(size, box)), device), size)


@torch.inference_mode()
def image_logits(network: Segmenter, image: Tensor, box: Size | None, evaluation: settings.Evaluation) -> Tensor:
    """Logits of one image at its original size.  # uint8 3 H W -> float32 K H W

    The image is resized to fit `box`, normalised, and seen whole or through sliding windows. Logits are resized
    bilinearly (half-pixel centres) to the network's input, then to the original size, as in the released evaluation
    of DAFormer and HRDA. The network runs in eval mode on its own device, where the result lies, and keeps its modes.
    """
    frame = Frame.of(image, box, _device(network))
    return torch.cat(list(_coarse_logits(network, [frame], evaluation).bands(0, frame.original)), dim=1)


@torch.inference_mode()
def predict_labels(
    network: Segmenter, frames: Sequence[Frame], evaluation: settings.Evaluation, *, confidence: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Most probable class by `image_logits`, and on request its softmax probability.  # uint8 H W, float32 H W

    Of frames that have one size, on the network's device. Logits at the original size exist for one band of rows at a
    time, and no operation waits for a GPU.
    """
    coarse = _coarse_logits(network, frames, evaluation)
    results: list[tuple[Tensor, Tensor | None]] = []
    for i, frame in enumerate(frames):
        bands = [_best(logits, confidence) for logits in coarse.bands(i, frame.original)]
        label = torch.cat([label for label, _ in bands])
        results.append((label, torch.cat([c for _, c in bands if c is not None]) if confidence else None))
    return results


def segment(
    network: Segmenter,
    frames: Iterable[tuple[Frame, T]],
    evaluation: settings.Evaluation,
    *,
    confidence: bool = False,
) -> Iterator[tuple[T, Tensor, Tensor | None]]:
    """What came with each frame, and `predict_labels`; frames of one size that follow each other share a forward."""
    limit = limits(_device(network)).forward
    for (height, width), alike in groupby(frames, key=lambda pair: pair[0].pixels.shape[1:]):
        at_once = max(limit // (height * width), 1)
        while part := list(islice(alike, at_once)):
            results = predict_labels(network, [frame for frame, _ in part], evaluation, confidence=confidence)
            for (_, companion), result in zip(part, results, strict=True):
                yield companion, *result


def limits(device: torch.device) -> Limits:
    return CPU if device.type == "cpu" else GPU


def _device(network: Segmenter) -> torch.device:
    return next(network.parameters()).device


def _best(logits: Tensor, confidence: bool) -> tuple[Tensor, Tensor | None]:
    """First class of the largest logit, and its probability.  # K n W -> uint8 n W, float32 n W

    On a CPU, argmax over the outermost axis takes as long as all the resizing; this takes a third.
    """
    best = logits.amax(0)
    lost = (logits < best).view(torch.uint8).mul_(255)
    lost |= torch.arange(len(logits), dtype=torch.uint8, device=logits.device)[:, None, None]  # the class, or 255
    return lost.amin(0), (best - logits.logsumexp(0)).exp() if confidence else None


@dataclass(frozen=True)
class _Coarse:
    """Logits of resized images on a grid that may reach beyond them."""

    logits: Tensor  # B K a b
    covered: Size  # what the grid covers: the resized image and its padding at bottom and right
    size: Size  # h w

    def bands(self, i: int, original: Size) -> Iterator[Tensor]:
        """The logits of one image at its original size, some rows at a time.  # K n W"""
        logits, device = self.logits[i], self.logits.device
        (height, width), (rows, columns) = original, logits.shape[1:]
        wide = logits.new_empty(len(logits), rows, width)  # K a W
        for out, cells, weights in _resizing((columns, self.covered[1], self.size[1], width), COLUMNS, device):
            wide[..., out] = logits[..., cells] @ weights.T
        step = max(limits(device).band // width, 1)
        for _, cells, weights in _resizing((rows, self.covered[0], self.size[0], height), step, device):
            yield weights @ wide[:, cells]


@lru_cache(maxsize=16)
def _resizing(
    lengths: tuple[int, int, int, int], step: int, device: torch.device
) -> tuple[tuple[slice, slice, Tensor], ...]:
    """Bilinear resizing of one axis, twice: from cells to what they cover, of which a part is resized to the original.

    `lengths` are cells, covered, part, original. Both resizings are one matrix with few entries beside its diagonal;
    of every `step` original positions it gives the cells that they need and the weights of these.
    """
    cells, covered, part, original = lengths
    matrix = _resize_rows(_resize_rows(torch.eye(cells), covered)[:part], original)  # original x cells
    blocks = []
    for start in range(0, original, step):
        out = slice(start, min(start + step, original))
        used = matrix[out].any(0).nonzero()
        needed = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((out, needed, matrix[out, needed].contiguous().to(device)))
    return tuple(blocks)


def _resize_rows(matrix: Tensor, count: int) -> Tensor:
    """Rows resized bilinearly (half-pixel centres, clamped edges) to `count`."""
    position = (torch.arange(count, dtype=torch.float64) + 0.5) * (len(matrix) / count) - 0.5
    position = position.clamp(0, len(matrix) - 1)
    first = position.long()
    second = (first + 1).clamp(max=len(matrix) - 1)
    return torch.lerp(matrix[first], matrix[second], (position - first).float()[:, None])


def _coarse_logits(network: Segmenter, frames: Sequence[Frame], evaluation: settings.Evaluation) -> _Coarse:
    """Normalise and forward frames of one size."""
    device = _device(network)
    images = torch.stack([network.normalisation.apply(to_device(frame.pixels, device)) for frame in frames])  # B 3 h w
    size = (images.shape[2], images.shape[3])
    with evaluating(network):
        if evaluation.mode == "whole":
            return _Coarse(*_forward(network, images), size)
        return _Coarse(_sliding_logits(network, images, evaluation), size, size)


def _sliding_logits(network: Segmenter, images: Tensor, evaluation: settings.Evaluation) -> Tensor:
    """Mean of the logits of all windows that cover a pixel, as HRDA slides at test time.  # B 3 h w -> B K h w

    Logits are upsampled to the window before they are summed. Windows are clipped to the image.
    """
    size = (images.shape[2], images.shape[3])
    high, wide = (min(window, length) for window, length in zip(evaluation.window, size, strict=True))
    corners = window_corners(size, (high, wide), evaluation.stride)
    places = [(i, slice(y, y + high), slice(x, x + wide)) for i in range(len(images)) for y, x in corners]
    at_once = max(limits(images.device).forward // (high * wide), 1)
    coverage = images.new_zeros(size)
    for y, x in corners:
        coverage[y : y + high, x : x + wide] += 1
    total: Tensor | None = None
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        logits, covered = _forward(network, torch.stack([images[i, :, rows, columns] for i, rows, columns in part]))
        logits = F.interpolate(logits, covered, mode="bilinear", align_corners=False)[..., :high, :wide]
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *size)
        for (i, rows, columns), window in zip(part, logits, strict=True):
            total[i, :, rows, columns] += window
    assert total is not None
    return total / coverage


def _forward(network: Segmenter, image: Tensor) -> tuple[Tensor, Size]:
    """Logits, and the padded size they cover.  # B 3 h w -> float32 B K a b

    Images are padded with zeros, the mean colour, to what the network can take.
    """
    multiple = network.pad_multiple
    bottom, right = (-(-max(length, network.smallest) // multiple) * multiple - length for length in image.shape[-2:])
    padded = F.pad(image, (0, right, 0, bottom))
    return network(padded).logits.float(), (padded.shape[2], padded.shape[3])


@contextmanager
def evaluating(network: Segmenter) -> Iterator[None]:
    """Eval mode, then every module's own mode again: frozen batch norms differ from their network."""
    in_training = [module for module in network.modules() if module.training]
    if in_training:
        network.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
