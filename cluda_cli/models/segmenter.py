"""The segmentation network: encoder + decoder, image -> Output.

B batch, K classes, D fused channels, H W pixels, h w cells of the decoder's grid, a b cells of a detail crop.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import settings
from cluda_cli.models.boxes import Boxes, Size
from cluda_cli.models.decoders import Decoder, build_decoder
from cluda_cli.models.encoders import build_encoder
from cluda_cli.models.normalisation import Normalisation


@dataclass(frozen=True)
class Detail:
    """What a network of two resolutions saw of a part of each image at full resolution."""

    boxes: Boxes  # of the parts, in pixels of the image
    logits: Tensor  # B K a b
    features: Tensor  # B D a b


@dataclass(frozen=True)
class Output:
    """What one forward of the network gives; with two resolutions all but the logits is of the context alone."""

    logits: Tensor  # B K h w, of both resolutions
    features: Tensor  # B D h w, the fused feature that the classifier reads
    encoder: tuple[Tensor, ...]  # four maps
    image: Tensor  # B 3 H W, what the encoder saw
    detail: Detail | None = None  # in training, with two resolutions

    def detach(self) -> Self:
        """The same numbers without a graph."""
        maps = tuple(features.detach() for features in self.encoder)
        detail = self.detail and replace(
            self.detail, logits=self.detail.logits.detach(), features=self.detail.features.detach()
        )
        return replace(self, logits=self.logits.detach(), features=self.features.detach(), encoder=maps, detail=detail)


class Segmenter(nn.Module):
    """Encoder and decoder, with random weights from torch's global generator.

    Images whose sides are multiples of `pad_multiple` fit every encoder; most convolutional ones take any size. With
    `freeze_batch_norm` the encoder's batch norms keep their statistics in training mode too, and their affine
    parameters do not learn. `freeze_parts` does the same for all of a part that `model.freeze` names.
    """

    def __init__(self, model: settings.Model, num_classes: int) -> None:
        super().__init__()
        self.encoder = build_encoder(model)
        self.decoder = build_decoder(model, self.encoder.channels, num_classes)
        self.stride: int = self.encoder.strides[-1 if model.deeplab else 0]  # pixels per cell of the logits
        self.freeze_batch_norm, self.frozen = model.freeze_batch_norm, frozenset(model.freeze)
        if self.freeze_batch_norm:
            for norm in _batch_norms(self.encoder):
                norm.requires_grad_(False)
        self.train()

    @property
    def pad_multiple(self) -> int:
        """Images whose height and width are multiples of it fit the network."""
        return self.encoder.pad_multiple

    @property
    def alignment(self) -> int:
        """Pixels. In every map, a part of an image that begins at a multiple of it has the cells of the whole image."""
        return math.lcm(self.pad_multiple, *self.encoder.strides)

    @property
    def normalisation(self) -> Normalisation:
        """What images have to pass before the network sees them."""
        return self.encoder.normalisation

    @property
    def smallest(self) -> int:
        """Least height and width of an image: one cell of the coarsest map, less than which encoders cannot reduce."""
        return 32

    def draw_boxes(self, count: int, image: Size, generator: torch.Generator) -> Boxes | None:
        """Where to look closely while training on `count` images of this size: nowhere, with one resolution."""
        return None

    def forward(self, image: Tensor, boxes: Boxes | None = None) -> Output:
        """`boxes` concern networks of two resolutions only."""
        maps = self.encoder(image)
        logits, fused = self.decoder(maps)
        return Output(logits=logits, features=fused, encoder=maps, image=image)

    def decoders(self) -> list[Decoder]:
        """All heads that the network has."""
        return [self.decoder]

    def classifiers(self) -> dict[str, nn.Module]:
        """The layers whose output channels are classes, by their name in the network."""
        layers = {id(layer) for decoder in self.decoders() for layer in decoder.classifiers()}
        return {name: module for name, module in self.named_modules() if id(module) in layers}

    def freeze_parts(self) -> None:
        """Keep the parameters of the parts that `model.freeze` names from learning: encoder, decoder, head."""
        head = {id(parameter) for layer in self.classifiers().values() for parameter in layer.parameters()}
        for name, parameter in self.named_parameters():
            part = "encoder" if name.startswith("encoder.") else "head" if id(parameter) in head else "decoder"
            if part in self.frozen:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if "encoder" in self.frozen:
            self.encoder.eval()
        fixed = [self.encoder] if self.freeze_batch_norm else []
        for norm in _batch_norms(*fixed, *(self.decoders() if "decoder" in self.frozen else [])):
            norm.eval()
        return self


def _batch_norms(*modules: nn.Module) -> list[_BatchNorm]:
    return [inner for module in modules for inner in module.modules() if isinstance(inner, _BatchNorm)]
