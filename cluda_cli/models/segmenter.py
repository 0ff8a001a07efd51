"""The segmentation network: encoder + decoder, image -> Output.

B batch, K classes, D fused channels, H W pixels, h w cells of the decoder's grid (stride 4).
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import settings
from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.models.encoders import build_encoder


@dataclass(frozen=True)
class Output:
    """What one forward of the network gives."""

    logits: Tensor  # B K h w
    features: Tensor  # B D h w, the fused feature that the classifier reads
    encoder: tuple[Tensor, ...]  # four maps, strides 4, 8, 16, 32


class Segmenter(nn.Module):
    """Encoder and DAFormer decoder, with random weights from torch's global generator.

    Images whose sides are multiples of `pad_multiple` fit every encoder; most convolutional ones take any size. With
    `freeze_batch_norm` the encoder's batch norms keep their statistics in training mode too, and their affine
    parameters do not learn.
    """

    def __init__(self, model: settings.Model, num_classes: int) -> None:
        super().__init__()
        self.encoder = build_encoder(model)
        self.decoder = DAFormerDecoder(model.decoder, self.encoder.channels, num_classes)
        self.freeze_batch_norm = model.freeze_batch_norm
        if self.freeze_batch_norm:
            for norm in self._encoder_norms():
                norm.requires_grad_(False)
        self.train()

    @property
    def pad_multiple(self) -> int:
        """Images whose height and width are multiples of it fit the encoder."""
        return self.encoder.pad_multiple

    def forward(self, image: Tensor) -> Output:
        maps = self.encoder(image)
        logits, fused = self.decoder(maps)
        return Output(logits=logits, features=fused, encoder=maps)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_batch_norm:
            for norm in self._encoder_norms():
                norm.eval()
        return self

    def _encoder_norms(self) -> list[_BatchNorm]:
        return [module for module in self.encoder.modules() if isinstance(module, _BatchNorm)]
