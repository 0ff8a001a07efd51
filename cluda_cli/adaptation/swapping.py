"""Swap what a few small regions of an image show for objects of another image.

B images, H W pixels, n regions. Decisions are drawn on the CPU; nothing is read back from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluda_cli.adaptation.mixing import NUM_IDS, class_mask
from cluda_cli.adaptation.photometric import gaussian_blur
from cluda_cli.data.labels import IGNORE


def choose_regions(
    label: Tensor, other: Tensor, count: int, max_share: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Where each image gets what another image shows there: labels B H W of both -> B H W, bool.

    A region is all that the other image shows of one class, as far as the image itself shows another class there. At
    most `count` regions are drawn for an image, among those that cover at most `max_share` of it, 0..1. There is one
    generator for each image.
    """
    differs = (other != label) & (other != IGNORE)
    pixels = torch.zeros(len(label), NUM_IDS, dtype=torch.int64, device=label.device)
    pixels.scatter_add_(1, other.flatten(1), differs.flatten(1).long())  # B 256
    possible = (pixels > 0) & (pixels <= max_share * label[0].numel())
    drawn = torch.stack([torch.rand(NUM_IDS, generator=generator) for generator in generators])
    score = drawn.to(label.device, non_blocking=True).masked_fill(~possible, 2)  # B 256
    chosen = possible & (score.argsort(dim=1, stable=True).argsort(dim=1) < count)
    return differs & class_mask(other, chosen)


def paste_softly(image: Tensor, other: Tensor, region: Tensor, seam: float) -> Tensor:
    """Put regions (B H W, bool) of other images over images, both B 3 H W, with seams that fade.

    `seam` is the standard deviation, in pixels, of the Gaussian that blurs the regions' outlines.
    """
    mask = gaussian_blur(region[:, None].to(image.dtype), torch.full((len(image),), seam))  # B 1 H W, 0..1
    return torch.lerp(image, other, mask.expand_as(image))
