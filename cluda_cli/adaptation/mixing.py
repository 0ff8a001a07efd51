"""Class mix: pixels of some source classes pasted onto target images (ClassMix, as DACS uses it).

B batch, H W pixels of the crop. Decisions are drawn on the CPU and sent to the device of the labels, so that every
device mixes the same pixels; nothing is read back from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluda_cli.distributed import collectives

NUM_IDS = 256  # of labels stored in a byte, IGNORE included


def choose_classes(label: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """For every image a random half of the classes in the batch: label (B H W, ids 0..255) -> B 256, bool.

    There is one generator for each image. The classes are those of the joint batch of all ranks, IGNORE counts as one,
    and a half is rounded up. So an image may lose more than half of its own classes; this is how the published results
    were made (DACS takes the classes of each image).
    """
    present = torch.zeros(NUM_IDS, dtype=torch.bool, device=label.device)
    present.scatter_(0, label.flatten().long(), True)
    present = collectives.all_reduce_any(present)
    score = torch.stack([torch.rand(NUM_IDS, generator=generator) for generator in generators])  # B 256
    score = score.to(label.device, non_blocking=True)
    score = score.masked_fill(~present, torch.inf)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)  # B 256, 0 = smallest score
    return rank < (present.sum() + 1) // 2


def tail_law(statistic: Tensor, tail: Tensor, temperature: float) -> Tensor:
    """Probability of drawing each class: softmax((1 - statistic) / temperature) over the classes of `tail` alone.

    The statistic (K, 0..1) is the frequency of a class or the confidence in it; `tail` (K, bool) has one at least.
    """
    return ((1 - statistic) / temperature).masked_fill(~tail, -torch.inf).softmax(0)


def draw_classes(law: Tensor, uniform: Tensor) -> Tensor:
    """Classes by the inverse of the cumulative law: law B K, of any sum, and uniform numbers B n, 0..1 -> B n, int64.

    K stands for no class, where a law is 0.
    """
    cumulative = law.cumsum(dim=1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def choose_by_law(label: Tensor, law: Tensor, count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """For every image the classes of `count` draws by the law (K) among those that it shows; -> B 256, bool.

    Labels are B H W, ids 0..255, and there is one generator for each image. Classes may be drawn twice, so `count` is
    the most; an image that shows none of the law's classes gets none.
    """
    shown = torch.zeros(len(label), NUM_IDS, dtype=torch.bool, device=label.device)
    shown.scatter_(1, label.flatten(1).long(), True)
    uniform = torch.stack([torch.rand(count, generator=generator) for generator in generators])  # B n
    drawn = draw_classes(law * shown[:, : len(law)], uniform.to(label.device, non_blocking=True))
    chosen = torch.zeros(len(label), NUM_IDS + 1, dtype=torch.bool, device=label.device)  # the last column: no class
    return chosen.scatter_(1, drawn.where(drawn < len(law), NUM_IDS), True)[:, :NUM_IDS]


def class_mask(label: Tensor, chosen: Tensor) -> Tensor:
    """Where each image shows one of its chosen classes: label (B H W), chosen (B 256, bool) -> B H W, bool."""
    return chosen.gather(1, label.flatten(1).long()).view_as(label)


def class_mix(
    source_image: Tensor,
    source_label: Tensor,
    target_image: Tensor,
    target_label: Tensor,
    target_weight: Tensor,
    pasted: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B 3 H W), label and weight (B H W) with the `pasted` pixels of the source on top of the target.

    Labels and weights are B H W, `pasted` is B H W, bool; pixels of the source have weight 1.
    """
    image = torch.where(pasted[:, None], source_image, target_image)
    label = torch.where(pasted, source_label, target_label)
    return image, label, target_weight.masked_fill(pasted, 1.0)
