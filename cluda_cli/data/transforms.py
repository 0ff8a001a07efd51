"""Decode, resize and crop: the pixels of one image. H W original size, h w resized.

Resizing follows OpenCV, as the published results do: INTER_LINEAR for images (half-pixel centres, clamped edges, no
antialiasing) and INTER_NEAREST for labels. Both can compute a region of the resized frame and read only its pixels.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli.data.image_files import load_image, read_pixels
from cluda_cli.errors import DataError

BAND = 32  # rows resized at once: their float32 copies stay in a CPU's cache


def read_image(path: Path) -> Tensor:
    """Decode a picture of any mode to uint8 3 H W, RGB, upright; alpha is dropped. `image_files` has the rules.

    Channels are last in memory, as files store them; resizing reads that fastest.
    Raises DataError if the file is missing, broken, no image, or has more than 8 bits per channel.
    """
    return torch.from_numpy(read_pixels(path)).permute(2, 0, 1)


def read_label(path: Path) -> Tensor:
    """Decode a map of train ids to uint8 H W; of a palette image, the indices.

    Raises DataError if the file is missing, broken or has more than one 8-bit channel.
    """
    image = load_image(path)
    if image.mode not in {"L", "P", "1"}:
        raise DataError(f"a label has one 8-bit channel, this has mode {image.mode}", path, "run `cluda prepare` again")
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def fit_box(size: tuple[int, int], box: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of a frame of `size` resized to fit `box` in either orientation; None keeps the size."""
    if box is None:
        return size
    factor = min(max(box) / max(size), min(box) / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 3 H W to uint8 3 h w, bilinear."""
    return resize_region(image, size, 0, 0, *size)


def resize_region(image: Tensor, size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """The part [top:top+height, left:left+width] of `image` (uint8 3 H W, on the CPU) resized to `size`.

    Equal to the last bit to cropping the whole resized image.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image[:, top : top + height, left : left + width].contiguous()
    y0, y1, wy = _find_taps(image.shape[1], size[0], top, height)
    x0, x1, wx = _find_taps(image.shape[2], size[1], left, width)
    first = x0[0]
    pixels = image.permute(1, 2, 0).numpy()[:, first : x1[-1] + 1]  # H w' 3, a view
    channels = np.arange(3)[:, None]
    left_of, right_of = ((3 * (x - first) + channels).ravel() for x in (x0, x1))  # 3w: positions in an interleaved row
    wx = np.tile(wx, 3)
    result = np.empty((3, height, width), dtype=np.uint8)
    for start in range(0, height, BAND):
        rows = slice(start, min(start + BAND, height))
        band = _lerp(_take_rows(pixels, y0[rows]), _take_rows(pixels, y1[rows]), wy[rows, None])  # r 3w'
        band = _lerp(band.take(left_of, axis=1), band.take(right_of, axis=1), wx)  # r 3w, planar
        band += 0.5
        result[:, rows] = band.astype(np.uint8).reshape(-1, 3, width).transpose(1, 0, 2)
    return torch.from_numpy(result)


def resize_label_region(label: Tensor, size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """The part [top:top+height, left:left+width] of `label` (H W, any type, on the CPU) resized to `size`, nearest."""
    if tuple(label.shape) == tuple(size):
        return label[top : top + height, left : left + width].contiguous()
    y = _find_nearest(label.shape[0], size[0], top, height)
    x = _find_nearest(label.shape[1], size[1], left, width)
    return torch.from_numpy(label.numpy()[y][:, x])


def _take_rows(pixels: NDArray[np.uint8], index: NDArray[np.int64]) -> NDArray[np.float32]:
    """The rows at `index` of pixels, H w 3, as float32 r 3w."""
    return pixels[index].astype(np.float32).reshape(len(index), -1)


def _lerp(first: NDArray[np.float32], second: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """first + (second - first) * weight, in place.

    Three ufuncs, because the rounding of a fused one depends on the position in memory.
    """
    second -= first
    second *= weight
    first += second
    return first


def _find_taps(
    source: int, target: int, start: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For `count` positions of a resized axis from `start`: both neighbours, and the weight of the second."""
    position = (np.arange(start, start + count) + 0.5) * (source / target) - 0.5
    position = position.clip(0, source - 1)
    first = np.floor(position).astype(np.int64)
    return first, np.minimum(first + 1, source - 1), (position - first).astype(np.float32)


def _find_nearest(source: int, target: int, start: int, count: int) -> NDArray[np.int64]:
    """For `count` positions of a resized axis from `start`: the source position."""
    scale = 1 / (target / source)  # as OpenCV computes it; source / target differs in the last bit
    position: NDArray[np.int64] = np.floor(np.arange(start, start + count) * scale).astype(np.int64)
    position.clip(max=source - 1, out=position)
    return position
