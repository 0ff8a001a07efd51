"""timm models as encoders: networks with a pyramid of maps, and plain vision transformers.

B batch, C channels, H W pixels of an image, h w cells of a map.
"""

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters, is_model_in_modules
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from cluda_cli.errors import SettingsError
from cluda_cli.models.normalisation import Normalisation
from cluda_cli.models.published.encoders import flat

STRIDES = (4, 8, 16, 32)
# Options of timm.create_model that some models do not have.
OPTIONAL = ("strict_img_size", "dynamic_img_size", "always_partition", "drop_path_rate", "output_stride")


class _OfTimm(nn.Module):
    network: nn.Module

    def layers(self) -> dict[str, int]:
        """Number of the layer of every parameter, by its name: 0 the stem, then as timm groups the blocks.

        Raises SettingsError where timm does not group them.
        """
        name = self.network.pretrained_cfg["architecture"]
        with torch.device("meta"):  # names are enough
            whole = timm.create_model(name)
        try:
            groups = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
            number = {flat(theirs): group for theirs, group in groups.items()}
            return {ours: number[flat(ours)] for ours, _ in self.named_parameters()}
        except (AttributeError, NotImplementedError, KeyError):
            what = f"timm does not say which layers {name} has"
            raise SettingsError(what, "optimizer.layer_decay", "set optimizer.layer_decay=1") from None


