"""How an encoder wants its images: the values that its pretrained weights were trained with.

B batch, H W pixels of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of red, green and blue, for pixels in 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> "Normalisation":
        """The normalisation of a pretrained configuration of timm, which counts pixels in 0..1."""
        mean, std = (tuple(round(255 * value, 6) for value in config[key]) for key in ("mean", "std"))
        return cls(mean, std)

    def apply(self, image: Tensor) -> Tensor:
        """Normalise RGB images in 0..255, uint8 or float [B] 3 H W.  # float32 [B] 3 H W"""
        mean, scale = torch.tensor(self.mean), 1 / torch.tensor(self.std)
        return (image.float() - _per_channel(mean, image)) * _per_channel(scale, image)

    def invert(self, image: Tensor) -> Tensor:
        """RGB in 0..1 from normalised images, float32 [B] 3 H W. Rounding may leave the range by 1e-7."""
        mean, std = torch.tensor(self.mean) / 255, torch.tensor(self.std) / 255
        return image * _per_channel(std, image) + _per_channel(mean, image)


IMAGENET = Normalisation(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


def _per_channel(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image.device, non_blocking=True)[:, None, None]  # 3 1 1
