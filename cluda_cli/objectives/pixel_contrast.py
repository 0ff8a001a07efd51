"""Contrast of fused features, pixel against pixel, within and across domains, and across resolutions.

B batch, C channels, D fused channels, H W pixels, h w cells of a feature map, a b cells of a detail crop, N = B h w.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.objectives.contrast.kernel import multires_contrast, tiled_contrast
from cluda_cli.objectives.objective import Objective


class PixelContrast(Objective):
    """Draw the fused features of a class together and push those of different classes apart (CLUDA).

    On source images the labels are ground truth. Mixed images hold pixels of both domains and pseudo-labels; there
    every pair counts by the product of its two confidence weights. The pixels are those of all ranks.

    For a network of two resolutions, `channels` are those of its encoder's maps: a light head of the objective's own,
    which this loss alone trains, then learns from the maps of the context how much detail counts in a pair.
    """

    settings: settings.PixelContrast

    def __init__(
        self, section: settings.PixelContrast, views: Sequence[str], channels: Sequence[int] | None = None
    ) -> None:
        super().__init__(section)
        self.reads = tuple((view,) for view in views)
        light = settings.Decoder(embed_dim=section.weighter_dim, channels=section.weighter_dim, dilations=())
        self.weighter = None if channels is None else DAFormerDecoder(light, channels, num_classes=1)

    def forward(self, seen: Seen) -> Tensor:
        output, view = seen
        size, temperature = self.settings.size, self.settings.temperature
        with torch.autocast(output.features.device.type, enabled=False):
            features, weight = output.features.float(), view.weight.float()
            if self.weighter is None or output.detail is None:
                rows = map(collectives.all_gather_rows, to_rows(features, view.label, weight, size))
                return tiled_contrast(*rows, temperature=temperature)  # equals `contrast`
            mix = self.weighter([maps.float() for maps in output.encoder])[0].sigmoid()  # B 1 h w
            detail, boxes = output.detail.features.float(), output.detail.boxes
            multires_rows = to_multires_rows(features, detail, boxes, mix, view.label, weight, size)
            return multires_contrast(*map(collectives.all_gather_rows, multires_rows), temperature=temperature)


def contrast(features: Tensor, label: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The definition of the term, with N x N matrices. Training computes the same in tiles, `tiled_contrast`.

    `features` N D of any length (their direction counts), `label` N train ids, 255 = ignored, `weight` N. With s_ij the
    cosine similarity divided by `temperature`, P_i the other pixels of the class of i, L_i the log-sum-exp of s_ik over
    the pixels k of other classes, and n the number of labelled pixels, the value is

        1/n sum_i 1/max(1, |P_i|) sum_{j in P_i} w_i w_j softplus(L_i - s_ij),

    which is CLUDA's pixel-to-pixel contrast without the ignored pixels. Its form is that of ContrastiveSeg (Wang et
    al., ICCV 2021): a positive competes with all negatives but not with other positives. A scalar, 0 without a pair of
    positives or without negatives.
    """
    labelled = label != IGNORE
    unit, label, weight = F.normalize(features[labelled], dim=1), label[labelled], weight[labelled]
    similarity = unit @ unit.T / temperature  # n n
    same = label[:, None] == label
    positive = same & ~torch.eye(len(label), dtype=torch.bool, device=label.device)
    rivals = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)  # n 1
    costs = torch.logaddexp(rivals, similarity) - similarity  # softplus(L_i - s_ij), exact where it is large
    pairs = positive * weight[:, None] * weight * costs
    return (pairs.sum(dim=1) / positive.sum(dim=1).clamp_min(1)).sum() / max(len(label), 1)


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
