"""Distance to the pretrained encoder. B batch, C channels, K classes, H W pixels, h w cells of the last encoder map."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.distributed import collectives
from cluda_cli.errors import SettingsError, nearest
from cluda_cli.models.frozen import Frozen
from cluda_cli.objectives.objective import Objective


class FeatureDistance(Objective):
    """Keep the features of countable things near those of the pretrained encoder (DAFormer, section 3.3).

    Build it while `encoder` still holds its pretrained weights: it keeps a frozen copy. The copy runs in the precision
    of the surrounding autocast, like the student; the distance is computed in float32.

    Raises SettingsError if the classes it shall act on do not exist, or if there are none.
    """

    settings: settings.FeatureDistance

    def __init__(
        self, section: settings.FeatureDistance, encoder: nn.Module, classes: ClassTable, view: str = "source"
    ) -> None:
        super().__init__(section)
        self.reads = ((view,),)
        self.num_classes = len(classes)
        acts_on = torch.zeros(256, dtype=torch.bool)
        acts_on[list(_train_ids(section, classes))] = True
        self.register_buffer("acts_on", acts_on, persistent=False)  # 256, by train id; follows from the settings
        self.pretrained = Frozen(deepcopy(encoder))

    def forward(self, seen: Seen) -> Tensor:
        output, view = seen
        pretrained = self.pretrained(output.image)[-1]  # B C h w
        cells = downscale_label(view.label, pretrained.shape[-2:], self.settings.min_share, self.num_classes)  # B h w
        with torch.autocast(output.image.device.type, enabled=False):
            return masked_distance(output.encoder[-1].float(), pretrained.float(), self.acts_on[cells])


def masked_distance(features: Tensor, pretrained: Tensor, mask: Tensor) -> Tensor:
    """Mean over the cells of `mask`, in the whole batch, of the Euclidean distance across channels.

    `features` and `pretrained` B C h w, `mask` B h w boolean (DAFormer, section 3.3). A scalar, 0 for an empty mask;
    where features agree exactly the gradient is 0. The cells are those of all ranks, and the mean of the ranks' values
    is the distance.
    """
    distance = torch.linalg.vector_norm(features - pretrained, dim=1)  # B h w
    cells = collectives.all_reduce_sum(mask.sum()).clamp_min(1)
    return collectives.world_size() * torch.where(mask, distance, 0).sum() / cells


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


def _train_ids(section: settings.FeatureDistance, classes: ClassTable) -> tuple[int, ...]:
    """Train ids of the classes that the settings name, else of the countable ones."""
    where, off = "objectives.feature_distance.classes", "set objectives.feature_distance=false to switch it off"
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
