"""Learning from images without their style.

B batch, K classes, H W pixels, h w cells of the logits, n the highest frequency whose amplitude is replaced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.style import low_amplitude, remove_style, replace_low_amplitude
from cluda_cli.adaptation.views import Maker, Scene, Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.objective import Objective

SOURCE, TARGET = "styleless source", "styleless target"


class ZeroStyle(Objective):
    """The student has to tell classes by content alone, in images whose channels have lost their moments.

    Inspired by the zero-style loss of Lee et al. (AAAI 2021), whose equations we could not read; this is our own form.
    Source images without style have their ground truth, with `class_weights` (K) as in cross-entropy. Target images
    without style have the teacher's probabilities of the images as they are. With `band` above 0 the amplitudes of the
    lowest frequencies are replaced, too, by their mean over all images of both domains that earlier steps have seen.
    """

    reads = ((SOURCE,), (TARGET,))
    settings: settings.ZeroStyle

    def __init__(self, section: settings.ZeroStyle, class_weights: Tensor | None = None) -> None:
        super().__init__(section)
        by_detail = settings.CrossEntropy(detail_weight=section.detail_weight)
        self.cross_entropy = CrossEntropy(by_detail, SOURCE, class_weights)
        if section.band:
            self.register_buffer("amplitude", torch.zeros(3, 2 * section.band + 1, section.band + 1))
            self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def makers(self) -> Mapping[str, Maker]:
        return {SOURCE: self._make_source, TARGET: self._make_target}

    def forward(self, seen: Seen) -> Tensor:
        return self.cross_entropy(seen) if seen.view.name == SOURCE else self._diverge(seen)

    @property
    def updates(self) -> bool:
        return self.settings.band > 0

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        """Take the images of the step into the mean of amplitudes."""
        shown = {"source": scene.source.image, "target": scene.target.image}
        plain = [self._strip(image, scene, domain) for domain, image in shown.items()]
        total = sum(low_amplitude(image, self.settings.band).sum(dim=0) for image in plain)
        count = collectives.world_size() * sum(len(image) for image in plain)
        self.images += count
        self.amplitude.lerp_(collectives.all_reduce_sum(total) / count, count / self.images)

    def _make_source(self, scene: Scene) -> View:
        return scene.view(SOURCE, replace(scene.source, image=self._show(scene.source.image, scene, "source")))

    def _make_target(self, scene: Scene) -> View:
        view = scene.view(TARGET, replace(scene.target, image=self._show(scene.target.image, scene, "target")))
        return replace(view, teacher_logits=scene.pseudo_labels.logits)

    def _strip(self, image: Tensor, scene: Scene, domain: str) -> Tensor:
        return remove_style(image, scene.batch[domain].inside, self.settings.epsilon)

    def _show(self, image: Tensor, scene: Scene, domain: str) -> Tensor:
        """What the student sees of normalised images B 3 H W."""
        plain = self._strip(image, scene, domain)
        if not self.settings.band:
            return plain
        replaced = replace_low_amplitude(plain, self.amplitude) * scene.batch[domain].inside[:, None]
        return torch.where(self.images > 0, replaced, plain)

    def _diverge(self, seen: Seen) -> Tensor:
        output, view = seen
        assert view.teacher_logits is not None
        with torch.autocast(output.logits.device.type, enabled=False):
            weight = view.weight.float() * (view.label != IGNORE)
            teacher = F.interpolate(view.teacher_logits.float(), weight.shape[1:], mode="bilinear")  # B K H W
            whole = weighted_divergence(output.logits.float(), teacher, weight)
            if output.detail is None:
                return whole
            boxes, logits = output.detail.boxes, output.detail.logits.float()
            part = weighted_divergence(logits, boxes.crop(teacher), boxes.crop(weight))
            return torch.lerp(whole, part, self.settings.detail_weight)


def weighted_divergence(logits: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Mean over ALL pixels of weight times KL(teacher || student), in nats; pixels without weight count as 0.

    The student's logits B K h w are first resized to the teacher's, B K H W; weights are B H W. A scalar.
    """
    logits = F.interpolate(logits, teacher.shape[-2:], mode="bilinear", align_corners=False)  # B K H W
    each = F.kl_div(logits.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="none", log_target=True)
    return (each.sum(dim=1) * weight).mean()
