"""Distance of features to those of a frozen network.

B batch, C channels, K classes, H W pixels, h w cells of a map of the frozen network.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Maker, Scene, Seen, View
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.distributed import collectives
from cluda_cli.errors import SettingsError, nearest
from cluda_cli.models.encoders import Encoder
from cluda_cli.models.frozen import Frozen, fit_images
from cluda_cli.models.segmenter import Output, Segmenter
from cluda_cli.objectives.objective import Objective

TAPS = ("first", "second", "third", "last", "fused")
"""Four maps of an encoder, then the fused feature of a decoder."""


class FeatureDistance(Objective):
    """Keep features near those of a frozen network.

    By default those of countable things in source images stay near those of the pretrained encoder (DAFormer, section
    3.3). Other settings are the feature distance of VFM-UDA++ (arXiv 2503.10685), to a larger network through a head,
    and feature regression (Benbihi et al., arXiv 1805.04141), whose code and layers are not public: the features of a
    target image are drawn to those that the frozen network has of its paired picture.

    Build it while `encoder` still holds its pretrained weights: without a `network` it keeps a frozen copy. `channels`
    are those of the student's maps and of its fused feature; only a `network` asks for them. The frozen network runs in
    the precision of the surrounding autocast, like the student; the distance is computed in float32.

    Raises SettingsError if the classes it shall act on do not exist, or if there are none; if the network lacks a map,
    or has maps of other channels and there is no head.
    """

    settings: settings.FeatureDistance

    def __init__(
        self,
        section: settings.FeatureDistance,
        encoder: nn.Module,
        classes: ClassTable,
        truth: str = "source",
        network: Encoder | Segmenter | None = None,
        channels: Sequence[int] = (),
    ) -> None:
        """`truth` is the view of ground truth, which takes the place of `source` in a run without a source."""
        super().__init__(section)
        self.reads = tuple((truth if view == "source" else view,) for view in section.views)
        self.num_classes = len(classes)
        acts_on = torch.zeros(256, dtype=torch.bool)
        acts_on[list(_train_ids(section, classes))] = True
        self.register_buffer("acts_on", acts_on, persistent=False)  # 256, by train id; follows from the settings
        self.pretrained = Frozen(deepcopy(encoder) if network is None else network)
        self.is_copy = network is None
        self._student = (encoder,)  # whose normalisation images have; a tuple hides it from torch
        self.taps = [TAPS.index(name) for name in section.features]
        self.heads = _build_heads(section, channels, _channels(network, channels))

    def makers(self) -> Mapping[str, Maker]:
        """Target images with their paired pictures."""
        return {"paired": make_paired} if "paired" in self.settings.views else {}

    def forward(self, seen: Seen) -> Tensor:
        output, view = seen
        shown = view.guide if view.name == "paired" and view.guide is not None else output.image
        frozen = self._see(shown, output)
        with torch.autocast(output.image.device.type, enabled=False):
            label = view.label.where(view.probability > 0, IGNORE)
            terms = []
            for tap, target, head in zip(self.taps, frozen, self.heads, strict=True):
                features = head((*output.encoder, output.features)[tap].float())
                if features.shape[2:] != target.shape[2:]:
                    features = F.interpolate(features, target.shape[2:], mode="bilinear")
                terms.append(self._measure(features, target.float(), self._mask(label, target)))
            return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _see(self, image: Tensor, output: Output) -> list[Tensor]:
        """The maps of the frozen network, of images as large as the student's encoder saw."""
        if image.shape != output.image.shape:
            image = F.interpolate(image, output.image.shape[2:], mode="bilinear")
        if not self.is_copy:
            image = fit_images(image, self._student[0].normalisation, self.pretrained.network)
        found = self.pretrained(image)
        maps = (*found.encoder, found.features) if isinstance(found, Output) else found
        return [maps[tap] for tap in self.taps]

    def _mask(self, label: Tensor, target: Tensor) -> Tensor:
        """Which cells of a frozen map count.  # B h w"""
        size, share = (target.shape[2], target.shape[3]), self.settings.min_share
        if self.settings.classes == "all":
            return F.adaptive_avg_pool2d((label != IGNORE).float(), size) >= share
        mask: Tensor = self.acts_on[downscale_label(label, size, share, self.num_classes)]
        return mask

    def _measure(self, features: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        kind, share = self.settings.distance, self.settings.cosine_share
        if self.settings.search:
            target = find_nearest(features, target, self.settings.search, kind, share)
        return masked_mean(measure_cells(features, target, kind, share), mask)


def make_paired(scene: Scene) -> View:
    """Target images with pseudo-labels, and their paired pictures as a guide; ignored where there is no picture."""
    view, inside = scene.view("paired", scene.target), scene.batch["reference"].inside
    return replace(view, label=view.label.masked_fill(~inside, IGNORE), guide=scene.reference)


def measure_cells(features: Tensor, target: Tensor, kind: settings.Distance, cosine_share: float = 0.9) -> Tensor:
    """Distance of features B C h w to those of a frozen network B C h w, across channels.  # B h w

    Euclidean; squared Euclidean; cosine, 1 - cosine similarity; or `cosine_share` of the cosine and, for the rest, the
    smooth L1 distance averaged over channels (VFM-UDA++). Where features agree exactly both distances are 0, and so is
    the gradient, for the cosine up to rounding.
    """
    if kind == "euclidean":
        return torch.linalg.vector_norm(features - target, dim=1)
    if kind == "squared":
        return (features - target).square().sum(dim=1)
    cosine = 1 - F.cosine_similarity(features, target, dim=1)
    if kind == "cosine":
        return cosine
    smooth = F.smooth_l1_loss(features, target, reduction="none").mean(dim=1)
    return cosine_share * cosine + (1 - cosine_share) * smooth


def masked_mean(distance: Tensor, mask: Tensor) -> Tensor:
    """Mean over the cells of `mask`, in the whole batch; both B h w, the mask boolean (DAFormer, section 3.3).

    A scalar, 0 for an empty mask. The cells are those of all ranks, and the mean of the ranks' values is the distance.
    """
    cells = collectives.all_reduce_sum(mask.sum()).clamp_min(1)
    return collectives.world_size() * torch.where(mask, distance, 0).sum() / cells


@torch.no_grad()
def find_nearest(
    features: Tensor, target: Tensor, radius: int, kind: settings.Distance, cosine_share: float = 0.9
) -> Tensor:
    """In each cell, of the frozen features at most `radius` cells away in both axes, those of the least distance.

    `features` and `target` B C h w, like the result. Neighbours outside the map do not count; of equals the cell itself
    is taken, else the first one, row by row.
    """
    height, width = target.shape[2:]
    padded = F.pad(target, (radius,) * 4)
    inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=target.device), (radius,) * 4)
    found, least = target, measure_cells(features, target, kind, cosine_share)
    for top in range(2 * radius + 1):
        for left in range(2 * radius + 1):
            rows, columns = slice(top, top + height), slice(left, left + width)
            shifted = padded[:, :, rows, columns]
            distance = measure_cells(features, shifted, kind, cosine_share)
            better = (distance < least) & inside[rows, columns]
            found, least = torch.where(better[:, None], shifted, found), torch.where(better, distance, least)
    return found


