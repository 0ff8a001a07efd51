"""How confident the student is of each class, and what follows from it (AEL, arXiv 2110.05474).

B batch, K classes, H W pixels, h w cells of the logits. Confidence is 0..1; its complement is called doubt here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.distributed import collectives


def sum_confidence(logits: Tensor, label: Tensor, chosen: Tensor) -> Tensor:
    """Sums over the pixels of `chosen` B H W, bool, for each class: the probability of the label, and 1.  # 2 K

    Logits B K h w are resized to labels B H W, train ids.
    """
    resized = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)  # B K H W
    train_id = label.where(chosen, 0)
    probability = resized.softmax(1).gather(1, train_id[:, None])[:, 0]  # B H W
    values = torch.stack([probability, torch.ones_like(probability)]).flatten(1) * chosen.flatten()  # 2 B*H*W
    return values.new_zeros(2, logits.shape[1]).index_add_(1, train_id.flatten(), values)


def move_confidence(confidence: Tensor, seen: Tensor, sums: Tensor, momentum: float) -> Tensor:
    """The moving average after a step with the sums 2 K of `sum_confidence`, over all images and ranks.  # K

    A class without pixels in this step keeps its confidence; one never `seen` before (K, bool) takes that of the step.
    """
    total, count = sums
    found = total / count.clamp_min(1)
    return torch.where(count > 0, torch.where(seen, torch.lerp(found, confidence, momentum), found), confidence)


def class_law(confidence: Tensor, temperature: float) -> Tensor:
    """Probabilities with which classes are drawn: softmax((1 - confidence) / temperature).  # K"""
    return ((1 - confidence) / temperature).softmax(0)


def paste_law(confidence: Tensor, excluded: Sequence[int] = ()) -> Tensor:
    """Probabilities with which pasted classes are drawn: softmax(sqrt(1 - confidence)), 0 for `excluded` ones.  # K"""
    doubt = (1 - confidence).clamp_min(0).sqrt()
    return doubt.index_fill(0, torch.tensor(excluded, dtype=torch.long, device=doubt.device), -torch.inf).softmax(0)


def keep_rates(confidence: Tensor, seen: Tensor, exponent: float) -> Tensor:
    """Share of the pixels of each class that count: (doubt / largest doubt of a seen class) ^ exponent, 0..1.  # K

    The least confident class, and those that were never seen (K, bool), keep all.
    """
    doubt = (1 - confidence).clamp_min(0)
    largest = doubt.where(seen, 0).max()
    return torch.where(seen & (largest > 0), (doubt / largest) ** exponent, 1)


def keep_pixels(label: Tensor, rates: Tensor, drawn: Tensor) -> Tensor:
    """Which pixels count, by the rates K of their classes: labels B H W, `drawn` 0..1.  # B H W, bool"""
    return drawn > 1 - rates[label.clamp(max=len(rates) - 1)]


def weigh_pixels(probability: Tensor, kept: Tensor, counted: Tensor, exponent: float) -> Tensor:
    """Weights probability ^ exponent of the kept pixels, scaled to a mean of 1 over the `counted` ones.  # B H W

    All are B H W, the last two bool; the mean is that of all ranks. What is not counted or not kept has weight 0. So
    the mean over counted pixels of weight times loss is the weighted mean of the loss.
    """
    weight = probability**exponent * (kept & counted)
    total, count = collectives.all_reduce_sum(torch.stack([weight.sum(), counted.sum().to(weight)]))
    return weight * (count / total.clamp_min(torch.finfo(weight.dtype).tiny))
