"""Cross-entropy on a view. B batch, K classes, H W pixels, h w cells of the logits."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.objective import Objective


class CrossEntropy(Objective):
    """Supervision by the labels of a view, ground truth or pseudo-labels alike; the weights make the difference.

    With class weights (K, by train id) pixels of ground truth count by their class. With a detail crop, the crop has a
    share of its own in the term (HRDA, section 3).
    """

    settings: settings.CrossEntropy

    def __init__(
        self,
        section: settings.CrossEntropy,
        view: str,
        class_weights: Tensor | None = None,
        hard_pixels: settings.HardPixels | None = None,
    ) -> None:
        super().__init__(section)
        self.reads = ((view,),)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.mean: Callable[[Tensor, Tensor, Tensor], Tensor] = (
            partial(hard_cross_entropy, hard=hard_pixels) if hard_pixels else weighted_cross_entropy
        )

    def forward(self, seen: Seen) -> Tensor:
        output, view = seen
        with torch.autocast(output.logits.device.type, enabled=False):
            weight = self._weigh(view)
            whole = self.mean(output.logits.float(), view.label, weight)
            if output.detail is None:
                return whole
            boxes, logits = output.detail.boxes, output.detail.logits.float()
            part = self.mean(logits, boxes.crop(view.label), boxes.crop(weight))
            return torch.lerp(whole, part, self.settings.detail_weight)

    def _weigh(self, view: View) -> Tensor:
        """The weight of each pixel, float32 B H W; pseudo-labels have no class weight."""
        weight = view.weight.float()
        if self.class_weights is None or view.truth is None:
            return weight
        by_class = self.class_weights[view.label.clamp(max=len(self.class_weights) - 1)]  # B H W, any value on IGNORE
        return torch.where(view.truth, weight * by_class, weight)


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Mean over ALL pixels of weight times cross-entropy; ignored pixels count as 0 (DACS; DAFormer, section 3.1).

    Logits B K h w are first resized to the labels B H W (train ids, 255 = ignored); weights are B H W. A scalar.
    """
    return (measure_pixels(logits, label) * weight).mean()


def measure_pixels(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of each pixel, 0 where it is ignored; the logits are resized to the labels.  # B H W"""
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)  # B K H W
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")


def hard_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, hard: settings.HardPixels) -> Tensor:
    """Mean over the hard pixels alone of weight times cross-entropy; arguments as in `weighted_cross_entropy`.

    The value is sum_i h_i w_i l_i / sum_i h_i, where h_i is 1 on what `hard_pixels` keeps (Wu et al., arXiv 1605.06885,
    with the least number of pixels counted in every image). Pixels without weight take no part. The pixels are those of
    all ranks, and the mean of the ranks' values is the term. A scalar, exactly 0 without labelled pixels.
    """
    loss = measure_pixels(logits, label)  # B H W
    kept = hard_pixels(loss.detach(), (label != IGNORE) & (weight > 0), hard.threshold, hard.min_share)
    return collectives.world_size() * (loss * weight * kept).sum() / collectives.all_reduce_sum(kept.sum()).clamp_min(1)


def hard_pixels(loss: Tensor, labelled: Tensor, threshold: float, min_share: float) -> Tensor:
    """Which labelled pixels are hard: `loss` B H W in nats and `labelled` B H W boolean -> B H W boolean.

    A pixel is kept if the probability of its label, exp(-loss), is below `threshold`, 0..1. Of every image at least
    `min_share` of the labelled pixels are kept, rounded up, the hardest first; as hard ones as the last are kept too.
    """
    of_image = loss.masked_fill(~labelled, -torch.inf).flatten(1)  # B H*W
    least = (min_share * labelled.flatten(1).sum(dim=1, keepdim=True)).ceil().long()  # B 1
    bar = of_image.sort(dim=1, descending=True).values.gather(1, (least - 1).clamp_min(0))  # B 1
    return labelled & ((loss > -math.log(threshold)) | (loss >= bar[:, :, None]))
