"""Crop boxes on batches of images and of feature maps.

B batch, C channels, H W of the image or map, h w of a box; both in pixels or both in cells.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Boxes:
    """One box in each image of a batch. All boxes have one size.

    The corners are a tensor: a network can choose boxes on a GPU, and nothing has to be copied from there.
    """

    corner: Tensor  # B 2, int64, top and left
    size: Size  # h w

    def over(self, stride: int) -> Self:
        """The same boxes in cells of `stride` pixels. Corners and size must be multiples of it."""
        return type(self)(self.corner // stride, (self.size[0] // stride, self.size[1] // stride))

    def to(self, device: torch.device) -> Self:
        """The same boxes with their corners on a device."""
        return type(self)(self.corner.to(device), self.size)

    def part(self, images: slice) -> Self:
        """The boxes of some images of the batch."""
        return type(self)(self.corner[images], self.size)

    def crop(self, maps: Tensor) -> Tensor:
        """Cut the boxes out of images B C H W or labels B H W.  # B C h w or B h w"""
        if maps.dim() == 3:
            return maps[self._index()]
        return maps.movedim(1, -1)[self._index()].movedim(-1, 1)

    def paste(self, maps: Tensor, size: Size) -> Tensor:
        """Put maps B C h w at their boxes on zeros of `size`.  # B C H W"""
        canvas = maps.new_zeros(len(maps), *size, maps.shape[1])  # B H W C
        canvas[self._index()] = maps.movedim(1, -1)
        return canvas.movedim(-1, 1)

    def inside(self, size: Size) -> Tensor:
        """True inside the boxes, on maps of `size`.  # B H W, bool"""
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
    """Draw one box of `size` for all `count` images. Its corner is a multiple of `multiple` pixels and on the CPU.

    Every position that fits is equally likely. Published HRDA never draws the last one.
    """
    corner = [
        int(torch.randint((whole - part) // multiple + 1, (), generator=generator)) * multiple
        for whole, part in zip(image, size, strict=True)
    ]
    return Boxes(torch.tensor(corner).expand(count, 2), size)
