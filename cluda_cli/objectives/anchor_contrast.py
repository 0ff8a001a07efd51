"""Contrast of anchors, a few pixels of every class and image, behind a projection head.

B images, D fused channels, E projected channels, H W pixels, h w cells of the fused feature, A anchors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.contrast.kernel import tiled_contrast
from cluda_cli.objectives.objective import Objective

DRAWN = 2**31
"""Random numbers that order pixels are integers below this, so many that two are hardly ever equal."""
LAST = 2**62
"""Place of a pixel that is no anchor, behind all that are."""


class AnchorContrast(Objective):
    """Draw the anchors of a class together and push those of different classes apart (Wang et al., arXiv 2101.11939).

    All views are contrasted together, and the anchors are those of all ranks. A cell of the fused feature has the label
    of its upper left pixel, as in the pixel contrast. It can be an anchor if this pixel has a label and a weight above
    0, and if the teacher's probability of a pseudo-label is at least `min_probability`. Anchors all count alike. With
    two resolutions they are cells of the context.

    `channels` are those of the fused feature. The head has no norm, because it sees the anchors alone: statistics of so
    few pixels, in equal shares of the classes, would say little. So it costs as much as the anchors, not as the pixels.
    """

    settings: settings.AnchorContrast

    def __init__(self, section: settings.AnchorContrast, views: Sequence[str], channels: int) -> None:
        super().__init__(section)
        self.reads = (tuple(views),)
        width = section.projection_dim
        self.head = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, *seen: Seen) -> Tensor:
        with torch.autocast(seen[0].output.features.device.type, enabled=False):
            found = [self._find(*one) for one in seen]
            place, label, features = self._first(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))
            anchors = [collectives.all_gather_rows(rows) for rows in (place, label, self.head(features))]
            _, label, projected = self._first(*anchors)
            return mean_contrast(projected, label, self.settings.temperature)

    def _find(self, output: Output, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """The anchors of a view and, if they are few, other pixels after them: places A, labels A and features A D.

        The label of what is no anchor is 255.
        """
        features = output.features.float()
        size = features.shape[2:]
        certain = (view.weight > 0) & (view.probability >= self.settings.min_probability)  # B H W
        label = view.label.where(certain, IGNORE)[:, None].float()
        label = F.interpolate(label, size, mode="nearest").long().flatten(1)  # B h*w
        right = F.interpolate(output.logits.detach(), size, mode="bilinear").argmax(dim=1).flatten(1) == label  # B h*w
        cells = label.shape[1]
        drawn = torch.stack([torch.randint(DRAWN, (cells,), generator=g) for g in view.generators("anchors")])
        place = anchor_places(label, right, drawn.to(label.device, non_blocking=True), self.settings.anchors).flatten()
        order = place.argsort(stable=True)[: self.settings.max_anchors]  # A
        place, label = place[order], label.flatten()[order]
        image, cell = order // cells, order % cells
        return place, label.where(place < LAST, IGNORE), features.flatten(2)[image, :, cell]

    def _first(self, place: Tensor, *rows: Tensor) -> list[Tensor]:
        """Of all rows as many as there may be anchors, in ascending order of their places."""
        order = place.argsort(stable=True)[: self.settings.max_anchors]
        return [tensor[order] for tensor in (place, *rows)]


def anchor_places(label: Tensor, right: Tensor, drawn: Tensor, count: int) -> Tensor:
    """Choose at most `count` anchors of every class and image: their places, B n int64; those of all others are `LAST`.

    Of n pixels in each image, `label` B n are train ids with 255 = no anchor, `right` B n says whether the student
    predicts them, and `drawn` B n are random integers from 0 to `DRAWN`. Misclassified and other pixels of a class take
    turns, each kind in random order and until it is used up. So half of the anchors are misclassified where both kinds
    suffice (Wang et al.). In ascending order of places, every class of every image has its first anchor before any has
    its second, so whoever takes the first of them takes as many of all.
    """
    image = torch.arange(len(label), device=label.device)[:, None]
    group = (IGNORE + 1) * image + label  # B n, one for each class of each image
    turn = _rank(group, 2 * _rank(2 * group + right, drawn) + right)
    return torch.where((label != IGNORE) & (turn < count), turn * DRAWN + drawn, LAST)


def _rank(group: Tensor, key: Tensor) -> Tensor:
    """For each element the number of those in its group that come before it, in ascending order of `key`.

    All integers, of one shape, with keys from 0 to `DRAWN`. Equal keys keep their order.
    """
    order = (group * DRAWN + key).flatten().argsort(stable=True)
    ordered = group.flatten()[order]
    rank = torch.empty_like(ordered)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return rank.view_as(group)


def mean_contrast(projected: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Contrast of anchors, averaged over those that have a positive.

    `projected` A E of any length (their direction counts), `label` A train ids, 255 = no anchor. With s_ij the cosine
    similarity divided by `temperature`, P_i the other anchors of the class of i, and N_i those of other classes, it is
    the mean over all i with a positive of

        1/|P_i| sum_{j in P_i} -log( exp(s_ij) / (exp(s_ij) + sum_{k in N_i} exp(s_ik)) ),

    which is the loss of Wang et al. (arXiv 2101.11939) without a memory. A scalar, exactly 0 without a positive or
    without a negative.
    """
    value = tiled_contrast(projected, label, torch.ones_like(label, dtype=projected.dtype), temperature)
    count = torch.zeros(IGNORE + 1, dtype=torch.long, device=label.device)  # by train id
    count = count.scatter_add(0, label, torch.ones_like(label))[:IGNORE]
    # The kernel divides by all anchors, those without a positive included.
    return value * count.sum() / count.where(count > 1, 0).sum().clamp_min(1)
