"""Cross-entropy on a view. B batch, K classes, H W pixels, h w cells of the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.objectives.objective import Objective


class CrossEntropy(Objective):
    """Supervision by the labels of a view, ground truth or pseudo-labels alike; the weights make the difference.

    With class weights (K, by train id) pixels of ground truth count by their class. With a detail crop, the crop has a
    share of its own in the term (HRDA, section 3).
    """

    settings: settings.CrossEntropy

    def __init__(self, section: settings.CrossEntropy, view: str, class_weights: Tensor | None = None) -> None:
        super().__init__(section)
        self.reads = ((view,),)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, seen: Seen) -> Tensor:
        output, view = seen
        with torch.autocast(output.logits.device.type, enabled=False):
            weight = self._weigh(view)
            whole = weighted_cross_entropy(output.logits.float(), view.label, weight)
            if output.detail is None:
                return whole
            boxes, logits = output.detail.boxes, output.detail.logits.float()
            part = weighted_cross_entropy(logits, boxes.crop(view.label), boxes.crop(weight))
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
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)  # B K H W
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # B H W
    return (loss * weight).mean()
