"""Crop boxes on batches of images and of feature maps.

B batch, C channels, H W pixels or cells of the whole, h w of a box.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Boxes:
    """One box in each image of a batch, all of one size.

    Corners are a tensor, so that boxes which a network chose itself need not be read back from a GPU.
    """

    corner: Tensor  # B 2, int64, top and left
    size: Size  # h w

    def over(self, stride: int) -> Self:
        """The same boxes counted in cells of `stride` pixels; corners and size must be multiples of it."""
        return type(self)(self.corner // stride, (self.size[0] // stride, self.size[1] // stride))

    def to(self, device: torch.device) -> Self:
        """The same boxes with their corners on a device."""
        return type(self)(self.corner.to(device), self.size)

    def part(self, images: slice) -> Self:
        """The boxes of some images of the batch."""
        return type(self)(self.corner[images], self.size)

    def crop(self, maps: Tensor) -> Tensor:
        """What the boxes hold of images B C H W or labels B H W: B C h w or B h w."""
        if maps.dim() == 3:
            return maps[self._index()]
        return maps.movedim(1, -1)[self._index()].movedim(-1, 1)

    def paste(self, maps: Tensor, size: Size) -> Tensor:
        """Maps B C h w at their boxes on zeros B C H W of `size`."""
        canvas = maps.new_zeros(len(maps), *size, maps.shape[1])  # B H W C
        canvas[self._index()] = maps.movedim(1, -1)
        return canvas.movedim(-1, 1)

    def inside(self, size: Size) -> Tensor:
        """Where the boxes lie on a map of `size`.  # B H W, bool"""
        mask = torch.zeros(len(self.corner), *size, dtype=torch.bool, device=self.corner.device)
        mask[self._index()] = True
        return mask

    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of every cell, each broadcastable to B h w."""
        device = self.corner.device
        image = torch.arange(len(self.corner), device=device)
        rows = self.corner[:, :1] + torch.arange(self.size[0], device=device)  # B h
        columns = self.corner[:, 1:] + torch.arange(self.size[1], device=device)  # B w
        return image[:, None, None], rows[:, :, None], columns[:, None, :]


def random_boxes(count: int, image: Size, size: Size, multiple: int, generator: torch.Generator) -> Boxes:
    """One random box of `size`, at a multiple of `multiple` pixels, for all `count` images; on the CPU.

    Every position that fits is equally likely, the last one included, which published HRDA never draws.
    """
    corner = [
        int(torch.randint((whole - part) // multiple + 1, (), generator=generator)) * multiple
        for whole, part in zip(image, size, strict=True)
    ]
    return Boxes(torch.tensor(corner).expand(count, 2), size)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where sliding windows begin along one axis: every `stride` pixels, the last one moved back to fit."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def window_corners(size: Size, window: Size, stride: Size) -> list[Size]:
    """Top and left of all sliding windows, row by row."""
    rows, columns = (window_starts(*axis) for axis in zip(size, window, stride, strict=True))
    return [(top, left) for top in rows for left in columns]
