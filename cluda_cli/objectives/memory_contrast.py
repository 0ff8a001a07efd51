"""Contrast of pixels with a memory of every class, and with mixtures of its hardest negatives (MoCHi).

B images, K classes, D fused channels, E projected channels, n cells of the fused feature in an image, A anchors,
M = K times the size of a class's memory, s and t mixtures of either kind for each anchor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.teacher import ema_decay
from cluda_cli.adaptation.views import Scene, Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.models.average import MovingAverage
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.cells import draw_cells, take_cells
from cluda_cli.objectives.objective import Objective

AT_ONCE = 2**20
"""Similarities and numbers in mixtures that exist at a time: 4 megabytes of float32."""
LARGEST_OWN_SHARE = 0.5
"""Of the anchor in a mixture with it; a larger one would be more like the anchor than any negative is (MoCHi)."""


class Mixes(NamedTuple):
    """What negatives are mixed of: rows of the memory (int64) and shares (0..1), for each of A anchors."""

    first: Tensor  # A s, a row and
    second: Tensor  # A s, another or the same
    share: Tensor  # A s, of the first; the second has the rest
    alone: Tensor  # A t, a row that is mixed with the anchor
    own_share: Tensor  # A t, of the anchor; the row has the rest


class MemoryContrast(Objective):
    """Draw the anchors of a class to what the teacher saw of it in earlier steps, and push them from other classes.

    Hard negative mixing (MoCHi, arXiv 2010.01028), read for pixels with labels: the memory is one ring of projected
    teacher features for each class, so other classes alone are negatives. The equations are those of secondary
    sources; the sizes are ours. Without mixtures it is a plain contrast with a memory.

    Anchors are labelled cells of `mixed` with a weight above 0, drawn so that all classes of all images have equally
    many, where there are so many. A cell has the label of its upper left pixel. `channels` are those of the fused
    feature. With two resolutions anchors are cells of the context. The memory is empty at first: the term is then 0.
    """

    reads = (("mixed",),)
    settings: settings.MemoryContrast
    memory: Tensor
    pointer: Tensor
    length: Tensor

    def __init__(self, section: settings.MemoryContrast, num_classes: int, channels: int) -> None:
        super().__init__(section)
        width = section.projection_channels
        self.head = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
        self.average = MovingAverage(self.head)
        self.register_buffer("memory", torch.zeros(num_classes, section.memory, width))  # unit vectors
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.int64))  # where a class is written next
        self.register_buffer("length", torch.zeros(num_classes, dtype=torch.int64))  # rows that a class has

    def forward(self, seen: Seen) -> Tensor:
        s = self.settings
        with torch.autocast(seen.output.features.device.type, enabled=False):
            own = self._first(*self._find(*seen))
            _, label, features, drawn = self._first(*map(collectives.all_gather_rows, own))
            query = F.normalize(self.head(features), dim=1)
            of_anchor = self.memory[..., 0].numel() + query.shape[1] * (s.mixed_pairs + s.mixed_queries)
            rows = max(AT_ONCE // of_anchor, 1)
            parts = zip(query.split(rows), label.split(rows), drawn.split(rows), strict=True)
            measured = [self._differentiate(*part) for part in parts]
            costs, used, gradient = (torch.cat(tensors) for tensors in zip(*measured, strict=True))
            # The product is 0 and has the gradient that was computed.
            return (costs.sum() + ((query - query.detach()) * gradient).sum()) / used.sum().clamp_min(1)

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        """Remember what the teacher makes of a few pixels of every class and image."""
        views = [view for _, view in seen if view.name == "mixed"]
        self.average.update(ema_decay(scene.step + 1, scene.teacher.decay))
        features = scene.teacher.output(torch.cat([view.image for view in views]), keep_statistics=False).features
        with torch.autocast(features.device.type, enabled=False):
            size, each = features.shape[2:], self.settings.pushed
            drawn = [draw_cells(view, size, "memory rows", each, each * len(self.memory)) for view in views]
            _, label, cell = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
            rows = F.normalize(self.average(take_cells(features.float(), cell).flatten(0, 1)), dim=1)
            push(self.memory, self.pointer, self.length, *map(collectives.all_gather_rows, (rows, label.flatten())))

    def _find(self, output: Output, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The anchors of a view: places A, labels A, features A D and random numbers for their mixtures, A 3s+2t."""
        count, width = self.settings.anchors, 3 * self.settings.mixed_pairs + 2 * self.settings.mixed_queries
        features = output.features.float()
        place, label, cell = draw_cells(view, features.shape[2:], "memory anchors", count, count)
        rows = take_cells(features, cell)
        drawn = [torch.rand(place.shape[1], width, generator=g) for g in view.generators("memory mixtures")]
        mixtures = torch.stack(drawn).to(rows.device, non_blocking=True)
        return place.flatten(), label.flatten(), rows.flatten(0, 1), mixtures.flatten(0, 1)

    def _first(self, place: Tensor, *rows: Tensor) -> list[Tensor]:
        """Of all rows as many as there may be anchors, in ascending order of their places."""
        order = place.argsort(stable=True)[: self.settings.anchors]
        return [tensor[order] for tensor in (place, *rows)]

    def _differentiate(self, query: Tensor, label: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of anchors with unit queries A E, labels A and random numbers A 3s+2t: their costs A, which of them count, A,
        and the gradient A E of the sum of the costs. It is computed here, so that similarities are gone afterwards."""
        leaf = query.detach().requires_grad_()
        with torch.enable_grad():
            costs, used = self._measure(leaf, label, drawn)
            (gradient,) = torch.autograd.grad(costs.sum(), leaf)
        return costs.detach(), used, gradient

    def _measure(self, query: Tensor, label: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        (num_classes, slots), memory = self.memory.shape[:2], self.memory.flatten(0, 1)  # M E
        classes, slot = (torch.arange(size, device=memory.device) for size in (num_classes, slots))
        known = classes[:, None].where(slot < self.length[:, None], IGNORE)  # K slots
        own = label.clamp(max=num_classes - 1)
        positive = (known[own] == label[:, None]) & (label != IGNORE)[:, None]  # A slots
        negative = (known.flatten() != label[:, None]) & (known.flatten() != IGNORE)  # A M
        similarity = query @ memory.T  # A M
        s, t = self.settings.mixed_pairs, self.settings.mixed_queries
        mixed = similarity[:, :0]
        if s + t:
            hard, count = find_hardest(similarity.detach(), negative, self.settings.hardest)
            first, second, share, alone, own_share = drawn.split([s, s, s, t, t], dim=1)
            first, second, alone = (hard.gather(1, pick(u, count)) for u in (first, second, alone))
            mixes = Mixes(first, second, share, alone, LARGEST_OWN_SHARE * own_share)
            mixed = (mix(query, memory, mixes) @ query[..., None])[..., 0]  # A s+t
        of_own = similarity.view(-1, num_classes, slots)[torch.arange(len(own), device=own.device), own]  # A slots
        similarities = (part / self.settings.temperature for part in (of_own, similarity, mixed))
        return contrast_costs(*similarities, positive, negative)


def find_hardest(similarity: Tensor, negative: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows of the memory most similar to each query, A M, among its negatives, A M boolean, the hardest first.

    Rows A N, N = `count` or M if it is smaller, and how many of them are negatives, A 1, 0..N: if there are fewer than
    N, other rows follow them.
    """
    rows = similarity.masked_fill(~negative, -torch.inf).topk(min(count, similarity.shape[1]), dim=1).indices
    return rows, negative.sum(dim=1, keepdim=True).clamp(max=rows.shape[1])


def pick(uniform: Tensor, count: Tensor) -> Tensor:
    """Positions below `count` A 1 from random numbers A s in 0..1; 0 where the count is 0."""
    return torch.minimum((uniform * count).long(), count - 1).clamp_min(0)


def mix(query: Tensor, memory: Tensor, mixes: Mixes) -> Tensor:
    """Synthetic negatives of each query, unit vectors without a gradient: A s+t E.

    With unit rows n of the memory M E and unit queries q A E, they are the directions of a n_i + (1 - a) n_j, a the
    share, and of b q + (1 - b) n_j, b the share of the query (MoCHi, arXiv 2010.01028).
    """
    with torch.no_grad():
        share, own_share = mixes.share[..., None], mixes.own_share[..., None]
        pairs = share * memory[mixes.first] + (1 - share) * memory[mixes.second]
        queries = own_share * query[:, None] + (1 - own_share) * memory[mixes.alone]
        return F.normalize(torch.cat([pairs, queries], dim=1), dim=2)


def contrast_costs(
    own: Tensor, others: Tensor, mixed: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    """The cost of every query, float A, and whether it counts, boolean A: if it has a positive and a negative.

    The similarities s, divided by the temperature, of each query with rows `own` A P, with rows `others` A M and with
    further negatives `mixed` A m; `positive` A P and `negative` A M say which of the rows are that. The cost is the
    mean over the positives j, each with itself and all negatives in its denominator, of

        -log( exp(s_j) / (exp(s_j) + sum_{k negative or mixed} exp(s_k)) ),

    in nats, and exactly 0 where a query does not count.
    """
    used = positive.any(dim=1) & negative.any(dim=1)
    # A query that does not count keeps all rows: the gradient of the log-sum-exp of nothing is not a number.
    others = others.masked_fill(~negative & used[:, None], -torch.inf)
    rivals = torch.logaddexp(others.logsumexp(dim=1), mixed.logsumexp(dim=1)) if mixed.shape[1] else others.logsumexp(1)
    costs = torch.logaddexp(rivals[:, None], own) - own  # A P
    return ((costs * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)).where(used, 0), used


def push(memory: Tensor, pointer: Tensor, length: Tensor, rows: Tensor, label: Tensor) -> None:
    """Write rows n E behind the newest ones of their classes, in place; labels n are train ids, 255 = do not write.

    `memory` K S E holds a ring for each class, `pointer` K the slot that is written next, `length` K how many slots
    are filled, from the first on. Of more than S rows of a class the last S are written.
    """
    num_classes, slots = memory.shape[:2]
    one_hot = (label == torch.arange(num_classes, device=label.device)[:, None]).long()  # K n
    count = one_hot.sum(dim=1)  # K
    own = label.clamp(max=num_classes - 1)
    rank = (one_hot.cumsum(dim=1) - 1).gather(0, own[None])[0]  # n, among the rows of the class
    written = (label != IGNORE) & (rank >= count[own] - slots)
    # What is not written goes to a row behind the last.
    place = (own * slots + (pointer[own] + rank) % slots).where(written, num_classes * slots)
    longer = torch.cat([memory.flatten(0, 1), memory.new_zeros(1, memory.shape[2])])
    memory.copy_(longer.index_copy_(0, place, rows)[:-1].view_as(memory))
    pointer.copy_((pointer + count) % slots)
    length.copy_((length + count).clamp(max=slots))
