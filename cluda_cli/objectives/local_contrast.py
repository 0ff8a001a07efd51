"""Contrast of small regions of two views of an image, without labels.

B images, D fused channels, h w cells of the fused feature, n regions, r cells of their side, k negatives in a map,
E projected channels.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.jittered import FIRST, SECOND, MakeJittered
from cluda_cli.adaptation.views import Maker, Seen
from cluda_cli.distributed import collectives
from cluda_cli.errors import SettingsError
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.global_contrast import is_labelled
from cluda_cli.objectives.objective import Objective


class LocalContrast(Objective):
    """Draw a region together with itself in the other view, and push regions of both views that lie elsewhere away.

    Chaitanya et al. (arXiv 2006.10511), their variant L^R, with one positive. A region is a square of cells of the
    fused feature; a head of two layers for each cell and a projection of the whole region makes a vector of it, which
    the deployed network does not need. Regions lie on a grid and are moved at random within its meshes, where the paper
    has 13 fixed places. Negatives of a region are drawn from those whose corner is at least two sides of a region away
    in rows or columns. A region counts if all of its pixels are labelled in both views.

    `channels` are those of the fused feature.
    """

    reads = ((FIRST, SECOND),)
    settings: settings.LocalContrast

    def __init__(self, section: settings.LocalContrast, channels: int) -> None:
        super().__init__(section)
        projection = nn.Linear(section.region**2 * channels, section.projection_channels, bias=False)
        cells = [nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)]
        self.head = nn.Sequential(*cells, nn.Flatten(start_dim=2), projection)

    def makers(self) -> Mapping[str, Maker]:
        chosen = (self.settings.brightness, self.settings.contrast)
        return {name: MakeJittered(name, *chosen) for name in (FIRST, SECOND)}

    def check(self, output: Output) -> None:
        """A region fits into the map, and the longer side has place for another one two sides away."""
        (high, wide), region = output.features.shape[2:], self.settings.region
        if region > min(high, wide) or 3 * region > max(high, wide):
            what = (
                f"the fused feature, {high} x {wide} cells, has no two regions of {region} x {region} far enough apart"
            )
            raise SettingsError(what, "objectives.local_contrast.region", "lower it, or enlarge data.crop")

    def forward(self, first: Seen, second: Seen) -> Tensor:
        maps = [seen.output.features for seen in (first, second)]
        size, region = (maps[0].shape[2], maps[0].shape[3]), self.settings.region
        with torch.autocast(maps[0].device.type, enabled=False):
            unlabelled = ~(is_labelled(first.view) & is_labelled(second.view))  # B H W
            free = F.adaptive_max_pool2d(unlabelled[:, None].float(), size)[:, 0] == 0  # B h w
            generators = first.view.generators("regions")
            corner = draw_corners(size, region, self.settings.regions, generators).to(free.device)  # B n 2
            counted = cut_regions(free[:, None], corner, region).flatten(2).all(dim=2)  # B n
            rival, against = draw_rivals(corner, counted, 2 * region, self.settings.negatives // 2, generators)
            one, other = (self.head(cut_regions(m.float(), corner, region)) for m in maps)  # B n E
            return place_contrast(one, other, rival, against, self.settings.temperature)


def draw_corners(size: tuple[int, int], region: int, count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Upper left corners of regions in maps h w, on the CPU: B n 2, int64, row and column.

    They lie on a square grid of `count` meshes, rounded down to a square number and fewer in small maps, one anywhere
    in each. There is one generator for each image.
    """
    places = [side - region + 1 for side in size]
    meshes = [min(math.isqrt(count), side) for side in places]
    grid = torch.cartesian_prod(*(torch.arange(number) for number in meshes))  # n 2
    drawn = torch.stack([torch.rand(grid.shape, generator=generator) for generator in generators])  # B n 2
    return ((grid + drawn) * torch.tensor(places) / torch.tensor(meshes)).long().minimum(torch.tensor(places) - 1)


def draw_rivals(
    corner: Tensor, counted: Tensor, distance: int, count: int, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """For each region at most `count` others that count and whose corners are `distance` cells away or more.

    `corner` B n 2, `counted` B n, bool. Gives positions among the regions, B n k, and which of them apply, B n k; none
    applies to a region that does not count itself.
    """
    far = (corner[:, :, None] - corner[:, None]).abs().amax(dim=3) >= distance  # B n n
    far = far & counted[:, None] & counted[:, :, None]
    drawn = torch.stack([torch.rand(far.shape[1:], generator=generator) for generator in generators])
    order = drawn.to(far.device, non_blocking=True).masked_fill(~far, 2).argsort(dim=2, stable=True)
    rival = order[:, :, :count]
    return rival, far.gather(2, rival)


def cut_regions(maps: Tensor, corner: Tensor, region: int) -> Tensor:
    """The cells of regions, row by row: maps B D h w, corners B n 2 -> B n r*r D."""
    step = torch.arange(region, device=maps.device)
    image = torch.arange(len(maps), device=maps.device)[:, None, None, None]
    rows, columns = corner[:, :, 0, None, None] + step[:, None], corner[:, :, 1, None, None] + step  # B n r 1, B n 1 r
    return maps.movedim(1, -1)[image, rows, columns].flatten(2, 3)


def place_contrast(one: Tensor, other: Tensor, rival: Tensor, against: Tensor, temperature: float) -> Tensor:
    """Mean over anchors of -log( exp(s_ap) / (exp(s_ap) + sum_k exp(s_ak)) ), over both views as that of the anchor.

    `one` and `other` B m E hold the vectors of m places in two views, of any length; s is the cosine similarity divided
    by `temperature`. The first n places are anchors. The positive is the same place in the other view, the negatives
    are its rivals in both views: `rival` B n k, positions, of which those count that `against` B n k, bool, says. An
    anchor without any takes no part. The anchors are those of all ranks, and the mean of the ranks' values is the term
    (Chaitanya et al., arXiv 2006.10511). A scalar, exactly 0 without anchors.
    """
    anchors = rival.shape[1]
    units = [F.normalize(vectors, dim=2) for vectors in (one, other)]
    good = (units[0] * units[1]).sum(dim=2)[:, :anchors] / temperature  # B n
    applies = against.any(dim=2)
    total = good.new_zeros(())
    for unit in units:
        bad = [(unit[:, :anchors] @ rivals.mT / temperature).gather(2, rival) for rivals in units]  # B n k each
        masked = [similarity.masked_fill(~against, -torch.inf) for similarity in bad]
        cost = torch.cat([good[..., None], *masked], dim=2).logsumexp(dim=2) - good
        total = total + cost.where(applies, 0).sum()
    count = collectives.all_reduce_sum(applies.sum()).clamp_min(1)
    return collectives.world_size() * total / (2 * count)
