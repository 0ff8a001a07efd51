"""Sums over tiles equal plain sums over all pairs, and so do their gradients. n pixels, D channels, R products."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.objectives.contrast.pairs import Masked, Pairs, Sorted
from cluda_cli.objectives.contrast.tiles import attract_and_repel, sum_negatives

LABEL = torch.tensor([4, 0, 4, 11, 0, 4, 255, 4, 7, 0, 0, 4, 4, 0])
BOTH_CHOICES = pytest.mark.parametrize("choose", [Sorted.of, Masked], ids=["sorted", "masked"])
BOTH_SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "two sets"])
SIGN = torch.tensor([1.0, -1.0], dtype=torch.float64)  # of the columns of `right` against those of `left`


def make_pairs(choose, symmetric: bool, tile: int, label: Tensor = LABEL) -> tuple[Pairs, Tensor]:
    """Pairs of random pixels, and the labels of those taken; -1 marks an ignored one."""
    chosen, generator = choose(label), torch.Generator().manual_seed(0)
    anchors, others = (chosen.take(x) for x in torch.randn(2, len(label), 3, generator=generator).double())
    left = chosen.take(torch.rand(len(label), 2, generator=generator).double())
    return chosen.pairs(anchors, anchors if symmetric else others, left, left * SIGN, tile), chosen.take(
        label.where(label != 255, -1) + 1
    ) - 1


def plain_value(anchors: Tensor, others: Tensor, left: Tensor, label: Tensor) -> Tensor:
    similarity, labelled = anchors @ others.T, label >= 0
    same = (label[:, None] == label) & labelled
    negatives = ~same & labelled[:, None] & labelled
    level = similarity.masked_fill(~negatives, -torch.inf).logsumexp(1, keepdim=True)
    weight = left @ (left * SIGN).T
    cost = F.softplus(level - similarity) * weight
    return cost[same & ~torch.eye(len(label), dtype=torch.bool)].sum()


@BOTH_CHOICES
@BOTH_SYMMETRIES
@pytest.mark.parametrize("tile", [1, 3, 100])
def test_value_and_derivatives_are_those_of_plain_sums(choose, symmetric: bool, tile: int) -> None:
    pairs, taken = make_pairs(choose, symmetric, tile)
    anchors, left = pairs.anchors.clone().requires_grad_(), pairs.left.clone().requires_grad_()
    others = anchors if symmetric else pairs.others.clone().requires_grad_()
    expected = plain_value(anchors, others, left, taken)
    expected.backward()
    value, by_left, gradients = attract_and_repel(pairs, differentiate=True)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(by_left, left.grad)
    torch.testing.assert_close(gradients.anchors, anchors.grad)
    torch.testing.assert_close(gradients.others, others.grad)


@BOTH_CHOICES
@BOTH_SYMMETRIES
def test_without_derivatives_the_value_is_the_same_and_nothing_is_kept(choose, symmetric: bool) -> None:
    pairs, _ = make_pairs(choose, symmetric, 4)
    value, by_left, gradients = attract_and_repel(pairs, differentiate=False)
    assert gradients is None
    expected_value, expected_by_left, _ = attract_and_repel(pairs, differentiate=True)
    assert torch.equal(value, expected_value) and torch.equal(by_left, expected_by_left)


@BOTH_CHOICES
@BOTH_SYMMETRIES
def test_negatives_are_summed_for_each_pixel(choose, symmetric: bool) -> None:
    pairs, taken = make_pairs(choose, symmetric, 4)
    negatives = (taken[:, None] != taken) & (taken[:, None] >= 0) & (taken >= 0)
    expected = torch.where(negatives, (pairs.anchors @ pairs.others.T).exp(), 0).sum(1)
    torch.testing.assert_close(sum_negatives(pairs, 0)[0], expected)


@BOTH_CHOICES
def test_one_class_has_neither_value_nor_gradient(choose) -> None:
    pairs, _ = make_pairs(choose, True, 2, torch.full((5,), 3))
    value, _, gradients = attract_and_repel(pairs, differentiate=True)
    assert value == 0 and not gradients.anchors.any()


@pytest.mark.parametrize("choose", [Sorted.of, Masked])
def test_kept_exponentials_stay_within_their_budget(choose) -> None:
    pairs, _ = make_pairs(choose, True, 16, LABEL.repeat(30))
    for budget in (0, 1000, 10_000):
        kept = sum_negatives(pairs, budget)[1]
        assert sum(tensor.numel() for tensor in kept) <= budget
        assert bool(kept) == bool(budget)
