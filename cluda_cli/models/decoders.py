"""The DAFormer decoder (DAFormer, arXiv 2111.14887, section 3.2) and the DeepLabV2 head (arXiv 1606.00915).

B batch, C channels and N = H * W cells of an encoder map, E embedded and D fused channels, K classes, h w cells of the
logits. Both are called with the four maps of an encoder and give the logits and the feature these are read from.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings


class FusingDecoder(nn.Module):
    """A decoder that fuses the encoder maps and classifies every pixel of the fused feature."""

    def _add_classifier(self, channels: int, num_classes: int, dropout: float) -> None:
        """Make the last layers; called last, because layers draw their weights in the order in which they are made."""
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, fused: Tensor) -> Tensor:
        """The logits of fused features B D h w.  # B K h w"""
        logits: Tensor = self.conv_seg(self.dropout(fused))
        return logits

    def classifiers(self) -> list[nn.Conv2d]:
        """The layers whose output channels are classes."""
        return [self.conv_seg]


class DAFormerDecoder(FusingDecoder):
    """Four encoder maps -> class logits and the fused feature they are read from, both on the grid of the first map.

    Each map is embedded per pixel, resized to the finest one and concatenated; dilated depthwise-separable branches
    fuse the four scales with context, or, without dilations, one 1x1 convolution does. The state dict has the keys of
    the published DAFormer head.
    """

    def __init__(self, decoder: settings.Decoder, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.embed_layers = nn.ModuleList(
            Embedding(channels, decoder.embed_dim, decoder.embed_norm) for channels in in_channels
        )
        embedded = decoder.embed_dim * len(in_channels)
        self.fuse_layer = (
            SeparableASPP(embedded, decoder.channels, decoder.dilations)
            if decoder.dilations
            else ConvUnit(embedded, decoder.channels, kernel=1)
        )
        self._add_classifier(decoder.channels, num_classes, decoder.dropout)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(logits B K h w, fused B D h w); channel dropout acts on the logits' input only, while training."""
        if isinstance(self.fuse_layer, ConvUnit):
            fused = fuse_pointwise(self.fuse_layer, self._embed(maps))  # B D h w
        else:
            # Dilated depthwise kernels are several times slower on channels-last maps, so the layout changes here.
            # No name holds the embedded maps meanwhile: without gradients they are gone by then.
            fused = self.fuse_layer(torch.cat(_to_finest(self._embed(maps)), dim=1).contiguous())  # B D h w
        return self.classify(fused), fused

    def _embed(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Each map with the same number of channels, at its own size."""
        return [layer(features) for layer, features in zip(self.embed_layers, maps, strict=True)]  # B E * * each


def _to_finest(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps of one number of channels, all at the size of the first."""
    return [maps[0], *(F.interpolate(coarse, maps[0].shape[2:], mode="bilinear") for coarse in maps[1:])]


def fuse_pointwise(unit: "ConvUnit", maps: Sequence[Tensor]) -> Tensor:
    """A 1x1 unit on maps B E * * that are resized to the first and concatenated: B D h w.

    A 1x1 convolution mixes channels and resizing mixes pixels, so either may come first. Each map's part of the
    convolution at the map's own resolution takes a third of the products and never makes the concatenated map.
    """
    parts = unit.conv.weight.split([features.shape[1] for features in maps], dim=1)
    mixed = [F.conv2d(features, part) for features, part in zip(maps, parts, strict=True)]
    first, *others = _to_finest(mixed)
    return unit.activate(sum(others, start=first))


class PyramidDecoder(FusingDecoder):
    """Four encoder maps -> class logits and the fused feature they are read from, both on the grid of the first map.

    From the coarsest map to the finest, each sum of an embedded map and the upsampled coarser one passes a 3x3
    convolution (feature pyramid, arXiv 1612.03144, with norms and without outputs at the coarser levels).
    """

    def __init__(self, section: settings.Pyramid, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        dim = section.channels
        self.embed_layers = nn.ModuleList(Embedding(channels, dim, norm=True) for channels in in_channels)
        self.fuse_layers = nn.ModuleList(ConvUnit(dim, dim, kernel=3) for _ in in_channels[:-1])
        self._add_classifier(dim, num_classes, section.dropout)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(logits B K h w, fused B D h w); channel dropout acts on the logits' input only, while training."""
        fused = self.embed_layers[-1](maps[-1])  # B D * *
        for i in reversed(range(len(maps) - 1)):
            upsampled = F.interpolate(fused, maps[i].shape[2:], mode="bilinear")
            fused = self.fuse_layers[i](self.embed_layers[i](maps[i]) + upsampled)
        return self.classify(fused), fused


class DeepLabV2Decoder(nn.Module):
    """The last encoder map -> class logits on its grid: the sum of dilated 3x3 convolutions (DeepLab, section 3.2).

    There is no fused feature, so the last encoder map, which the classifier reads, takes its place. The state dict has
    the keys of the published heads.
    """

    def __init__(self, section: settings.DeepLabV2, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.aspp_modules = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(in_channels[-1], num_classes, 3, padding=d, dilation=d)))
            for d in section.dilations
        )
        for branch in self.aspp_modules:
            nn.init.normal_(branch.conv.weight, std=0.01)
            nn.init.zeros_(branch.conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(logits B K h w, last map B C h w)."""
        return self.classify(maps[-1]), maps[-1]

    def classify(self, features: Tensor) -> Tensor:
        """The logits of the last encoder map B C h w.  # B K h w"""
        logits: Tensor = self.aspp_modules[0](features)
        for branch in self.aspp_modules[1:]:
            logits = logits + branch(features)
        return logits

    def classifiers(self) -> list[nn.Conv2d]:
        """The layers whose output channels are classes."""
        return [branch.conv for branch in self.aspp_modules]


class Embedding(nn.Module):
    """The same linear layer at every pixel; with `norm` it has no bias, and batch norm and ReLU follow."""

    def __init__(self, inputs: int, outputs: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, bias=not norm)
        self.bn = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, features: Tensor) -> Tensor:
        embedded = self.proj(features.flatten(2).transpose(1, 2))  # B N E
        embedded = embedded.transpose(1, 2).unflatten(2, features.shape[2:])  # B E H W, channels last
        return embedded if self.bn is None else F.relu(self.bn(embedded), inplace=True)


class SeparableASPP(nn.Module):
    """Parallel branches of different dilation, concatenated and fused by a 3x3 convolution."""

    def __init__(self, inputs: int, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.aspp_modules = nn.ModuleList(
            ConvUnit(inputs, channels, kernel=1) if dilation == 1 else SeparableConv(inputs, channels, dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvUnit(channels * len(dilations), channels, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([branch(features) for branch in self.aspp_modules], dim=1))  # B D h w


class SeparableConv(nn.Module):
    """Dilated depthwise 3x3, then pointwise convolution, each with norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvUnit(inputs, inputs, kernel=3, dilation=dilation, groups=inputs)
        self.pointwise_conv = ConvUnit(inputs, outputs, kernel=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(features))


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU; the size stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        # Fan-out is counted over all output channels, also for depthwise kernels, as in the published head.
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        return self.activate(self.conv(features))

    def activate(self, features: Tensor) -> Tensor:
        return F.relu(self.bn(features), inplace=True)


Decoder = DAFormerDecoder | DeepLabV2Decoder | PyramidDecoder


def build_decoder(model: settings.Model, in_channels: Sequence[int], num_classes: int) -> Decoder:
    """The decoder of the settings, for encoder maps of these channels."""
    if model.deeplab:
        return DeepLabV2Decoder(model.deeplab, in_channels, num_classes)
    if model.pyramid:
        return PyramidDecoder(model.pyramid, in_channels, num_classes)
    return DAFormerDecoder(model.decoder, in_channels, num_classes)
