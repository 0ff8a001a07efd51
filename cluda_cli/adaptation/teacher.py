"""The moving-average teacher: its weights, its pseudo-labels and their weight.

B batch, K classes, H W pixels of the crop, h w cells of the decoder's grid.
"""

import copy
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import settings
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.distributed import collectives
from cluda_cli.models.decoders import Decoder
from cluda_cli.models.frozen import Frozen, fit_images
from cluda_cli.models.normalisation import Normalisation
from cluda_cli.models.segmenter import Output, Segmenter


class PseudoLabels(NamedTuple):
    """What the teacher says of target images. B H W each."""

    label: Tensor  # int64 train ids
    weight: Tensor  # float32, 0..1
    probability: Tensor  # float32, of the label; 0 where pseudo-labels do not count
    logits: Tensor | None = None  # B K h w, of which the labels were made
    features: Tensor | None = None  # B D h w, fused ones of a frozen teacher; None: the moving average labels


class FrozenTeacher(nn.Module):
    """A trained network that labels target images in place of the moving average: distillation.

    `classes` are its own, `known` those of the student; a pixel of any other class is ignored. It sees images `scale`
    times as large as the student does, so that things have the size at which it learnt them. It is no state of a run.
    """

    def __init__(self, network: Segmenter, classes: ClassTable, known: ClassTable, scale: float = 1.0) -> None:
        """It has to know all classes of the student."""
        super().__init__()
        self.network, self.scale = Frozen(network), scale
        table = torch.tensor(classes.remap_to(known))
        self.register_buffer("train_id", table, persistent=False)  # 256, by train id of the teacher
        rows = [classes.names.index(name) for name in known.names]
        self.register_buffer("rows", torch.tensor(rows), persistent=False)  # K, its train id of each class

    @property
    def channels(self) -> int:
        """Channels of its fused feature."""
        decoder: Decoder = self.network.network.decoder
        return decoder.classifiers()[0].in_channels

    def pseudo_labels(
        self, image: Tensor, normalisation: Normalisation, confidence: float, valid: Tensor
    ) -> PseudoLabels:
        """As `Teacher.pseudo_labels`, of images with this normalisation, and the fused features with them."""
        output: Output = self.network(fit_images(image, normalisation, self.network.network, self.scale))
        found = label_logits(output.logits, confidence, valid)
        label = self.train_id[found.label]
        known = label != IGNORE
        logits = output.logits[:, self.rows]  # B K h w
        return PseudoLabels(label, found.weight * known, found.probability * known, logits, output.features)


class Teacher(nn.Module):
    """Moving average of the student's parameters (Mean Teacher, section 2).

    `network` is what to evaluate or deploy, after `network.eval()`. The batch norms of the network normalise with the
    target batch while pseudo-labels are made, and keep running statistics of the target on their own; the average
    never touches them (docs/decisions/0002-teacher-batch-norm.md).
    """

    def __init__(
        self,
        student: Segmenter,
        teacher: settings.Teacher,
        class_weights: Tensor | None = None,
        frozen: FrozenTeacher | None = None,
    ) -> None:
        """`class_weights` (K) are those with which the student learns and for which pseudo-labels are corrected.

        Cross-entropy with weights w learns probabilities in proportion to w p, so log w is taken from the logits (logit
        adjustment, arXiv 2007.07314). With `frozen`, that network labels, as it is, and the average does not.
        """
        super().__init__()
        tilt = None if class_weights is None else class_weights.log()[:, None, None]  # K 1 1
        self.register_buffer("tilt", tilt, persistent=False)
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.frozen = frozen
        self.decay, self.confidence = teacher.decay, teacher.confidence
        self._set_modes()

    def train(self, mode: bool = True) -> Self:
        """Whatever mode is asked for, the network is set to make pseudo-labels; `network.eval()` is for evaluation."""
        self.training = mode
        self._set_modes()
        return self

    @torch.no_grad()
    def update(self, student: Segmenter, step: int) -> None:
        """Move the parameters towards the student's after `step` (>= 1) finished optimizer steps."""
        own, others = list(self.network.parameters()), list(student.parameters())
        torch._foreach_lerp_(own, others, 1 - ema_decay(step, self.decay))

    @torch.no_grad()
    def pseudo_labels(self, image: Tensor, valid: Tensor) -> PseudoLabels:
        """Pseudo-labels of normalised target images (B 3 H W).

        `valid` (B H W, bool or 0..1) says where pseudo-labels may have weight. Batch norms see this batch.
        """
        if self.frozen is not None:
            return self.frozen.pseudo_labels(image, self.network.normalisation, self.confidence, valid)
        logits = self.output(image).logits  # B K h w
        logits = logits if self.tilt is None else logits.float() - self.tilt
        return label_logits(logits, self.confidence, valid)

    @torch.no_grad()
    def output(self, image: Tensor, *, keep_statistics: bool = True) -> Output:
        """All that the network makes of normalised images (B 3 H W), in the modes of pseudo-labels.

        Without `keep_statistics` the batch norms normalise with these images all the same, and forget them: running
        statistics are those of the target, as it will be seen.
        """
        self._set_modes()
        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        try:
            for norm in norms:
                norm.track_running_stats = keep_statistics
            output: Output = self.network(image)
        finally:
            for norm in norms:
                norm.track_running_stats = True
        return output

    def _set_modes(self) -> None:
        """Batch norms in training mode unless the network froze them, all else (dropout, drop-path) in evaluation."""
        self.network.train()  # the network's own rule keeps its frozen batch norms in evaluation mode
        for module in self.network.modules():
            if not isinstance(module, _BatchNorm):
                module.training = False  # `module.eval()` would reach the batch norms below it


def ema_decay(step: int, cap: float) -> float:
    """Share of the teacher that an update keeps: min(1 - 1/(step + 1), cap), as Mean Teacher ramps it."""
    return min(1 - 1 / (step + 1), cap)


def label_logits(logits: Tensor, confidence: float, valid: Tensor) -> PseudoLabels:
    """Pseudo-labels from logits (B K h w), at the size of `valid` (B H W, bool or 0..1).

    The label is the most probable class. The weight is one number for the joint batch of all ranks, times `valid`: the
    share of all pixels, valid or not, whose probability is at least `confidence` (DAFormer, section 3.1).
    """
    resized = F.interpolate(logits.float(), valid.shape[-2:], mode="bilinear", align_corners=False)  # B K H W
    probability, label = resized.softmax(dim=1).max(dim=1)  # B H W
    share = collectives.all_reduce_mean((probability >= confidence).float().mean())
    return PseudoLabels(label, share * valid.float(), probability * valid.float(), logits)
