"""Sums over pairs of pixels in tiles: no matrix is ever quadratic in the number of pixels.

Written plainly, a contrast needs about eleven N x N matrices at once. This form rests on four observations.

* Similarity of one set of pixels with itself is symmetric, so each pair is visited in one order only.
* Between classes only the sums of exponentials matter; logarithms are needed within a class.
* Both kinds of pairs fall into tiles of one matrix, which are plain matrix products (`contrast_pairs` says which).
* The gradient costs little more than the value, so both are computed together.

Two sweeps do it: one over the pairs between classes for the sums, then one over all pairs for value and gradient. The
exponentials of the first sweep are kept for the second up to a fixed budget, and computed again beyond it.

Legend: n pixels, D channels, R products in the weight of a pair, i j k slices of the n pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.objectives.contrast.pairs import Pairs

KEPT = 2**25
"""Exponentials kept between the sweeps, at most: 128 MiB of float32."""
LINEAR = 40.0
"""Argument above which softplus(x) is x; the difference is below the precision of float64."""


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
        # Without negatives both are 0. The smallest number is far below any sum of exponentials.
        _repel(pairs, pull / total.clamp_min(torch.finfo(total.dtype).tiny), kept, gradients)
    return (pairs.left * cost).sum() / 2, cost, gradients


def sum_negatives(pairs: Pairs, keep: int) -> tuple[Tensor, list[Tensor]]:
    """Sum of exp s_ik over the pixels k of other classes, n, and the first tiles of exponentials, `keep` numbers."""
    total = pairs.anchors.new_zeros(len(pairs.anchors))
    kept: list[Tensor] = []
    for i, k in pairs.across():
        exponential = pairs.negatives(i, k)  # i k
        total[i] += exponential.sum(dim=1)
        if pairs.symmetric and i != k:
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
        similarity = pairs.positives(i, j)  # i j
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
            force = pairs.negatives(i, k)
        force *= push[i, None] + push[k] if pairs.symmetric else push[i, None]
        gradients.anchors[i].addmm_(force, pairs.others[k])
        if not pairs.symmetric or i != k:  # a symmetric tile on the diagonal holds both orders of its pairs
            gradients.others[k].addmm_(force.T, pairs.anchors[i])
