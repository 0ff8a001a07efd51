"""The DAFormer decoder (DAFormer, arXiv 2111.14887, section 3.2).

B batch, C channels and N = H * W cells of an encoder map, E embedded and D fused channels, K classes, h w cells at
stride 4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings


class DAFormerDecoder(nn.Module):
    """Four encoder maps -> class logits and the fused feature they are read from, both at stride 4.

    Each map is embedded per pixel, resized to the finest one and concatenated; dilated depthwise-separable branches
    fuse the four scales with context. The state dict has the keys of the published DAFormer head.
    """

    def __init__(self, decoder: settings.Decoder, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.embed_layers = nn.ModuleList(Embedding(channels, decoder.embed_dim) for channels in in_channels)
        self.fuse_layer = SeparableASPP(decoder.embed_dim * len(in_channels), decoder.channels, decoder.dilations)
        self.dropout = nn.Dropout2d(decoder.dropout)
        self.conv_seg = nn.Conv2d(decoder.channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(logits B K h w, fused B D h w); channel dropout acts on the logits' input only, while training."""
        size = maps[0].shape[2:]
        embedded = [layer(features) for layer, features in zip(self.embed_layers, maps, strict=True)]  # B E * * each
        resized = [embedded[0], *(F.interpolate(coarse, size, mode="bilinear") for coarse in embedded[1:])]
        # Dilated depthwise kernels are several times slower on channels-last maps, so the layout changes here.
        fused = self.fuse_layer(torch.cat(resized, dim=1).contiguous())  # B D h w
        return self.conv_seg(self.dropout(fused)), fused


class Embedding(nn.Module):
    """The same linear layer at every pixel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        embedded = self.proj(features.flatten(2).transpose(1, 2))  # B N E
        return embedded.transpose(1, 2).unflatten(2, features.shape[2:])  # B E H W, channels last


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
        return F.relu(self.bn(self.conv(features)), inplace=True)
