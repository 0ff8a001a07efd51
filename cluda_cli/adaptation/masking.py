"""Blocks of an image hidden at random (MIC, arXiv 2212.01322, section 3.2).

B batch, H W pixels. Decisions are drawn on the CPU and sent to the device of the images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def block_mask(size: tuple[int, int], block: int, ratio: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Where images stay visible, in square blocks of about `block` pixels.  # B H W, bool

    There is one generator for each image. Each block is hidden with probability `ratio`. Sides that are no multiple of
    the block have a whole number of blocks all the same, whose sides then differ by a pixel.
    """
    grid = [max(round(side / block), 1) for side in size]
    visible = torch.stack([torch.rand(1, *grid, generator=generator) for generator in generators]) > ratio  # B 1 h w
    return F.interpolate(visible.float(), size, mode="nearest")[:, 0].bool()
