"""Cross-entropy of scores merged with those of neighbours. B batch, K classes, H W pixels, h w centres of windows."""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.objective import Objective


class LocallyAdaptive(Objective):
    """Supervision of what neighbours of one label say together (LAL, locally adaptive learning).

    Read for its definition were two notes on the paper and its abstract; nobody published code. Window, stride, spread
    and the border are ours. It takes the place of cross-entropy on its views. Class weights and the detail crop count
    as there.
    """

    settings: settings.LocallyAdaptive

    def __init__(self, section: settings.LocallyAdaptive, class_weights: Tensor | None = None) -> None:
        super().__init__(section)
        self.reads = tuple((view,) for view in section.views)
        self.terms = nn.ModuleDict()
        for view in section.views:
            term = CrossEntropy(section, view, class_weights)
            order = section.order if view in ("source", "labelled") else section.pseudo_label_order
            term.mean = partial(merged_cross_entropy, section=section, order=order)
            self.terms[view] = term

    def forward(self, seen: Seen) -> Tensor:
        value: Tensor = self.terms[seen.view.name](seen)
        return value


def merged_cross_entropy(
    logits: Tensor, label: Tensor, weight: Tensor, section: settings.LocallyAdaptive, order: float
) -> Tensor:
    """Power mean of the cross-entropies of merged scores, over the labelled centres of windows with weight.

    Logits B K * * are first resized to the labels B H W (train ids, 255 = ignored); weights are B H W. A scalar in
    nats, exactly 0 without a centre.
    """
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)  # B K H W
    label = label.masked_fill(weight == 0, IGNORE)
    merged, centre = merge_neighbours(logits, label, section.window, section.stride, section.spread)
    losses = F.cross_entropy(merged, centre, ignore_index=IGNORE, reduction="none")  # B h w
    return power_mean(losses, weight[:, :: section.stride, :: section.stride], centre != IGNORE, order)


def merge_neighbours(logits: Tensor, label: Tensor, window: int, stride: int, spread: float) -> tuple[Tensor, Tensor]:
    """Mean scores of the pixels in each window that have the label of its centre, and these labels: B K h w, B h w.

    Scores of an ignored centre mean nothing.

    Logits B K H W, labels B H W. Centres are the pixels of rows and columns 0, `stride`, 2 `stride`, ...; a window of
    `window` x `window` pixels, an odd number, is clipped at the border. A pixel at the chessboard distance d of its
    centre weighs exp(-d^2 / (2 spread^2)).
    """
    height, width = label.shape[1:]
    reach = window // 2
    padded, labels = F.pad(logits, [reach] * 4), F.pad(label, [reach] * 4, value=IGNORE)
    own = label[:, ::stride, ::stride]  # B h w
    total, weights = torch.zeros_like(logits[:, :, ::stride, ::stride]), torch.zeros_like(own, dtype=logits.dtype)
    for y, x in itertools.product(range(window), repeat=2):
        part = (..., slice(y, y + height, stride), slice(x, x + width, stride))
        distance = max(abs(y - reach), abs(x - reach))
        weight = math.exp(-(distance**2) / (2 * spread**2)) * (labels[part] == own).to(logits.dtype)  # B h w
        total.addcmul_(weight[:, None], padded[part])
        weights += weight
    return total / weights[:, None], own


def power_mean(values: Tensor, weight: Tensor, counted: Tensor, order: float) -> Tensor:
    """(sum_q w_q v_q^order / M)^(1/order) over the M values of all ranks that are counted; exactly 0 without any.

    Values and weights B h w, at least 0, `counted` B h w boolean. All ranks have the same value.
    """
    largest = collectives.all_gather_rows(values.detach().amax()[None]).amax()
    scale = largest.where(largest > 0, 1)  # powers of values so scaled neither overflow nor vanish
    powers = (weight * (values / scale).pow(order)).where(counted, 0)
    count = collectives.all_reduce_sum(counted.sum()).clamp_min(1)
    mean = collectives.all_gather_rows(powers.sum()[None]).sum() / count
    return torch.where(mean > 0, scale * mean.where(mean > 0, 1).pow(1 / order), mean)
