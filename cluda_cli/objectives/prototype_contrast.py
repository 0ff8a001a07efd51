"""Contrast of pixels with statistics of the classes.

B batch, D channels, K classes, H W pixels, h w cells of a feature map, N = B h w.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.teacher import ema_decay
from cluda_cli.adaptation.views import Scene, Seen
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.models.average import MovingAverage
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.feature_distance import downscale_label
from cluda_cli.objectives.objective import Objective
from cluda_cli.objectives.prototypes.losses import (
    bank_losses,
    distribution_losses,
    is_counted,
    mean_losses,
    uniformity,
    weighted_mean,
)
from cluda_cli.objectives.prototypes.projection import Projection
from cluda_cli.objectives.prototypes.statistics import Bank, Running, batch_statistics


class PrototypeContrast(Objective):
    """Draw every pixel to what is known of its class and away from the other classes (SePiCo, arXiv 2204.08808; SPCL,
    arXiv 2111.12358).

    What is known are statistics of source features with ground truth, collected after each step; so the first step,
    which knows nothing, gives 0. Features have length 1. The term of a view is the mean of the pixels' losses by their
    weights, over all ranks. With two resolutions pixels are cells of the context.

    `channels` are those of the encoder's maps, `fused` those of the fused feature; `truth` is the view of
    ground truth. The head that makes the features of the statistics is a moving average, as the teacher is one of the
    student; with statistics of the student, a copy.
    """

    settings: settings.PrototypeContrast

    def __init__(
        self,
        section: settings.PrototypeContrast,
        num_classes: int,
        channels: Sequence[int],
        fused: int,
        truth: str = "source",
    ) -> None:
        super().__init__(section)
        self.truth, self.reads = truth, ((truth,), (section.target_view,))
        projected, averaged = section.features == "projection", section.running == "average"
        size = section.projection_channels if projected else fused
        self.head = Projection(channels, size) if projected else None
        self.average = MovingAverage(self.head) if self.head else None
        self.known: Bank | Running = (
            Bank(num_classes, size, section.bank_length)
            if section.statistics == "bank"
            else Running(num_classes, size, section.momentum if averaged else None)
        )

    def forward(self, seen: Seen) -> Tensor:
        output, view = seen
        with torch.autocast(output.image.device.type, enabled=False):
            maps = make_features(output, self.head)  # B D h w
            size, num_classes = maps.shape[2:], len(self.known.count)
            label, weight = to_cells(view.label, view.weight.float(), size, self.settings.label_share, num_classes)
            if self.settings.only_correct_source and view.name == self.truth:
                label = leave_out_wrong(label, output.logits)
            features, label = to_rows(maps), label.flatten()  # N D, N
            weight = weight.flatten() * is_counted(label, self.known.met)
            value = weighted_mean(self._losses(features, label), weight)
            if self.settings.uniformity_weight:
                value = value - self.settings.uniformity_weight * self._uniformity(features, weight)
            return value

    def _losses(self, features: Tensor, label: Tensor) -> Tensor:
        """The loss of each pixel, N, from features N D and labels N."""
        known, temperature = self.known, self.settings.temperature
        if isinstance(known, Bank):
            return bank_losses(features, label, known.means, known.length, temperature)
        if self.settings.statistics == "mean":
            return mean_losses(features, label, known.mean, known.met, temperature)
        return distribution_losses(features, label, known.mean, known.variance, known.met, temperature)

    def _uniformity(self, features: Tensor, weight: Tensor) -> Tensor:
        """Uniformity of the prediction for the mean feature of the pixels of all ranks; 0 without any."""
        feature = collectives.all_gather_rows(weighted_mean(features, weight)[None]).mean(dim=0)  # D
        value = uniformity(feature, self.known.mean, self.known.met, self.settings.temperature)
        return value * (collectives.all_reduce_sum(weight.sum()) > 0)

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        """Take in the source features of the step: the teacher's, or what the student made of the source view."""
        source, decay = scene.source, 0.0
        found = [(output, view.label) for output, view in seen if view.name == self.truth]
        if self.settings.statistics_from == "teacher":
            decay = ema_decay(scene.step + 1, scene.teacher.decay)
            found = [(scene.teacher.output(source.image, keep_statistics=False), source.label)]
        if self.average is not None:
            self.average.update(decay)
        with torch.autocast(source.image.device.type, enabled=False):
            rows = [self._collect(output, label) for output, label in found]
            features, label = (torch.cat(parts) for parts in zip(*rows, strict=True))
            self.known.update(batch_statistics(features, label, len(self.known.count)))

    def _collect(self, output: Output, label: Tensor) -> tuple[Tensor, Tensor]:
        """Features N D of source images and their labels N, from ground truth B H W."""
        maps = make_features(output, self.average)
        label = downscale_label(label, maps.shape[2:], self.settings.label_share, len(self.known.count))
        if self.settings.only_correct_source:
            label = leave_out_wrong(label, output.logits)
        return to_rows(maps), label.flatten()


def make_features(output: Output, head: nn.Module | None) -> Tensor:
    """The feature of every cell, of length 1: the head's, or without one the fused feature.  # B D h w"""
    if head is None:
        return F.normalize(output.features.float(), dim=1)
    features: Tensor = head([maps.float() for maps in output.encoder])
    return features


def to_rows(maps: Tensor) -> Tensor:
    """Maps B D h w as rows N D, in the order image, row, column."""
    return maps.movedim(1, -1).flatten(0, 2)


def to_cells(
    label: Tensor, weight: Tensor, size: tuple[int, int], min_share: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Labels and weights, B H W each, on a grid of `size`: B h w each.

    A pixel without weight has no label. A cell has the label of at least `min_share` of its pixels, or 255, and the
    mean weight of its labelled pixels.
    """
    label = label.masked_fill(weight == 0, IGNORE)
    labelled = (label != IGNORE).to(weight.dtype)
    share, total = (F.adaptive_avg_pool2d(one, size) for one in (labelled, weight * labelled))
    return downscale_label(label, size, min_share, num_classes), total / share.where(share > 0, 1)


def leave_out_wrong(label: Tensor, logits: Tensor) -> Tensor:
    """Labels B h w with 255 where logits B K * *, resized to them, are largest for another class."""
    predicted = F.interpolate(logits.detach().float(), label.shape[1:], mode="bilinear").argmax(dim=1)
    return label.where(predicted == label, IGNORE)
