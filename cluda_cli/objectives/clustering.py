"""Adversarial clustering of target regions, and agreement of strongly augmented views (CDAC, arXiv 2104.09415).

B images, K classes, D fused channels, h w cells of a map, R regions: R = B * K, one for each class of each image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cluda_cli import settings
from cluda_cli.adaptation.views import Scene, Seen
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.objectives.cells import label_cells
from cluda_cli.objectives.objective import Objective

EPSILON = 1e-7
"""Added to probabilities before the logarithm (CDAC)."""
COSINE_TEMPERATURE = 0.05
"""Divisor of the logits of a cosine classifier (CDAC)."""
RAMP = 5.0
"""Steepness of the ramp exp(-5 (1 - t/T)^2)."""


class Clustering(Objective):
    """Regions of the target that look alike get one class; the classifier tries to tell them apart (CDAC).

    The sum of three losses. A region is the mean feature of the cells that the teacher gives one class, in one image.

    - Clustering: whether two regions are alike, by their largest channels in the target image as it is, shall be
      whether they have one class; the encoder and decoder minimise the cross-entropy of this, the classifier that reads
      them maximises it. The value is that of the cross-entropy.
    - Labels: where the student is certain of the image as it is, its label is that of the second strong view.
    - Consistency: both strong views have the same class probabilities. This one ramps up.

    The last two are means over cells of the logits whose target pixel has a weight above 0, those of all ranks. With
    two resolutions regions are those of the context. `student` is the network that learns; it is no part of the state.
    """

    reads = (("target", "strong target", "second strong target"),)
    settings: settings.Clustering
    steps: Tensor

    def __init__(self, section: settings.Clustering, student: Segmenter, num_classes: int) -> None:
        super().__init__(section)
        self.num_classes = num_classes
        self._student = (student,)  # torch does not register what a tuple holds
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # that it has been active

    @property
    def student(self) -> Segmenter:
        return self._student[0]

    def forward(self, weak: Seen, strong: Seen, second: Seen) -> Tensor:
        with torch.autocast(weak.output.logits.device.type, enabled=False):
            outputs = [seen.output.logits.float() for seen in (weak, strong, second)]
            known = label_cells(weak.view, outputs[0].shape[2:]) != IGNORE  # B h w
            cells = collectives.all_reduce_sum(known.sum()).clamp_min(1)
            labels = label_costs(outputs[0], outputs[2], self.settings.threshold)
            disagreement = consistency_costs(outputs[1], outputs[2])
            ramp = self.settings.consistency * ramp_up(self.steps, self.settings.ramp_steps)
            of_cells = torch.where(known, labels + ramp * disagreement, 0).sum() / cells
            return self._cluster(weak, strong) + collectives.world_size() * of_cells

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        """Count the step, and note which share of the pairs of different regions are alike."""
        self.steps += 1
        found = [self._pool(one, one) for one in seen if one.view.name == "target"]
        rows, present = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        alike = share_channels(rows, self.settings.top, self.settings.overlap)
        pairs = present[:, None] & present & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        scene.notes["clustering/pairs alike"] = (alike & pairs).sum() / pairs.sum().clamp_min(1)

    def _pool(self, seen: Seen, labelled: Seen) -> tuple[Tensor, Tensor]:
        """The regions of all ranks as `labelled` has them, in the features of `seen`: R D, and which exist, R."""
        features = seen.output.features.float()
        label = label_cells(labelled.view, features.shape[2:])  # B h w
        rows, present = pool_regions(features, label, self.num_classes)
        return collectives.all_gather_rows(rows), collectives.all_gather_rows(present)

    def _cluster(self, weak: Seen, strong: Seen) -> Tensor:
        rows, present = self._pool(weak, weak)
        alike = share_channels(rows.detach(), self.settings.top, self.settings.overlap)
        probability, other = (self._classify(r).softmax(dim=1) for r in (rows, self._pool(strong, weak)[0]))
        pairs = (present[:, None] & present).to(rows.dtype)  # R R
        return (pairs * pair_costs(probability, other, alike)).sum() / pairs.sum().clamp_min(1)

    def _classify(self, rows: Tensor) -> Tensor:
        """Logits R K of features R D, by a classifier that learns the opposite of what it is told.

        A kernel of several pixels sees the same feature everywhere.
        """
        cosine, logits = self.settings.cosine_classifier, rows.new_zeros(len(rows), self.num_classes)
        rows = F.normalize(rows, dim=1) / COSINE_TEMPERATURE if cosine else rows
        for layer in self.student.decoder.classifiers():
            weight, bias = (
                Reverse.apply(collectives.gather_tensor(p).to(rows.dtype)) for p in (layer.weight, layer.bias)
            )
            logits = logits + F.linear(rows, weight.sum(dim=(2, 3)), None if cosine else bias)
        return logits


class Reverse(torch.autograd.Function):
    """The tensor as it is; its gradient with the opposite sign."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return -gradient


