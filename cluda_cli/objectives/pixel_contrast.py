"""Contrast of fused features, pixel against pixel, within and across domains.

B batch, D fused channels, H W pixels, h w cells of a feature map, N = B h w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import View
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.contrast_kernel import contrast


class PixelContrast(nn.Module):
    """Draw the fused features of a class together and push those of different classes apart (CLUDA).

    On source images the labels are ground truth. Mixed images hold pixels of both domains and pseudo-labels; there
    every pair counts by the product of its two confidence weights.
    """

    def __init__(self, section: settings.PixelContrast, views: frozenset[str]) -> None:
        super().__init__()
        self.settings, self.views = section, views

    def forward(self, output: Output, view: View) -> Tensor:
        with torch.autocast(output.features.device.type, enabled=False):
            return contrast(
                *to_rows(output.features.float(), view.label, view.weight.float(), self.settings.size),
                temperature=self.settings.temperature,
            )


def to_rows(features: Tensor, label: Tensor, weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring features B D h w, labels B H W and weights B H W to one grid, at most `size` x `size` and no finer than the
    features; give rows N D, labels N and weights N, all three in the order image, row, column.

    Features and weights are interpolated with aligned corners and labels take the nearest pixel, as CLUDA's training
    code does.
    """
    grid = [min(size, side) for side in features.shape[-2:]]
    features = F.interpolate(features, grid, mode="bilinear", align_corners=True)  # B D h w
    weight = F.interpolate(weight[:, None], grid, mode="bilinear", align_corners=True)[:, 0]  # B h w
    label = F.interpolate(label[:, None].float(), grid, mode="nearest")[:, 0].to(label.dtype)  # B h w
    return features.permute(0, 2, 3, 1).flatten(0, 2), label.flatten(), weight.flatten()
