"""Contrast of fused features, pixel against pixel, within and across domains, and across resolutions.

B batch, C channels, D fused channels, H W pixels, h w cells of a feature map, a b cells of a detail crop, N = B h w.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import View
from cluda_cli.distributed import collectives
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.contrast.kernel import contrast, multires_contrast


class PixelContrast(nn.Module):
    """Draw the fused features of a class together and push those of different classes apart (CLUDA).

    On source images the labels are ground truth. Mixed images hold pixels of both domains and pseudo-labels; there
    every pair counts by the product of its two confidence weights. The pixels are those of all processes.

    For a network of two resolutions, `channels` are those of its encoder's maps: a light head of the objective's own,
    which this loss alone trains, then learns from the maps of the context how much detail counts in a pair.
    """

    def __init__(
        self, section: settings.PixelContrast, views: frozenset[str], channels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.settings, self.views = section, views
        light = settings.Decoder(embed_dim=section.weighter_dim, channels=section.weighter_dim, dilations=())
        self.weighter = None if channels is None else DAFormerDecoder(light, channels, num_classes=1)

    def forward(self, output: Output, view: View) -> Tensor:
        size, temperature = self.settings.size, self.settings.temperature
        with torch.autocast(output.features.device.type, enabled=False):
            features, weight = output.features.float(), view.weight.float()
            if self.weighter is None or output.detail is None:
                rows = map(collectives.all_gather_rows, to_rows(features, view.label, weight, size))
                return contrast(*rows, temperature=temperature)
            mix = self.weighter([maps.float() for maps in output.encoder])[0].sigmoid()  # B 1 h w
            detail, boxes = output.detail.features.float(), output.detail.boxes
            rows = map(
                collectives.all_gather_rows, to_multires_rows(features, detail, boxes, mix, view.label, weight, size)
            )
            return multires_contrast(*rows, temperature=temperature)


def to_rows(features: Tensor, label: Tensor, weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring features B D h w, labels B H W and weights B H W to one grid, at most `size` x `size` and no finer than the
    features; give rows N D, labels N and weights N, all three in the order image, row, column.

    Features and weights are interpolated with aligned corners and labels take the nearest pixel, as CLUDA's training
    code does.
    """
    grid = _grid(features, size)
    label = F.interpolate(label[:, None].float(), grid, mode="nearest").to(label.dtype)  # B 1 h w
    return _sample(features, grid), label.flatten(), _sample(weight[:, None], grid)[:, 0]


def to_multires_rows(
    features: Tensor, detail: Tensor, boxes: Boxes, mix: Tensor, label: Tensor, weight: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `to_rows`, with features of the context B D h w, of the detail B D a b at `boxes` in pixels, and the share of
    the detail, `mix` B 1 of any size: rows of features N D, of detail N D, which of them lie inside the crop N, mix N,
    labels N and weights N. The grid is no finer than the detail.

    Context and mix are first brought to the resolution of the detail, with aligned corners and without, and the detail
    is placed there at its box, as in CLUDA's training code.
    """
    stride = boxes.size[0] // detail.shape[2]  # pixels per cell of the detail
    fine = (label.shape[1] // stride, label.shape[2] // stride)
    boxes = boxes.over(stride)
    features = F.interpolate(features, fine, mode="bilinear", align_corners=True)  # B D, fine
    grid = _grid(features, size)
    # A row between the border of the box and the zeros pasted around it would be a mixture of both. So a row counts as
    # inside only if every cell that has a share in it lies inside, that is, if the cells outside add up to nothing;
    # none of the summands is negative, so this test is exact.
    outside = _sample(1 - boxes.inside(fine)[:, None].to(features.dtype), grid)[:, 0]
    detail = _sample(boxes.paste(detail, fine), grid)
    mix = _sample(F.interpolate(mix, fine, mode="bilinear"), grid)[:, 0]
    features, label, weight = to_rows(features, label, weight, size)
    return features, detail, outside == 0, mix, label, weight


def _grid(maps: Tensor, size: int) -> list[int]:
    return [min(size, side) for side in maps.shape[-2:]]


def _sample(maps: Tensor, grid: list[int]) -> Tensor:
    """Maps B C h w on a grid of their corners, as rows N C."""
    return F.interpolate(maps, grid, mode="bilinear", align_corners=True).permute(0, 2, 3, 1).flatten(0, 2)
