"""Contrast of whole parts of images, without labels.

B images of all ranks, C channels, h w cells of the last encoder map, S parts, E projected channels, N vectors.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.jittered import FIRST, SECOND, MakeJittered
from cluda_cli.adaptation.views import Maker, Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.objective import Objective


class GlobalContrast(Objective):
    """Draw a part of an image in two jittered views together, and push parts at other places away, of all images.

    Chaitanya et al. (arXiv 2006.10511), their variant G^D-: parts at the same place of other images are neither
    positives nor negatives. There the parts are slices of a volume; here they are bands of rows of an image, because
    what scenes of one kind share is their layout. A part is the mean of the last encoder map over its labelled cells,
    behind a head of two linear layers, which the deployed network does not need. A cell counts by the share of it that
    is labelled in both views. With micro-batches the images are those of one micro-batch.

    `channels` are those of the last encoder map.
    """

    reads = ((FIRST, SECOND),)
    settings: settings.GlobalContrast

    def __init__(self, section: settings.GlobalContrast, channels: int) -> None:
        super().__init__(section)
        projection = nn.Linear(channels, section.projection_channels, bias=False)
        self.head = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.ReLU(), projection)

    def makers(self) -> Mapping[str, Maker]:
        chosen = (self.settings.brightness, self.settings.contrast)
        return {name: MakeJittered(name, *chosen) for name in (FIRST, SECOND)}

    def forward(self, first: Seen, second: Seen) -> Tensor:
        with torch.autocast(first.output.features.device.type, enabled=False):
            labelled = is_labelled(first.view) & is_labelled(second.view)
            maps = torch.stack([seen.output.encoder[-1].float() for seen in (first, second)], dim=1)  # B 2 C h w
            means, counted = mean_parts(maps, labelled, self.settings.parts)  # B 2 S C and B S
            vectors, counted = (collectives.all_gather_rows(rows) for rows in (self.head(means), counted))
            images, _, parts, _ = vectors.shape
            part = torch.arange(parts, device=counted.device).where(counted, -1)[:, None].expand(-1, 2, -1).flatten()
            anchor = torch.arange(len(part), device=part.device)
            positive = anchor.view(images, 2, parts).flip(1).flatten()
            return part_contrast(vectors.flatten(0, 2), part, anchor, positive, self.settings.temperature)


def is_labelled(view: View) -> Tensor:
    """Where a view has labels that count.  # B H W, bool"""
    return (view.label != IGNORE) & (view.weight > 0)


def mean_parts(maps: Tensor, labelled: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Means of bands of rows, as equal as rows allow: maps B V C h w, labelled B H W -> B V S C, and B S, bool.

    Cells count by their labelled share. The second result says which parts have any. There are `parts` of them, or as
    many as the maps have rows.
    """
    rows = maps.shape[3]
    share = F.adaptive_avg_pool2d(labelled[:, None].float(), maps.shape[3:])[:, 0].to(maps.dtype)  # B h w
    of_row = torch.arange(rows, device=maps.device) * min(parts, rows) // rows  # h
    member = F.one_hot(of_row).to(maps.dtype)  # h S
    total = share.sum(dim=2) @ member  # B S
    sums = torch.einsum("bvchw,bhw,hs->bvsc", maps, share, member)
    return sums / total.where(total > 0, 1)[:, None, :, None], total > 0


def part_contrast(vectors: Tensor, part: Tensor, anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Mean over pairs (a, p) of -log( exp(s_ap) / (exp(s_ap) + sum_{k of another part than a} exp(s_ak)) ).

    `vectors` N E of any length (their direction counts); s is the cosine similarity divided by `temperature`. `part` N,
    int64, with -1 for a vector that does not count; pairs are positions, int64, one `anchor` for each `positive`
    (Chaitanya et al., arXiv 2006.10511; their code multiplies this mean by a number of its own in each variant). A
    scalar, exactly 0 without a pair that has a negative.
    """
    unit = F.normalize(vectors, dim=1)
    similarity = unit @ unit.T / temperature  # N N
    counts = part >= 0
    rival = (part[:, None] != part) & counts  # N N, by anchor
    good = similarity[anchor, positive]
    bad = similarity.masked_fill(~rival, -torch.inf)[anchor]
    cost = torch.cat([good[:, None], bad], dim=1).logsumexp(dim=1) - good
    applies = counts[anchor] & counts[positive] & rival[anchor].any(dim=1)
    return cost.where(applies, 0).sum() / applies.sum().clamp_min(1)
