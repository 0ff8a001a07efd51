"""Two resolutions: the context of the whole image and the detail of a part of it (HRDA, arXiv 2204.13132).

B batch, K classes, H W pixels, h w cells of the context, f times as many per axis on the fine grid, a b cells of a
detail crop, n windows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import settings
from cluda_cli.errors import SettingsError
from cluda_cli.models.boxes import Boxes, Size, random_boxes, window_corners
from cluda_cli.models.decoders import DAFormerDecoder, DeepLabV2Decoder
from cluda_cli.models.segmenter import Detail, Output, Segmenter

WINDOWS_AT_ONCE = 8  # detail windows in one forward; results do not depend on it


class MultiResolution(Segmenter):
    """One encoder and decoder at two resolutions, and a head that says where to trust which (HRDA, section 3).

    In training the detail is one crop of each image; in evaluation, and for pseudo-labels, crops that overlap by half
    cover the image and their logits are averaged. `crop` is the training crop, height x width in pixels. Raises
    SettingsError for crops that are no whole number of context cells, or a detail crop that does not fit.
    """

    def __init__(self, model: settings.Model, multires: settings.MultiResolution, crop: Size, num_classes: int) -> None:
        super().__init__(model, num_classes)
        dim, dropout = multires.attention_dim, model.decoder.dropout
        light = settings.Decoder(embed_dim=dim, channels=dim, dilations=(), dropout=dropout)
        self.scale_attention = (
            DeepLabV2Decoder(model.deeplab, self.encoder.channels, num_classes)
            if model.deeplab
            else DAFormerDecoder(light, self.encoder.channels, num_classes)
        )
        self.downscale, self.blend_late = multires.context_downscale, multires.blend_late
        self.cell = self.stride * self.downscale  # pixels of the image per cell of the context
        self.detail_crop = _detail_crop(multires.detail_crop, crop, self.cell)

    @property
    def pad_multiple(self) -> int:
        return math.lcm(self.cell, self.encoder.pad_multiple * self.downscale)

    @property
    def smallest(self) -> int:
        return super().smallest * self.downscale

    def decoders(self) -> list[DAFormerDecoder | DeepLabV2Decoder]:
        # While the base class is built there is no second head yet.
        return [self.decoder, self.scale_attention] if hasattr(self, "scale_attention") else [self.decoder]

    def draw_boxes(self, count: int, image: Size, generator: torch.Generator) -> Boxes:
        """Where to look closely: one place for all images, on the grid of the context."""
        return random_boxes(count, image, self.detail_crop, self.cell, generator)

    def forward(self, image: Tensor, boxes: Boxes | None = None) -> Output:
        """In training, `boxes` are where to look closely; None lets the network choose, for each image, the window
        of which its context is least certain."""
        context = F.interpolate(image, scale_factor=1 / self.downscale, mode="bilinear")
        maps = self.encoder(context)
        logits, fused = self.decoder(maps)  # B K h w, B D h w
        size = (logits.shape[2] * self.downscale, logits.shape[3] * self.downscale)
        detail = None
        if self.training:
            boxes = boxes or self._uncertain_boxes(logits.detach())
            detail = Detail(boxes, *self.decoder(self.encoder(boxes.crop(image))))
            fine = boxes.over(self.stride).paste(_single(detail.logits), size)  # B K f*h f*w
        else:
            fine = self._sliding_detail(image, size)
        attention = _single(self.scale_attention(maps)[0]).sigmoid()  # B K h w
        if detail is not None:
            attention = attention * detail.boxes.over(self.cell).inside(logits.shape[2:])[:, None]
        return Output(self._blend(_single(logits), fine, attention, size), fused, maps, context, detail)

    def _blend(self, context: Tensor, fine: Tensor, attention: Tensor, size: Size) -> Tensor:
        """Fine logits where attended, context logits elsewhere (HRDA, section 3).  # B K f*h f*w"""
        upsampled = F.interpolate(attention, size, mode="bilinear")
        if self.blend_late:
            return torch.lerp(F.interpolate(context, size, mode="bilinear"), fine, upsampled)
        return upsampled * fine + F.interpolate((1 - attention) * context, size, mode="bilinear")

    def _sliding_detail(self, image: Tensor, size: Size) -> Tensor:
        """Detail logits of the whole image: the mean over overlapping windows (HRDA, section 3).  # B K f*h f*w

        Windows pass a few at a time, to bound memory; all at once where batch norms see them, as the teacher's do.
        """
        high, wide = (min(part, whole) for part, whole in zip(self.detail_crop, image.shape[2:], strict=True))
        corners = window_corners(image.shape[2:], (high, wide), self._half((high, wide)))
        windows = torch.cat([image[..., y : y + high, x : x + wide] for y, x in corners])  # n*B 3 h w
        batch_norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        at_once = len(windows) if any(norm.training for norm in batch_norms) else WINDOWS_AT_ONCE
        logits = torch.cat([self.decoder(self.encoder(part))[0] for part in windows.split(at_once)])
        logits = _single(logits).unflatten(0, (len(corners), -1))  # n B K a b
        total, coverage = logits.new_zeros(*logits.shape[1:3], *size), logits.new_zeros(size)
        rows, columns = logits.shape[3:]
        for (y, x), window in zip(corners, logits, strict=True):
            y, x = y // self.stride, x // self.stride
            total[..., y : y + rows, x : x + columns] += window
            coverage[y : y + rows, x : x + columns] += 1
        return total / coverage

    def _uncertain_boxes(self, logits: Tensor) -> Boxes:
        """For each image the detail crop, out of those of evaluation, with the largest mean entropy.  # B K h w"""
        window = (self.detail_crop[0] // self.cell, self.detail_crop[1] // self.cell)
        stride = tuple(half // self.cell for half in self._half(self.detail_crop))
        corner = most_uncertain(entropy(logits), window, stride)
        return Boxes(corner * self.cell, self.detail_crop)

    def _half(self, window: Size) -> Size:
        """Half a window, in whole cells of the context and at least one."""
        high, wide = (max(side // 2 // self.cell, 1) * self.cell for side in window)
        return high, wide


def build_segmenter(model: settings.Model, crop: Size, num_classes: int) -> Segmenter:
    """The network of the settings, of one or two resolutions; `crop` is the training crop."""
    network = (
        MultiResolution(model, model.multires, crop, num_classes) if model.multires else Segmenter(model, num_classes)
    )
    network.freeze_parts()
    return network


def _single(tensor: Tensor) -> Tensor:
    """At least float32: the networks may run in bfloat16, whose eight bits are too few to add up and blend logits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax of logits B K h w, as a share of the largest possible one.  # float32 B h w, 0..1"""
    log_probability = logits.float().log_softmax(dim=1)
    return -(log_probability.exp() * log_probability).sum(dim=1) / math.log(logits.shape[1])


def most_uncertain(uncertainty: Tensor, window: Size, stride: Size) -> Tensor:
    """Top and left of the sliding window with the largest mean, for each map B h w; the first of equals.  # B 2"""
    (high, wide), size = window, (uncertainty.shape[1], uncertainty.shape[2])
    corners = window_corners(size, window, stride)
    means = torch.stack([uncertainty[:, y : y + high, x : x + wide].mean(dim=(1, 2)) for y, x in corners])  # n B
    corner = torch.tensor(corners).to(uncertainty.device, non_blocking=True)  # a plain copy would wait for a GPU
    return corner[means.argmax(dim=0)]


def _detail_crop(wanted: Size | None, crop: Size, cell: int) -> Size:
    """The detail crop in pixels: as set, or half the training crop in whole cells."""
    if any(side % cell for side in crop):
        what = f"with model.multires the crop must be a multiple of {cell}, got {crop[0]} x {crop[1]}"
        raise SettingsError(what, "data.crop", f"such as {_rounded(crop[0], cell)} x {_rounded(crop[1], cell)}")
    detail = wanted or (max(crop[0] // 2 // cell, 1) * cell, max(crop[1] // 2 // cell, 1) * cell)
    if any(side % cell or side > whole for side, whole in zip(detail, crop, strict=True)):
        what = f"the detail crop must be a multiple of {cell} and fit data.crop, got {detail[0]} x {detail[1]}"
        raise SettingsError(what, "model.multires.detail_crop", "leave it unset for half of data.crop")
    return detail


def _rounded(side: int, multiple: int) -> int:
    return max(round(side / multiple), 1) * multiple
