"""The projection head of SePiCo (arXiv 2204.08808, section 3; sizes of its released code)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli.models.decoders import ConvUnit, fuse_pointwise


class Projection(nn.Module):
    """Encoder maps -> unit feature of every cell of the first map: two 1x1 convolutions with norm and ReLU.

    The second ReLU leaves no negative channel, so no two features are at more than a right angle.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.fuse = ConvUnit(sum(in_channels), sum(in_channels) // 4, kernel=1)
        self.project = ConvUnit(sum(in_channels) // 4, channels, kernel=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps B C * *, the finest first, to features B D h w of length 1."""
        return F.normalize(self.project(fuse_pointwise(self.fuse, maps)), dim=1)
