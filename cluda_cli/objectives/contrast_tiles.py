"""Sums over pairs of pixels in tiles: no matrix is ever quadratic in the number of pixels.

Written plainly, a contrast needs about eleven N x N matrices at once. This form rests on four observations.

* Similarity of one set of pixels with itself is symmetric, so each pair is visited in one order only.
* Between classes only the sums of exponentials matter; logarithms are needed within a class.
* Pixels sorted by class make both kinds of pairs rectangles of one matrix, and tiles of them plain matrix products.
* The gradient costs little more than the value, so both are computed together.

Two sweeps do it: one over the pairs between classes for the sums, then one over all pairs for value and gradient. The
exponentials of the first sweep are kept for the second up to a fixed budget, and computed again beyond it.

Legend: n pixels sorted by class, D channels, R products in the weight of a pair, i j k slices of the n pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT = 2**25
"""Exponentials kept between the sweeps, at most: 128 MiB of float32."""
LINEAR = 40.0
"""Argument above which softplus(x) is x; the difference is below the precision of float64."""


@dataclass(frozen=True)
class Pairs:
    """Pixels as anchors and as what they are compared with, in order of class.

    The similarity of a pair is anchors_i . others_j, and its weight left_i . right_j, where each column of `right` is
    plus or minus that of `left`. Where `others` is `anchors`, similarity is symmetric.
    """

    anchors: Tensor  # n D
    others: Tensor  # n D
    left: Tensor  # n R
    right: Tensor  # n R
    classes: list[slice]  # one after another, from 0 to n
    tile: int  # side of a tile

    @property
    def symmetric(self) -> bool:
        return self.others is self.anchors

    def similarity(self, i: slice, j: slice) -> Tensor:  # i j
        return self.anchors[i] @ self.others[j].T

    def within(self) -> Iterator[tuple[slice, slice, bool]]:
        """Tiles that cover every pair of pixels of one class.

        With each comes whether its numbers also stand for the same pairs in the opposite order. A tile on the diagonal
        (i = j) holds both orders anyway.
        """
        for run in self.classes:
            for i in _chunks(run.start, run.stop, self.tile):
                for j in _chunks(i.start if self.symmetric else run.start, run.stop, self.tile):
                    yield i, j, self.symmetric and i != j

    def across(self) -> Iterator[tuple[slice, slice]]:
        """Tiles that cover every pair of pixels of different classes, in one order if similarity is symmetric."""
        for run in self.classes:
            for i in _chunks(run.start, run.stop, self.tile):
                for j in _chunks(0, 0 if self.symmetric else run.start, self.tile):
                    yield i, j
                for j in _chunks(run.stop, len(self.anchors), self.tile):
                    yield i, j


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


@dataclass(frozen=True)
class Gradients:
    """Derivatives of the value. Of symmetric pairs `others` is `anchors`, and holds the sum of both parts."""

    anchors: Tensor  # n D
    others: Tensor  # n D

    @classmethod
    def zeros(cls, pairs: Pairs) -> "Gradients":
        anchors = torch.zeros_like(pairs.anchors)
        return cls(anchors, anchors if pairs.symmetric else torch.zeros_like(pairs.others))


def attract_and_repel(pairs: Pairs, differentiate: bool) -> tuple[Tensor, Tensor, Gradients | None]:
    """With s_ij the similarity and L_i the log-sum-exp of s_ik over the pixels k of other classes, the value

        sum_i sum_j left_i . right_j softplus(L_i - s_ij)    over the other pixels j of the class of i,

    its derivative by `left`, n R, where `right` follows, and, if wanted, its gradient. Without pixels of other classes
    the value is 0.
    """
    gradients = Gradients.zeros(pairs) if differentiate else None
    total, kept = sum_negatives(pairs, keep=KEPT if differentiate else 0)
    cost, pull = _attract(pairs, total, gradients)
    if gradients is not None:
        _repel(pairs, pull / total, kept, gradients)
    return (pairs.left * cost).sum() / 2, cost, gradients


def sum_negatives(pairs: Pairs, keep: int) -> tuple[Tensor, list[Tensor]]:
    """Sum of exp s_ik over the pixels k of other classes, n, and the first tiles of exponentials, `keep` numbers."""
    total = pairs.anchors.new_zeros(len(pairs.anchors))
    kept: list[Tensor] = []
    for i, k in pairs.across():
        exponential = pairs.similarity(i, k).exp_()  # i k
        total[i] += exponential.sum(dim=1)
        if pairs.symmetric:
            total[k] += exponential.sum(dim=0)
        keep -= exponential.numel()
        if keep >= 0:
            kept.append(exponential)
    return total, kept


def _attract(pairs: Pairs, total: Tensor, gradients: Gradients | None) -> tuple[Tensor, Tensor]:
    """The derivative of the value by `left`, n R, and for each pixel the sum of |d value / d s_ij| over its positives
    j, n.

    Adds the part of positives to `gradients`: the derivative by s_ij is minus left_i . right_j sigmoid(L_i - s_ij).
    """
    level = total.log()  # n, L_i; -inf without negatives, where cost and pull vanish
    by_left, pull = torch.zeros_like(pairs.left), torch.zeros_like(total)
    for i, j, both in pairs.within():
        similarity = pairs.similarity(i, j)  # i j
        if i == j:
            similarity.fill_diagonal_(torch.inf)  # no pixel is a positive of itself; this costs it nothing
        as_rows = level[i, None] - similarity  # i j
        cost = F.softplus(as_rows, threshold=LINEAR)
        if both:
            as_columns = level[j] - similarity
            cost += F.softplus(as_columns, threshold=LINEAR)
        by_left[i].addmm_(cost, pairs.right[j])
        by_left[j].addmm_(cost.T, pairs.right[i])
        if gradients is None:
            continue
        weight = pairs.left[i] @ pairs.right[j].T  # i j
        as_rows.sigmoid_().mul_(weight)
        pull[i] += as_rows.sum(dim=1)
        if both:
            as_columns.sigmoid_().mul_(weight)
            pull[j] += as_columns.sum(dim=0)
            as_rows += as_columns
        gradients.anchors[i].addmm_(as_rows, pairs.others[j], alpha=-1)
        gradients.others[j].addmm_(as_rows.T, pairs.anchors[i], alpha=-1)
    return by_left, pull


def _repel(pairs: Pairs, push: Tensor, kept: list[Tensor], gradients: Gradients) -> None:
    """Add the part of negatives to `gradients`; overwrites `kept`.

    The derivative by s_ik is exp(s_ik - L_i) times the pull of i; `push`, n, is the pull times exp(-L). Where
    similarity is symmetric, the pair seen from k makes it exp(s_ik) (push_i + push_k).
    """
    waiting = iter(kept)
    for i, k in pairs.across():
        force = next(waiting, None)  # i k
        if force is None:
            force = pairs.similarity(i, k).exp_()
        force *= push[i, None] + push[k] if pairs.symmetric else push[i, None]
        gradients.anchors[i].addmm_(force, pairs.others[k])
        gradients.others[k].addmm_(force.T, pairs.anchors[i])
