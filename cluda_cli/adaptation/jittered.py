"""Views without labels: target images of which only the light changes, so that every pixel keeps its place.

B images, H W pixels.
"""

from dataclasses import dataclass, replace

import torch

from cluda_cli.adaptation.style import moments
from cluda_cli.adaptation.views import Scene, View

FIRST, SECOND = "first jittered", "second jittered"


@dataclass(frozen=True)
class MakeJittered:
    """Target images with a brightness and a contrast drawn for each image (Chaitanya et al., arXiv 2006.10511).

    To RGB in 0..1 a number of -brightness..brightness is added. Then the distance to the mean of the channel over the
    image without padding is multiplied by one of 1 - contrast..1 + contrast. What leaves 0..1 is cut off after each.
    No teacher is asked.
    """

    name: str
    brightness: float
    contrast: float

    def __call__(self, scene: Scene) -> View:
        shown, normalisation = scene.unlabelled, scene.normalisation
        drawn = 2 * torch.stack([torch.rand(2, generator=generator) for generator in scene.generators(self.name)]) - 1
        drawn = drawn.to(shown.image.device, non_blocking=True)[..., None, None, None]  # B 2 1 1 1
        image = normalisation.invert(shown.image)  # B 3 H W
        image = (image + self.brightness * drawn[:, 0]).clamp(0, 1)
        inside = scene.batch["target"].inside  # B H W
        mean, _ = moments(image, inside)  # B 3 1 1
        image = (mean + (image - mean) * (1 + self.contrast * drawn[:, 1])).clamp(0, 1)
        return scene.view(self.name, replace(shown, image=normalisation.apply(255 * image) * inside[:, None]))
