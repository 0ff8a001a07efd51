"""Pixel contrast with its gradient, computed in tiles: no matrix is ever quadratic in the number of pixels.

The published loss needs about eleven N x N matrices at once. This form rests on four observations.

* Similarity is symmetric, so each pair of pixels of different classes is visited in one order only.
* Between classes only the sums of exponentials matter; logarithms are needed within a class.
* Pixels sorted by class make both kinds of pairs rectangles of one matrix, and tiles of them plain matrix products.
* The gradient costs little more than the value, so the forward pass computes it and the backward pass scales it.

Two sweeps do it: one over the pairs between classes for the sums, then one over all pairs for value and gradient. The
exponentials of the first sweep are kept for the second up to a fixed budget, and computed again beyond it.

Legend: N pixels, n of them labelled and sorted by class, D channels, i and j slices of the n pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cluda_cli.data.labels import IGNORE

CPU_TILE = 512
"""Side of a tile on a CPU: one megabyte of float32, which stays in the cache between the steps of a tile."""
GPU_TILE = 4096
"""Side of a tile elsewhere: few enough kernel launches that they do not dominate (a guess, not measured)."""
KEPT = 2**25
"""Exponentials kept between the sweeps, at most: 128 MiB of float32."""
TINY = 1e-12
"""Norm below which a feature has no direction: it is similar to none and gets no gradient."""
LINEAR = 40.0
"""Argument above which softplus(x) is x; the difference is below the precision of float64."""


def contrast(features: Tensor, label: Tensor, weight: Tensor, temperature: float, tile: int = 0) -> Tensor:
    """Contrast every labelled pixel with all others: towards its class, away from every other class.

    `features` N D of any length (their direction counts), `label` N train ids, 255 = ignored, `weight` N. With s_ij the
    cosine similarity divided by `temperature`, P_i the other pixels of the class of i, L_i the log-sum-exp of s_ik over
    the pixels k of other classes, and n the number of labelled pixels, the value is

        1/n sum_i 1/max(1, |P_i|) sum_{j in P_i} w_i w_j softplus(L_i - s_ij),

    which is CLUDA's pixel-to-pixel contrast without the ignored pixels. Its form is that of ContrastiveSeg (Wang et
    al., ICCV 2021): a positive competes with all negatives but not with other positives. A scalar, exactly 0 without a
    pair of positives or without negatives.

    float32 or float64; `temperature` at least 0.02, below which exponentials leave the range of float32. The result
    repeats exactly on a CPU, and depends on `tile`, the side of a tile, by rounding only. Features alone receive a
    gradient, once: it cannot be differentiated again. On a GPU it waits for the device once, for the class sizes.
    """
    tile = tile or (CPU_TILE if features.device.type == "cpu" else GPU_TILE)
    differentiate = torch.is_grad_enabled() and features.requires_grad
    value: Tensor = _PixelContrast.apply(features, label, weight, temperature, tile, differentiate)
    return value


class _PixelContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        features: Tensor,  # N D
        label: Tensor,  # N
        weight: Tensor,  # N
        temperature: float,
        tile: int,
        differentiate: bool,
    ) -> Tensor:
        order, classes = _sort_by_class(label)
        rows = features[order]  # n D
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # n 1
        # Both factors of a similarity carry the root of 1/temperature, so that one copy of the pixels serves for both.
        rows *= temperature**-0.5 / norm.clamp_min(TINY)
        pixels = _Pixels(rows, weight[order].to(rows.dtype), classes, tile)
        gradient = torch.zeros_like(rows) if differentiate else None  # n D
        total, kept = _sum_negatives(pixels, keep=KEPT if differentiate else 0)
        value, pull = _attract(pixels, total, gradient)
        if gradient is not None:
            _repel(pixels, pull / total, kept, gradient)
            # From the scaled unit vectors back to features: project out their direction, divide by their norm.
            gradient -= rows * ((rows * gradient).sum(dim=1, keepdim=True) * temperature)
            gradient *= (norm >= TINY) / norm.clamp_min(TINY) * temperature**-0.5
            unsorted = torch.zeros_like(features)
            unsorted[order] = gradient
            ctx.save_for_backward(unsorted)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None, None, None


def _sort_by_class(label: Tensor) -> tuple[Tensor, list[slice]]:
    """Indices of the labelled pixels, class by class, and the slice of each class; the largest class comes first.

    That order leaves the thin tiles of small classes short: they pair with smaller classes only.
    """
    sorted_label, order = label.sort(stable=True)
    ids = torch.arange(IGNORE, device=label.device, dtype=label.dtype)
    ends = torch.searchsorted(sorted_label, ids, right=True).tolist()
    runs = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]
    runs.sort(key=lambda run: run.start - run.stop)
    classes: list[slice] = []
    for run in runs:
        start = classes[-1].stop if classes else 0
        classes.append(slice(start, start + run.stop - run.start))
    return torch.cat([order[run] for run in runs] or [order[:0]]), classes


@dataclass(frozen=True)
class _Pixels:
    """The labelled pixels in order of class."""

    rows: Tensor  # n D, unit features divided by the root of the temperature
    weight: Tensor  # n
    classes: list[slice]
    tile: int

    def similarity(self, i: slice, j: slice) -> Tensor:
        """i j, cosine divided by the temperature."""
        return self.rows[i] @ self.rows[j].T

    def within(self) -> Iterator[tuple[slice, slice, float]]:
        """Tiles that cover every pair of pixels of one class, on and above the diagonal.

        With each comes the factor of its terms, one over the number of pixels and the number of positives of each.
        """
        for run in self.classes:
            factor = 1 / (len(self.rows) * max(1, run.stop - run.start - 1))
            for i in _chunks(run.start, run.stop, self.tile):
                for j in _chunks(i.start, run.stop, self.tile):
                    yield i, j, factor

    def across(self) -> Iterator[tuple[slice, slice]]:
        """Tiles that cover every pair of pixels of different classes once."""
        for run in self.classes:
            for i in _chunks(run.start, run.stop, self.tile):
                for j in _chunks(run.stop, len(self.rows), self.tile):
                    yield i, j


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _sum_negatives(pixels: _Pixels, keep: int) -> tuple[Tensor, list[Tensor]]:
    """Sum of exp s_ik over the pixels k of other classes, n, and the first tiles of exponentials, `keep` numbers."""
    total = torch.zeros_like(pixels.weight)
    kept: list[Tensor] = []
    for i, j in pixels.across():
        exponential = pixels.similarity(i, j).exp_()  # i j
        total[i] += exponential.sum(dim=1)
        total[j] += exponential.sum(dim=0)
        keep -= exponential.numel()
        if keep >= 0:
            kept.append(exponential)
    return total, kept


def _attract(pixels: _Pixels, total: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """The value, and for each pixel the sum of |d value / d s_ij| over its positives j, n.

    Adds the part of positives to `gradient`, n D: the derivative by s_ij is minus factor w_i w_j sigmoid(L_i - s_ij).
    """
    rows, weight = pixels.rows, pixels.weight
    level = total.log()  # n, L_i; -inf without negatives, where cost and pull vanish
    value, pull = total.new_zeros(()), torch.zeros_like(total)
    for i, j, factor in pixels.within():
        similarity = pixels.similarity(i, j)  # i j
        if i == j:
            similarity.fill_diagonal_(torch.inf)  # no pixel is a positive of itself; this costs it nothing
        as_rows = level[i, None] - similarity  # i j
        cost = F.softplus(as_rows, threshold=LINEAR)
        if i != j:  # a tile on the diagonal holds both orders of a pair already
            as_columns = level[j] - similarity
            cost += F.softplus(as_columns, threshold=LINEAR)
        value += factor * (weight[i] @ (cost @ weight[j]))
        if gradient is None:
            continue
        pull[i] += factor * weight[i] * (as_rows.sigmoid_() @ weight[j])
        if i != j:
            pull[j] += factor * weight[j] * (weight[i] @ as_columns.sigmoid_())
            as_rows += as_columns
        as_rows *= (factor * weight[i])[:, None] * weight[j]
        gradient[i].addmm_(as_rows, rows[j], alpha=-1)
        gradient[j].addmm_(as_rows.T, rows[i], alpha=-1)
    return value, pull


def _repel(pixels: _Pixels, push: Tensor, kept: list[Tensor], gradient: Tensor) -> None:
    """Add the part of negatives to `gradient`, n D; overwrites `kept`.

    The derivative by s_ik is exp(s_ik - L_i) times the pull of i; `push`, n, is the pull times exp(-L). With the pair
    seen from k it makes exp(s_ik) (push_i + push_k), which is symmetric.
    """
    waiting = iter(kept)
    for i, k in pixels.across():
        force = next(waiting, None)  # i k
        if force is None:
            force = pixels.similarity(i, k).exp_()
        force *= push[i, None] + push[k]
        gradient[i].addmm_(force, pixels.rows[k])
        gradient[k].addmm_(force.T, pixels.rows[i])