class TimmEncoder(_OfTimm):
    """A timm model with a pyramid of maps.

    `output_stride` is that of the last map; below 32, dilation takes the place of stride in the later stages. Raises
    SettingsError where the model has no maps at the four strides, only for images of one size, or no dilation.
    """

    def __init__(self, name: str, drop_path: float, output_stride: int = STRIDES[-1]) -> None:
        super().__init__()
        self.strides = tuple(min(stride, output_stride) for stride in STRIDES)
        options: dict[str, Any] = {"features_only": True, "drop_path_rate": drop_path}
        # Swin shall take images of any size, and shift windows also where its classifier had but one.
        options |= {"strict_img_size": False, "always_partition": True}
        self.network = _create(name, **options)
        info = self.network.feature_info
        # Where maps share a stride, the last one is the deepest.
        index_of = dict(zip(info.reduction(), info.out_indices, strict=True))
        if not set(STRIDES) <= set(index_of):
            raise _unsuitable(f"{name} has maps at strides {sorted(index_of)}; an encoder needs 4, 8, 16 and 32")
        if output_stride < STRIDES[-1]:
            options["output_stride"] = output_stride
        if tuple(info.reduction()) != STRIDES or "output_stride" in options:
            # Maps that nobody reads would hold untrained weights.
            self.network = _create(name, **options, out_indices=tuple(index_of[stride] for stride in STRIDES))
        if tuple(self.network.feature_info.reduction()) != self.strides:
            raise dilation_error(name)
        self.normalisation = Normalisation.from_timm(self.network.pretrained_cfg)
        self.channels: tuple[int, ...] = tuple(self.network.feature_info.channels())
        for module in self.network.modules():
            if type(module) in PAD_FIRST:
                module.__class__ = PAD_FIRST[type(module)]
        self.pad_multiple, self.channels_first = self._try_out(name)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.network(image)
        return tuple(maps if self.channels_first else (features.permute(0, 3, 1, 2) for features in maps))

    @torch.no_grad()
    def _try_out(self, name: str) -> tuple[int, bool]:
        """The pad multiple, and whether maps come as B C h w, not B h w C; timm declares neither for all models."""
        device = next(self.network.parameters()).device
        self.network.eval()  # leave the statistics of batch norms alone
        for multiple in (self.strides[-1], self.network.default_cfg["input_size"][-1]):  # the latter: fixed windows
            height, width = 2 * multiple, 3 * multiple  # oblong, so that no layout can pass for the other
            try:
                maps = self.network(torch.zeros(1, 3, height, width, device=device))
            except Exception:  # a model refuses a size with whatever its first failing operation raises
                continue
            cells = [(height // stride, width // stride) for stride in self.strides]
            first = [(1, count, *size) for count, size in zip(self.channels, cells, strict=True)]
            last = [(1, *size, count) for count, size in zip(self.channels, cells, strict=True)]
            shapes = [tuple(features.shape) for features in maps]
            if shapes in (first, last):
                self.network.train()
                return multiple, shapes == first
        raise _unsuitable(f"{name} does not give four maps for images of any size")


class _PadFirst:
    """Windowed attention that pads a map to whole windows and then shifts it, as the authors of Swin do.

    timm shifts first (its issue 2438), so that its mask lets cells at the bottom see those at the top, and cells at
    the right those at the left, wherever a map is no whole number of windows: 512 pixels in windows of 12, say.
    """

    window_size: tuple[int, int]

    def _attn(self, cells: Tensor) -> Tensor:  # B h w C
        height, width = cells.shape[1:3]
        bottom, right = -height % self.window_size[0], -width % self.window_size[1]
        attended: Tensor = super()._attn(F.pad(cells, (0, 0, 0, right, 0, bottom)))
        return attended[:, :height, :width]


class _SwinBlock(_PadFirst, SwinTransformerBlock):
    pass


class _SwinV2Block(_PadFirst, SwinTransformerV2Block):
    pass


PAD_FIRST = {SwinTransformerBlock: _SwinBlock, SwinTransformerV2Block: _SwinV2Block}


class PlainViT(_OfTimm):
    """A vision transformer of timm (DINOv2, DINOv3, DeiT, EVA-02, ...) with four maps at nearly one resolution.

    The maps are the patch tokens after each quarter of the blocks, through the final norm; so DINOv2 (arXiv
    2304.07193, section 7.4) takes them for depth. The first map is resized to stride 4, because decoders work on its
    grid; the others keep the stride of the patches, since decoders resize by themselves. Nothing here is without
    pretrained weights: the feature distance reads the last map of a frozen copy, which a random layer would spoil.

    Images of any size are taken: they are stretched to whole patches, by less than one, rather than padded, so that
    no token sees an invented border. Tables of positions are resized to the grid; rotary positions follow it.

    Raises SettingsError for a model with fewer than four blocks or without a way to resize its positions.
    """

    pad_multiple = 1

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        self.network = _create(name, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path)
        info = self.network.feature_info  # one entry per block
        self.patch: int = info[0]["reduction"]
        if len(info) < 4 or any(block["reduction"] != self.patch for block in info):
            raise _unsuitable(f"{name} is no vision transformer of four blocks or more")
        self.normalisation = Normalisation.from_timm(self.network.pretrained_cfg)
        self.strides = (4, self.patch, self.patch, self.patch)
        self.channels: tuple[int, ...] = (info[0]["num_chs"],) * 4
        ends = [len(info) * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.indices = self.network.prune_intermediate_layers(ends, prune_head=True)  # drops what pools and classifies
        self._try_out(name)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        size = image.shape[2:]
        whole = [math.ceil(side / self.patch) * self.patch for side in size]
        if whole != list(size):
            image = F.interpolate(image, whole, mode="bilinear")
        first, *others = self.network.forward_intermediates(
            image, indices=self.indices, norm=True, intermediates_only=True
        )  # B C h w each
        first = F.interpolate(first, [math.ceil(side / self.strides[0]) for side in size], mode="bilinear")
        return first, *others

    @torch.no_grad()
    def _try_out(self, name: str) -> None:
        device = next(self.network.parameters()).device
        try:
            self.network.eval()
            self(torch.zeros(1, 3, 2 * self.patch, 3 * self.patch, device=device))
            self.network.train()
        except Exception:  # a model refuses a size with whatever its first failing operation raises
            raise _unsuitable(f"{name} does not give four maps for images of any size") from None


def is_plain(name: str) -> bool:
    """Whether timm's model of this name is a plain vision transformer."""
    return is_model_in_modules(name, ("vision_transformer", "deit", "eva"))


def dilation_error(name: str) -> SettingsError:
    """The error for an encoder whose strides are fixed."""
    remedy = "keep 32, or choose an encoder that can be dilated, such as resnet101c"
    return SettingsError(f"{name} cannot trade stride for dilation", "model.output_stride", remedy)


def _unsuitable(what: str) -> SettingsError:
    remedy = "choose a model with a pyramid of maps, such as mit_b5, convnext_tiny or mobilenetv2_100"
    return SettingsError(what, "model.encoder", remedy)


def _create(name: str, **options: Any) -> nn.Module:
    """A randomly initialised model; options that it does not know are left out."""
    while True:
        try:
            return timm.create_model(name, pretrained=False, **options)
        except TypeError as problem:  # raised while arguments are bound, before any random draw
            unknown = next((option for option in options if f"'{option}'" in str(problem)), None)
            if unknown not in OPTIONAL:
                raise
            del options[unknown]
        except (AssertionError, RuntimeError) as problem:  # such as an unknown pretrained tag after the dot
            if "output_stride" in options:
                raise dilation_error(name) from None
            raise _unsuitable(f"{name} cannot be an encoder: {problem}") from None
