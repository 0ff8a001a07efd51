"""Logits and train ids of whole images of any size, for validation, `eval`, `predict` and `pseudo-label`.

B images or windows, K classes, H W original size, h w resized size, n rows of a band, a b cells of the network's
logits, r rows of a strip of them.

Memory is bounded for images of any size: above LARGEST_FORWARD pixels the network sees parts of an image, logits exist
for one strip of the image at a time, and labels are made in bands of rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from cluda_cli.errors import is_out_of_memory
from cluda_cli.inference.prefetch import pin_memory, to_device
from cluda_cli.models.boxes import Size
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.models.windows import average_windows, window_starts

T = TypeVar("T")

BLOCK = 128  # original rows or columns that one matrix product makes, at most
LARGEST_FORWARD = 2**22
"""Pixels of a resized image above which the network sees it in parts. A part has at most about as many."""
MARGIN = 256
"""Pixels around a part that the network sees too, but whose logits are dropped: what is beyond has no effect on the
logits of the part, or little, by the size of the receptive field (overlap-tile strategy, U-Net, arXiv 1505.04597)."""


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

    The image is resized to fit `box` and normalised. The network sees it whole (in parts, if it is large) or in sliding
    windows. Logits are resized bilinearly (half-pixel centres) to the network's input, then to the original size, as in
    the released evaluation of DAFormer and HRDA. The network runs in eval mode, and its modes are restored. The result
    is on the network's device.
    """
    resized = fit_image(image, box, _device(network))
    with eval_mode(network):
        bands = _run_network(network, [resized], evaluation).resize(0, resized.original)
        return torch.cat([logits for _, logits in bands], dim=1)


