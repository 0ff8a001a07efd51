"""Regions that keep or lose their meaning. B images, D fused channels, H W pixels, h w cells of the fused feature."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.mixing import NUM_IDS
from cluda_cli.adaptation.swapping import choose_regions, paste_softly
from cluda_cli.adaptation.views import Maker, Scene, Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.objective import Objective

RESTYLED, SWAPPED = "restyled", "swapped"
KEPT, RESTYLED_PIXEL, SWAPPED_PIXEL = 0, 1, 2
"""What the change head tells apart."""


class SemanticNegatives(Objective):
    """Features of a region stay when its look changes, and change when its class is swapped.

    Our dense counterpart of CLINE (arXiv 2107.00440), a method for texts: its synonyms are here source images of other
    colours and sharpness, its antonyms source images in which a few small regions show objects of another image. Two
    terms are added: the contrast of regions, and the cross-entropy of a linear head that tells for each cell whether it
    was kept, restyled or swapped. A cell has the labels of its upper left pixel. With `learned_weights` the terms are
    weighted by learned log-variances.

    `channels` are those of the fused feature, `truth` is the view of ground truth.
    """

    settings: settings.SemanticNegatives

    def __init__(self, section: settings.SemanticNegatives, channels: int, truth: str = "source") -> None:
        super().__init__(section)
        self.reads = ((truth, RESTYLED, SWAPPED),)
        self.head = nn.Linear(channels, 3)
        self.log_variances = nn.Parameter(torch.zeros(2)) if section.learned_weights else None

    def makers(self) -> Mapping[str, Maker]:
        return {RESTYLED: self._restyle, SWAPPED: self._swap}

    def _restyle(self, scene: Scene) -> View:
        """Source images, all of them jittered and blurred."""
        strength = self.settings.jitter_strength
        always = settings.Mixing(jitter_probability=1, jitter_strength=strength, blur_probability=1)
        return scene.view(RESTYLED, replace(scene.source, image=scene.augment(scene.source.image, always, RESTYLED)))

    def _swap(self, scene: Scene) -> View:
        """Source images with objects of the next image of the joint batch."""
        source, section = scene.source, self.settings
        image, label = (
            collectives.local_rows(collectives.all_gather_rows(rows).roll(-1, 0))
            for rows in (source.image, source.label)
        )
        region = choose_regions(source.label, label, section.regions, section.max_share, scene.generators(SWAPPED))
        image = paste_softly(source.image, image, region, section.seam)
        return scene.view(SWAPPED, replace(source, image=image, label=torch.where(region, label, source.label)))

    def forward(self, original: Seen, restyled: Seen, swapped: Seen) -> Tensor:
        with torch.autocast(original.output.features.device.type, enabled=False):
            features = [seen.output.features.float() for seen in (original, restyled, swapped)]  # B D h w each
            size = features[0].shape[2:]
            label, new = (
                F.interpolate(seen.view.label[:, None].float(), size, mode="nearest")[:, 0].long()
                for seen in (original, swapped)
            )
            region = torch.where((label != new) & (label != IGNORE), new + 1, 0)  # B h w, one id for each class
            terms = torch.stack([
                region_contrast(*features, region, self.settings.temperature),
                change_loss(self.head, features[1], features[2], region, label == IGNORE),
            ])  # fmt: skip
            return terms.sum() if self.log_variances is None else combine(terms, self.log_variances)


def region_contrast(original: Tensor, restyled: Tensor, swapped: Tensor, region: Tensor, temperature: float) -> Tensor:
    """Mean over the regions of all images of `agreement`, with s and a the similarities divided by `temperature`.

    Features are B D h w; `region` B h w, int64, numbers the regions of an image from 1 to 256 and is 0 elsewhere. The
    vector of a region in a view is the mean of its features; s is its cosine similarity in original and restyled view,
    a that in original and swapped view. The regions are those of all ranks, and the mean of the ranks' values is the
    term. A scalar, exactly 0 without a region.
    """
    inside = region > 0
    image = torch.arange(len(region), device=region.device)[:, None, None]
    found, place = (image * (NUM_IDS + 1) + region)[inside].unique(return_inverse=True)
    vectors = []
    for features in (original, restyled, swapped):
        rows = features.movedim(1, -1)[inside]
        sums = rows.new_zeros(len(found), rows.shape[1]).index_add(0, place, rows)
        vectors.append(F.normalize(sums, dim=1))  # sums have the direction of means
    same, other = ((vectors[0] * vector).sum(dim=1) / temperature for vector in vectors[1:])
    count = collectives.all_reduce_sum(torch.tensor(len(found), device=region.device)).clamp_min(1)
    return collectives.world_size() * agreement(same, other).sum() / count


def agreement(same: Tensor, other: Tensor) -> Tensor:
    """(softplus(-s) + softplus(a)) / 2 for logits of equal shape: s that a meaning is the same, a that it is not.

    It is the binary cross-entropy of both, averaged (CLINE, arXiv 2107.00440, sentence term).
    """
    return (F.softplus(-same) + F.softplus(other)) / 2


def change_loss(head: nn.Module, restyled: Tensor, swapped: Tensor, region: Tensor, ignored: Tensor) -> Tensor:
    """Cross-entropy of the change head, averaged over the cells of both views that are not ignored.

    Features are B D h w, `head` maps D to 3 logits; `region` as in `region_contrast`, `ignored` B h w, bool. The cells
    are those of all ranks, and the mean of the ranks' values is the term. A scalar, exactly 0 without such cells.
    """
    targets = torch.full_like(region, RESTYLED_PIXEL), torch.where(region > 0, SWAPPED_PIXEL, KEPT)
    total = sum(
        F.cross_entropy(head(features.movedim(1, -1)).movedim(-1, 1), target.masked_fill(ignored, IGNORE),
                        ignore_index=IGNORE, reduction="sum")
        for features, target in zip((restyled, swapped), targets, strict=True)
    )  # fmt: skip
    count = collectives.all_reduce_sum(2 * (~ignored).sum()).clamp_min(1)
    return collectives.world_size() * total / count


def combine(terms: Tensor, log_variances: Tensor) -> Tensor:
    """Sum of exp(-a_j) L_j + max(a_j, 0) over terms L and log-variances a, of equal length (CLINE's released code).

    Where a_j is 0 the derivative of the maximum is taken to be 0.
    """
    return (torch.exp(-log_variances) * terms + F.relu(log_variances)).sum()