def pool_regions(features: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean of features B D h w over the cells of each class in each image, by labels B h w with 255 = ignored.

    Rows B*K D, in the order image, class, and which of them have a cell, boolean B*K; the others are 0.
    """
    one_hot = (label.flatten(1)[:, None] == torch.arange(num_classes, device=label.device)[:, None]).to(features.dtype)
    count = one_hot.sum(dim=2)  # B K
    total = one_hot @ features.flatten(2).movedim(1, 2)  # B K D
    return (total / count.clamp_min(1)[..., None]).flatten(0, 1), (count > 0).flatten()


def share_channels(features: Tensor, top: int, overlap: float) -> Tensor:
    """Which of n vectors, n D, have nearly the same largest channels: boolean n n, symmetric, true on the diagonal.

    The sets of the `top` largest channels must overlap by at least `overlap` (intersection over union); with 1 they
    must be equal, as in CDAC.
    """
    count = min(top, features.shape[1])
    largest = features.topk(count, dim=1).indices
    member = torch.zeros_like(features).scatter_(1, largest, 1)  # n D
    common = (member @ member.T).round()
    return common >= overlap * (2 * count - common) - 1e-6


def pair_costs(probability: Tensor, other: Tensor, alike: Tensor) -> Tensor:
    """Cross-entropy, in nats, of whether two vectors have one class: class probabilities n K and n K, `alike` n n.

    With P_ij = sum_k p_ik q_jk it is -ln(P_ij + 1e-7) where the vectors are alike and -ln(1 - P_ij + 1e-7) elsewhere
    (CDAC).  # n n
    """
    same = probability @ other.T
    return -torch.where(alike, same, (1 - same).clamp_min(0)).add(EPSILON).log()


def label_costs(weak: Tensor, strong: Tensor, threshold: float) -> Tensor:
    """Cross-entropy of the strong view's logits B K ... with the labels of the weak view's logits, in nats.  # B ...

    0 where the largest probability of the weak view is below `threshold`. Labels have no gradient.
    """
    probability, label = weak.detach().softmax(dim=1).max(dim=1)
    return F.cross_entropy(strong, label, reduction="none") * (probability >= threshold)


def consistency_costs(strong: Tensor, second: Tensor) -> Tensor:
    """Mean over classes of the squared difference of class probabilities, from logits B K ... twice.  # B ..."""
    return (strong.softmax(dim=1) - second.softmax(dim=1)).square().mean(dim=1)


def ramp_up(steps: Tensor, length: int) -> Tensor:
    """exp(-5 (1 - t/T)^2) after t `steps` of T = `length`; 1 from then on, or at once if T is 0 (CDAC)."""
    rest = 1 - steps.clamp(max=length) / length if length else torch.zeros_like(steps, dtype=torch.float32)
    return torch.exp(-RAMP * rest**2)
