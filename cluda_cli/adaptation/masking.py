"""Blocks of an image hidden at random (MIC, arXiv 2212.01322, section 3.2), all alike or by importance (GCA).

B batch, H W pixels, h w blocks. Decisions are drawn on the CPU and sent to the device of the images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives

LEAST = 1e-8
"""Importance below which blocks are all alike; its logarithm is taken."""


def block_mask(
    size: tuple[int, int], block: int, ratio: float | Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Where images stay visible, in square blocks of about `block` pixels.  # B H W, bool

    There is one generator for each image. Each block is hidden with probability `ratio`, one number or B h w. Sides
    that are no multiple of the block have a whole number of blocks all the same, whose sides then differ by a pixel.
    """
    grid = block_grid(size, block)
    drawn = torch.stack([torch.rand(1, *grid, generator=generator) for generator in generators])  # B 1 h w
    if isinstance(ratio, Tensor):
        drawn, ratio = drawn.to(ratio.device, non_blocking=True), ratio[:, None]
    return F.interpolate((drawn >= ratio).float(), size, mode="nearest")[:, 0].bool()


def block_grid(size: tuple[int, int], block: int) -> tuple[int, int]:
    """How many blocks an image H W has along each axis."""
    return max(round(size[0] / block), 1), max(round(size[1] / block), 1)


def hiding_probability(importance: Tensor, ratio: float, cap: float) -> Tensor:
    """The probability with which blocks are hidden, by their importance: ... n both.

    With s the logarithm of the importance, it is min(ratio * (s_max - s) / (s_max - mean s), cap), so its mean is
    `ratio` where the cap does not bind (adaptive augmentation of GCA, arXiv 2010.14945). The most important block stays
    visible. Where all are equally important, all are hidden with probability `ratio`, at most `cap`.
    """
    gap = importance.clamp_min(LEAST).log()
    gap = gap.amax(dim=-1, keepdim=True) - gap
    mean = gap.mean(dim=-1, keepdim=True)
    least = 8 * torch.finfo(gap.dtype).eps  # differences by rounding are none
    weight = torch.where(mean > least, gap / mean.clamp_min(least), 1)
    return (ratio * weight).clamp(max=cap)


def block_importance(kind: str, label: Tensor, probability: Tensor, grid: tuple[int, int]) -> Tensor:
    """The importance of each block, at least 0, from labels and the teacher's probability of them.  # B h w

    `label` B H W, train ids with 255 = ignored, `probability` B H W, 0 where pseudo-labels do not count, 1 on ground
    truth. It is a mean over the labelled pixels of a block:

    - "uncertainty": 1 - probability;
    - "boundary": whether a pixel has another label than its right or its lower neighbour;
    - "rarity": 1 / share of its class among the labelled pixels of the joint batch.

    A block without labelled pixels has the mean importance of its image.
    """
    known = (label != IGNORE) & (probability > 0)
    if kind == "uncertainty":
        importance = 1 - probability
    elif kind == "boundary":
        beside = F.pad(label, (0, 1, 0, 1), value=IGNORE)
        neighbours = torch.stack([beside[:, :-1, 1:], beside[:, 1:, :-1]])  # 2 B H W, right and lower
        importance = ((neighbours != label) & (neighbours != IGNORE)).any(dim=0).to(probability.dtype)
    else:
        count = torch.zeros(IGNORE + 1, dtype=torch.int64, device=label.device)
        count = collectives.all_reduce_sum(count.scatter_add_(0, label.flatten(), known.flatten().long()))
        importance = (count.sum() / count.clamp_min(1))[label]
    total, share = (F.adaptive_avg_pool2d(maps, grid) for maps in (importance * known, known.to(importance.dtype)))
    mean = total.sum(dim=(1, 2), keepdim=True) / share.sum(dim=(1, 2), keepdim=True).clamp_min(LEAST)
    return torch.where(share > 0, total / share.clamp_min(LEAST), mean)


def importance_ratio(masking: settings.Masking, label: Tensor, probability: Tensor) -> Tensor:
    """With `masking.importance`, the probability with which each block is hidden.  # B h w

    Arguments as in `block_importance`. With `hide_important` the order is turned round: the most important blocks are
    hidden with the largest probability, and the least important one stays visible.
    """
    assert masking.importance is not None
    size = (label.shape[1], label.shape[2])
    grid = block_grid(size, masking.block_pixels(size))
    importance = block_importance(masking.importance, label, probability, grid).flatten(1)
    importance = importance.clamp_min(LEAST).reciprocal() if masking.hide_important else importance
    return hiding_probability(importance, masking.ratio, masking.cap).unflatten(1, grid)
