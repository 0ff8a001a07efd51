"""A helper network that never learns, such as the pretrained encoder of the feature distance, and its images."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli.models.encoders import Encoder
from cluda_cli.models.normalisation import Normalisation
from cluda_cli.models.segmenter import Segmenter


class Frozen(nn.Module):
    """A network in evaluation mode that is neither parameter nor state of the module that holds it.

    It moves between devices and precisions with that module, computes without gradients, and appears in no state dict,
    no optimizer and no checkpoint. Whoever builds it can build it again from its file.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._hidden = (network.requires_grad_(False).eval(),)  # torch does not register what a tuple holds

    @property
    def network(self) -> nn.Module:
        return self._hidden[0]

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .cuda() and .float() call this on every module that torch knows of; the hidden one has to be told.
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)


def fit_images(image: Tensor, given: Normalisation, network: Encoder | Segmenter, scale: float = 1.0) -> Tensor:
    """Images B 3 H W with a `given` normalisation as a network wants them: with its own, `scale` times as large, and
    stretched to whole cells.
    """
    multiple = network.pad_multiple
    size = [max(round(side * scale / multiple), 1) * multiple for side in image.shape[2:]]
    if network.normalisation != given:
        image = network.normalisation.apply(255 * given.invert(image))
    return image if size == [*image.shape[2:]] else F.interpolate(image, size, mode="bilinear")