def downscale_label(label: Tensor, size: tuple[int, int], min_share: float, num_classes: int) -> Tensor:
    """The most frequent train id in each cell of a grid, or 255.

    `label` B H W, train ids with 255 = ignored; `size` h w; the result B h w. A cell is 255 if most of it is ignored
    or if its most frequent class covers less than `min_share` of it, 0..1 (DAFormer, section 3.3). Of equally frequent
    classes the lowest wins. Where H W are no multiples of h w, cells overlap by a pixel.
    """
    ids = [*range(num_classes), IGNORE]
    shares = torch.stack([F.adaptive_avg_pool2d((label == i).float(), size) for i in ids], dim=1)  # B K+1 h w
    share, winner = shares.max(dim=1)  # B h w
    return torch.where((share >= min_share) & (winner < num_classes), winner, IGNORE)


def _channels(network: Encoder | Segmenter | None, student: Sequence[int]) -> Sequence[int]:
    """Channels of the maps of the frozen network, in the order of `TAPS`."""
    if isinstance(network, Segmenter):
        return (*network.encoder.channels, network.decoder.classifiers()[0].in_channels)
    return student[:4] if network is None else network.channels


def _build_heads(section: settings.FeatureDistance, student: Sequence[int], frozen: Sequence[int]) -> nn.ModuleList:
    """What the student's maps pass before they are compared: nothing, or a head for each."""
    where = "objectives.feature_distance"
    if "fused" in section.features and len(frozen) < len(TAPS):
        remedy = f"set {where}.network=runs/NAME/best.safetensors"
        raise SettingsError("only the network of a run has a fused feature", f"{where}.features", remedy)
    if not student:
        return nn.ModuleList(nn.Identity() for _ in section.features)
    sizes = [(student[TAPS.index(name)], frozen[TAPS.index(name)]) for name in section.features]
    if not section.head:
        for name, (own, other) in zip(section.features, sizes, strict=True):
            if own != other:
                what = f"the {name} map has {own} channels in the student and {other} in the frozen network"
                raise SettingsError(what, where, f"set {where}.head=true")
        return nn.ModuleList(nn.Identity() for _ in sizes)
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(own, 4 * own, 1), LayerNorm2d(4 * own), nn.GELU(), nn.Conv2d(4 * own, other, 1))
        for own, other in sizes
    )


def _train_ids(section: settings.FeatureDistance, classes: ClassTable) -> tuple[int, ...]:
    """Train ids of the classes that the settings name, else of the countable ones."""
    where, off = "objectives.feature_distance.classes", "set objectives.feature_distance=false to switch it off"
    if section.classes == "all":
        return tuple(range(len(classes)))
    if section.classes is None:
        if not classes.things():
            raise SettingsError("no class of the source is countable", where, f"name the classes to act on, or {off}")
        return classes.things()
    if not section.classes:
        raise SettingsError("names no class", where, off)
    for name in section.classes:
        if name not in classes.names:
            close = nearest(name, classes.names)
            remedy = f"did you mean {close}?" if close else f"known: {', '.join(classes.names)}"
            raise SettingsError(f'the source has no class "{name}"', where, remedy)
    return tuple(classes.names.index(name) for name in section.classes)
