"""Cross-entropy on a view. B batch, K classes, H W pixels, h w cells of the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import View
from cluda_cli.data.labels import IGNORE
from cluda_cli.models.segmenter import Output


class CrossEntropy(nn.Module):
    """Supervision by the labels of a view, ground truth or pseudo-labels alike; the weights make the difference."""

    def __init__(self, section: settings.Objective, views: frozenset[str]) -> None:
        super().__init__()
        self.settings, self.views = section, views

    def forward(self, output: Output, view: View) -> Tensor:
        with torch.autocast(output.logits.device.type, enabled=False):
            return weighted_cross_entropy(output.logits.float(), view.label, view.weight.float())


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Mean over ALL pixels of weight times cross-entropy; ignored pixels count as 0 (DACS; DAFormer, section 3.1).

    Logits B K h w are first resized to the labels B H W (train ids, 255 = ignored); weights are B H W. A scalar.
    """
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)  # B K H W
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # B H W
    return (loss * weight).mean()