@torch.inference_mode()
def predict_labels(
    network: Segmenter, images: Sequence[ResizedImage], evaluation: settings.Evaluation, *, confidence: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Most probable class by `image_logits`, and on request its softmax probability.  # uint8 H W, float32 H W

    The images have one resized size. The results are on the network's device. Logits at the original size exist for one
    band of rows at a time. No operation waits for a GPU.
    """
    results: list[tuple[Tensor, Tensor | None]] = []
    with eval_mode(network):
        logits = _run_network(network, images, evaluation)
        for i, image in enumerate(images):
            label = torch.empty(image.original, dtype=torch.uint8, device=logits.device)
            probability = torch.empty(image.original, device=logits.device) if confidence else None
            for rows, band in logits.resize(i, image.original):
                label[rows], certain = _pick_classes(band, confidence)
                if probability is not None and certain is not None:
                    probability[rows] = certain
            results.append((label, probability))
    return results


def segment(
    network: Segmenter,
    images: Iterable[tuple[ResizedImage, T]],
    evaluation: settings.Evaluation,
    *,
    confidence: bool = False,
    skip: Callable[[T], None] | None = None,
) -> Iterator[tuple[T, Tensor, Tensor | None]]:
    """Predict the labels of many images with `predict_labels`, in order.

    Each image comes with a key, and its result is yielded as (key, label, confidence). Consecutive images of one
    resized size share a forward. `skip` gets the keys of images for which memory runs out, and may raise; without it,
    the error of the allocation is raised.
    """
    budget = choose_budget(_device(network)).forward
    for (height, width), same_size in groupby(images, key=lambda pair: pair[0].pixels.shape[1:]):
        at_once = max(budget // math.prod(_pad(network, (height, width))), 1)
        while batch := list(islice(same_size, at_once)):
            try:
                results = predict_labels(network, [image for image, _ in batch], evaluation, confidence=confidence)
            except (MemoryError, RuntimeError) as error:
                if skip is None or not is_out_of_memory(error):
                    raise
                for _, key in batch:
                    skip(key)
                continue
            for (_, key), result in zip(batch, results, strict=True):
                yield key, *result


def quantise(confidence: Tensor) -> Tensor:
    """Map 0..1 to 0..255, a band of rows at a time to bound memory.  # float32 H W -> uint8 H W"""
    rows = max(choose_budget(confidence.device).band // confidence.shape[1], 1)
    return torch.cat([part.mul(255).round_().to(torch.uint8) for part in confidence.split(rows)])


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
class _Strips:
    """Logits of resized images that may be padded at bottom and right."""

    strips: Iterable[Tensor]  # B K r b each, from top to bottom; an iterator only for a single image
    cells: Size  # a b of all strips together
    padded: Size  # pixels that the logits cover: the resized image and its padding
    size: Size  # h w
    device: torch.device

    def resize(self, i: int, original: Size) -> Iterator[tuple[slice, Tensor]]:
        """Resize the logits of image i to its original size. Yield bands of rows from top to bottom.  # K n W"""
        (height, width), band = original, max(choose_budget(self.device).band // original[1], 1)
        columns = _build_resizing((self.cells[1], self.padded[1], self.size[1], width), BLOCK, self.device)
        rows = _build_resizing((self.cells[0], self.padded[0], self.size[0], height), min(band, BLOCK), self.device)
        parts = (_widen(part, columns, width) for strip in self.strips for part in strip[i].split(band, dim=1))
        wide, first = next(parts), 0  # K * W, and the cell of its first row
        for out, cells, weights in rows:
            passed = min(cells.start - first, wide.shape[1])
            wide, first = wide[:, passed:], first + passed
            while first + wide.shape[1] < cells.stop:
                wide = torch.cat([wide, next(parts)], dim=1)
            yield out, weights @ wide[:, cells.start - first : cells.stop - first]


_Resizing = tuple[tuple[slice, slice, Tensor], ...]


def _widen(logits: Tensor, columns: _Resizing, width: int) -> Tensor:
    """Resize rows of logits to the original width.  # K r b -> K r W"""
    wide = logits.new_empty(*logits.shape[:2], width)
    for out, cells, weights in columns:
        wide[..., out] = logits[..., cells] @ weights.T
    return wide


@lru_cache(maxsize=16)
def _build_resizing(lengths: tuple[int, int, int, int], step: int, device: torch.device) -> _Resizing:
    """The matrix that resizes one axis of the logits to the original image, in blocks of `step` original positions.

    `lengths` are those of one axis: cells of the logits, pixels of the padded image, of the resized image and of the
    original image. The matrix resizes bilinearly twice: from cells to padded pixels, whose padding is dropped, and from
    there to original pixels. A block has its original positions, the cells that they read, and the weights of these.
    """
    cells, padded, resized, original = lengths
    taps = [  # the four cells that each original position reads, and their weights
        (cell, share * weight)
        for pixel, share in _find_neighbours(torch.arange(original), resized, original)
        for cell, weight in _find_neighbours(pixel, cells, padded)
    ]
    blocks = []
    for start in range(0, original, step):
        out = slice(start, min(start + step, original))
        read = torch.stack([cell[out] for cell, _ in taps])  # 4 n
        needed = slice(int(read.min()), int(read.max()) + 1)
        matrix = torch.zeros(out.stop - start, needed.stop - needed.start)
        for cell, weight in taps:
            matrix.scatter_add_(1, cell[out, None] - needed.start, weight[out, None])
        blocks.append((out, needed, matrix.to(device)))
    return tuple(blocks)


def _find_neighbours(position: Tensor, source: int, target: int) -> list[tuple[Tensor, Tensor]]:
    """The two source positions that a bilinear resize (half-pixel centres, clamped edges) reads for positions of the
    target, and their weights."""
    place = ((position.double() + 0.5) * (source / target) - 0.5).clamp(0, source - 1)
    first = place.long()
    share = (place - first).float()
    return [(first, 1 - share), ((first + 1).clamp(max=source - 1), share)]


def _run_network(network: Segmenter, images: Sequence[ResizedImage], evaluation: settings.Evaluation) -> _Strips:
    """Compute the logits of images of one resized size, whole or in sliding windows.

    Those of a large image, which must be alone, are computed only while strips are taken.
    """
    device = _device(network)
    pixels = [to_device(image.pixels, device) for image in images]
    batch = torch.stack(pixels) if len(pixels) > 1 else pixels[0][None]  # uint8 B 3 h w
    size = (batch.shape[2], batch.shape[3])
    padded = _pad(network, size)
    large = math.prod(padded) > LARGEST_FORWARD
    assert not large or len(images) == 1
    if evaluation.mode == "slide":
        windows = _slide_in_strips(network, batch, evaluation) if large else [_slide(network, batch, evaluation)]
        return _Strips(windows, size, size, size, device)
    if large:
        cells = (-(-padded[0] // network.stride), -(-padded[1] // network.stride))
        return _Strips(_forward_in_parts(network, batch), cells, padded, size, device)
    logits = _forward(network, batch)
    return _Strips([logits], (logits.shape[2], logits.shape[3]), padded, size, device)


def _slide(network: Segmenter, images: Tensor, evaluation: settings.Evaluation) -> Tensor:
    """Mean of the logits of all windows that cover a pixel, as HRDA evaluates.  # uint8 B 3 h w -> B K h w

    The logits of a window are upsampled to its pixels before they are averaged.
    """

    def compute_logits(windows: Tensor) -> Tensor:
        height, width = windows.shape[2:]
        upsampled = F.interpolate(
            _forward(network, windows), _pad(network, (height, width)), mode="bilinear", align_corners=False
        )
        return upsampled[..., :height, :width]

    window = math.prod(min(pair) for pair in zip(evaluation.window, images.shape[2:], strict=True))  # pixels
    at_once = max(choose_budget(images.device).forward // window, 1)
    return average_windows(images, evaluation.window, evaluation.stride, compute_logits, windows_at_once=at_once)


def _slide_in_strips(network: Segmenter, image: Tensor, evaluation: settings.Evaluation) -> Iterator[Tensor]:
    """`_slide` on one image, one row of windows at a time.  # uint8 1 3 h w -> 1 K r w

    Every row has the same windows from left to right, so the mean over all windows is the mean of the rows' means.
    """
    height = image.shape[2]
    high = min(evaluation.window[0], height)
    tops = window_starts(height, high, evaluation.stride[0])
    count = torch.zeros(height, 1, device=image.device)
    for top in tops:
        count[top : top + high] += 1
    unfinished = None
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        total = _slide(network, image[:, :, top : top + high], evaluation)
        if unfinished is not None:
            total[:, :, : unfinished.shape[2]] += unfinished
        unfinished = total[:, :, following - top :]
        yield total[:, :, : following - top] / count[top:following]


def _forward_in_parts(network: Segmenter, image: Tensor) -> Iterator[Tensor]:
    """`_forward` on one image, one row of parts at a time.  # uint8 1 3 h w -> 1 K r b"""
    columns = _split_axis(image.shape[3], network)
    for seen, rows in _split_axis(image.shape[2], network):
        parts = (_forward(network, image[:, :, seen, also])[:, :, rows, kept] for also, kept in columns)
        yield torch.cat(list(parts), dim=3)


def _split_axis(length: int, network: Segmenter) -> list[tuple[slice, slice]]:
    """Split one axis of a large image: for each part the pixels that the network sees, and the cells that are kept.

    Parts begin at multiples of `network.alignment`, so their cells are those of the whole image.
    """
    side, step = math.isqrt(LARGEST_FORWARD), network.alignment
    if length <= side:
        return [(slice(0, length), slice(None))]
    margin = -(-max(MARGIN, network.smallest) // step) * step
    core = max((side - 2 * margin) // step, 1) * step
    parts = []
    for start in range(0, length, core):
        seen = slice(max(start - margin, 0), min(start + core + margin, length))
        first = (start - seen.start) // network.stride
        last = start + core >= length  # then the cells of its padding are kept too
        parts.append((seen, slice(first, None if last else first + core // network.stride)))
    return parts


def _pad(network: Segmenter, size: Size) -> Size:
    """The size, at least `size`, to which images are padded at bottom and right to fit the network."""
    multiple = network.pad_multiple
    height, width = (-(-max(length, network.smallest) // multiple) * multiple for length in size)
    return height, width


def _forward(network: Segmenter, pixels: Tensor) -> Tensor:
    """Normalise images, pad them with zeros, the mean colour, and compute their logits.  # uint8 B 3 h w -> B K a b"""
    image = network.normalisation.apply(pixels)
    height, width = _pad(network, (image.shape[2], image.shape[3]))
    padded = F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))
    return network(padded).logits.float()


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
