"""Two resolutions: the context of the whole image and the detail of a part of it (HRDA, arXiv 2204.13132).

B batch, K classes, H W pixels, h w cells of the context. Per axis, the fine grid has f = `downscale` times as many
cells. n windows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import settings
from cluda_cli.errors import SettingsError
from cluda_cli.models.boxes import Boxes, Size, random_boxes
from cluda_cli.models.decoders import DAFormerDecoder, Decoder, DeepLabV2Decoder
from cluda_cli.models.segmenter import Detail, Output, Segmenter
from cluda_cli.models.windows import average_windows, window_corners

WINDOWS_AT_ONCE = 8  # detail windows in one forward, to bound memory


class MultiResolution(Segmenter):
    """One encoder and decoder at two resolutions, and a head that weights them against each other (HRDA, section 3).

    In training the detail is one crop of each image. In evaluation, and for pseudo-labels, windows that overlap by
    half cover the image, and their logits are averaged. `crop` is the training crop, height x width in pixels.

    Raises SettingsError if a crop is not a whole number of context cells, or if the detail crop does not fit `crop`.
    """

    def __init__(self, model: settings.Model, multires: settings.MultiResolution, crop: Size, num_classes: int) -> None:
        super().__init__(model, num_classes)
        dim, dropout = multires.attention_dim, (model.pyramid or model.decoder).dropout
        light = settings.Decoder(embed_dim=dim, channels=dim, dilations=(), dropout=dropout)
        self.scale_attention = (
            DeepLabV2Decoder(model.deeplab, self.encoder.channels, num_classes)
            if model.deeplab
            else DAFormerDecoder(light, self.encoder.channels, num_classes)
        )
        self.downscale, self.blend_late = multires.context_downscale, multires.blend_late
        self.cell = self.stride * self.downscale  # pixels of the image per cell of the context
        self.detail_crop = _choose_detail_crop(multires.detail_crop, crop, self.cell)
        self.detail_stride = _halve(self.detail_crop, self.cell)  # of the windows that cover an image

    @property
    def pad_multiple(self) -> int:
        return math.lcm(self.cell, self.encoder.pad_multiple * self.downscale)

    @property
    def alignment(self) -> int:
        return math.lcm(self.pad_multiple, super().alignment * self.downscale)

    @property
    def smallest(self) -> int:
        return super().smallest * self.downscale

    def decoders(self) -> list[Decoder]:
        # While the base class is built there is no second head yet.
        return [self.decoder, self.scale_attention] if hasattr(self, "scale_attention") else [self.decoder]

    def draw_boxes(self, count: int, image: Size, generator: torch.Generator) -> Boxes:
        """Draw the detail crop: one box for all images, on the grid of the context."""
        return random_boxes(count, image, self.detail_crop, self.cell, generator)

    def forward(self, image: Tensor, boxes: Boxes | None = None) -> Output:
        """In training, `boxes` are the detail crops. None lets the network choose one for each image: the window in
        which the logits of its context have the largest entropy."""
        context = F.interpolate(image, scale_factor=1 / self.downscale, mode="bilinear")
        maps = self.encoder(context)
        logits, fused = self.decoder(maps)  # B K h w, B D h w
        size = (logits.shape[2] * self.downscale, logits.shape[3] * self.downscale)
        detail = None
        if self.training:
            boxes = boxes or self._choose_boxes(logits.detach())
            detail = Detail(boxes, *self.decoder(self.encoder(boxes.crop(image))))
            fine = boxes.over(self.stride).paste(_promote_to_float32(detail.logits), size)  # B K f*h f*w
        else:
            fine = self._average_detail(image)
        attention = _promote_to_float32(self.scale_attention(maps)[0]).sigmoid()  # B K h w
        if detail is not None:
            attention = attention * detail.boxes.over(self.cell).inside(logits.shape[2:])[:, None]
        return Output(self._blend(_promote_to_float32(logits), fine, attention, size), fused, maps, context, detail)

    def _blend(self, context: Tensor, fine: Tensor, attention: Tensor, size: Size) -> Tensor:
        """Weight fine and context logits by the attention, 1 = fine (HRDA, section 3).  # B K f*h f*w"""
        upsampled = F.interpolate(attention, size, mode="bilinear")
        if self.blend_late:
            return torch.lerp(F.interpolate(context, size, mode="bilinear"), fine, upsampled)
        return upsampled * fine + F.interpolate((1 - attention) * context, size, mode="bilinear")

    def _average_detail(self, image: Tensor) -> Tensor:
        """Detail logits of the whole image: the mean over overlapping windows (HRDA, section 3).  # B K f*h f*w

        The network sees a few windows at a time, to bound memory. Batch norms in training mode, such as the teacher's,
        see all windows in one batch.
        """
        all_at_once = any(isinstance(module, _BatchNorm) and module.training for module in self.modules())
        return average_windows(
            image,
            self.detail_crop,
            self.detail_stride,
            lambda windows: _promote_to_float32(self.decoder(self.encoder(windows))[0]),
            windows_at_once=None if all_at_once else WINDOWS_AT_ONCE,
            cell=self.stride,
        )

    def _choose_boxes(self, logits: Tensor) -> Boxes:
        """For each image, choose the window of evaluation with the largest mean entropy of logits B K h w."""
        window, stride = ((y // self.cell, x // self.cell) for y, x in (self.detail_crop, self.detail_stride))
        corner = find_most_uncertain(entropy(logits), window, stride)
        return Boxes(corner * self.cell, self.detail_crop)


def build_segmenter(model: settings.Model, crop: Size, num_classes: int) -> Segmenter:
    """Build the network of the settings, with one or two resolutions. `crop` is the training crop."""
    network = (
        MultiResolution(model, model.multires, crop, num_classes) if model.multires else Segmenter(model, num_classes)
    )
    network.freeze_parts()
    return network


def _promote_to_float32(tensor: Tensor) -> Tensor:
    """At least float32. The network may run in bfloat16, whose eight bits are too few for sums of logits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of logits B K h w, divided by the largest possible one.  # float32 B h w, 0..1"""
    log_probability = logits.float().log_softmax(dim=1)
    return -(log_probability.exp() * log_probability).sum(dim=1) / math.log(logits.shape[1])


def find_most_uncertain(uncertainty: Tensor, window: Size, stride: Size) -> Tensor:
    """Find the window with the largest mean on each map B h w; the first of equals. Its top and left.  # B 2"""
    (high, wide), size = window, (uncertainty.shape[1], uncertainty.shape[2])
    corners = window_corners(size, window, stride)
    means = torch.stack([uncertainty[:, y : y + high, x : x + wide].mean(dim=(1, 2)) for y, x in corners])  # n B
    corner = torch.tensor(corners).to(uncertainty.device, non_blocking=True)  # a plain copy would wait for a GPU
    return corner[means.argmax(dim=0)]


def _choose_detail_crop(wanted: Size | None, crop: Size, cell: int) -> Size:
    """The detail crop in pixels: the setting, or half the training crop in whole cells."""
    if any(side % cell for side in crop):
        what = f"with model.multires the crop must be a multiple of {cell}, got {crop[0]} x {crop[1]}"
        height, width = (max(round(side / cell), 1) * cell for side in crop)
        raise SettingsError(what, "data.crop", f"such as {height} x {width}")
    detail = wanted or _halve(crop, cell)
    if any(side % cell or side > whole for side, whole in zip(detail, crop, strict=True)):
        what = f"the detail crop must be a multiple of {cell} and fit data.crop, got {detail[0]} x {detail[1]}"
        raise SettingsError(what, "model.multires.detail_crop", "leave it unset for half of data.crop")
    return detail


def _halve(size: Size, cell: int) -> Size:
    """Half a size in pixels, rounded down to whole cells, at least one cell."""
    height, width = (max(side // 2 // cell, 1) * cell for side in size)
    return height, width
