"""Both choices of pixels cover every pair that counts, exactly once. N pixels, D channels."""

import pytest
import torch
from torch import Tensor

from cluda_cli.objectives.contrast.pairs import Masked, Pairs, Sorted

LABEL = torch.tensor([4, 0, 255, 4, 11, 0, 4, 255, 4, 7, 0])
TAKEN = (LABEL != 255).nonzero().flatten()
BOTH_CHOICES = pytest.mark.parametrize("choose", [Sorted.of, Masked], ids=["sorted", "masked"])


def make_pairs(choose, symmetric: bool, tile: int) -> tuple[Pairs, Tensor]:
    """Pairs of random pixels, and for each pixel taken the position that it had; -1 marks an ignored one."""
    chosen = choose(LABEL)
    features, other = torch.randn(2, len(LABEL), 3, generator=torch.Generator().manual_seed(0))
    position = chosen.take(torch.arange(len(LABEL)).where(LABEL != 255, -1) + 1) - 1
    anchors, weight = chosen.take(features), torch.ones(len(position), 1)
    return chosen.pairs(anchors, anchors if symmetric else chosen.take(other), weight, weight, tile), position


def count(visits, position: Tensor) -> Tensor:
    """How often each pair of the N pixels is visited; `visits` are tiles with the pairs in them and in reverse."""
    counts = torch.zeros(len(LABEL), len(LABEL), dtype=torch.int64)
    for i, j, found, reverse in visits:
        for row, column in found.nonzero().tolist():
            one, other = position[i][row], position[j][column]
            counts[one, other] += 1
            counts[other, one] += int(reverse)
    return counts


@BOTH_CHOICES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_every_pair_of_one_class_is_visited_once_and_no_pixel_with_itself(choose, symmetric: bool, tile: int) -> None:
    pairs, position = make_pairs(choose, symmetric, tile)
    visits = ((i, j, pairs.positives(i, j).isfinite(), both) for i, j, both in pairs.within())
    same = (LABEL[:, None] == LABEL) & (LABEL != 255) & ~torch.eye(len(LABEL), dtype=torch.bool)
    assert torch.equal(count(visits, position), same.long())


@BOTH_CHOICES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_every_pair_of_two_classes_is_visited_once(choose, symmetric: bool, tile: int) -> None:
    pairs, position = make_pairs(choose, symmetric, tile)
    visits = ((i, k, pairs.negatives(i, k) > 0, symmetric and i != k) for i, k in pairs.across())
    labelled = LABEL != 255
    different = (LABEL[:, None] != LABEL) & labelled[:, None] & labelled
    assert torch.equal(count(visits, position), different.long())


@BOTH_CHOICES
def test_a_tile_holds_the_similarities_of_its_pixels(choose) -> None:
    pairs, _ = make_pairs(choose, False, 4)
    similarity = pairs.anchors @ pairs.others.T
    for i, j, _ in pairs.within():
        found = pairs.positives(i, j)
        torch.testing.assert_close(found[found.isfinite()], similarity[i, j][found.isfinite()])
        assert max(found.shape) <= 4
    for i, k in pairs.across():
        found = pairs.negatives(i, k)
        torch.testing.assert_close(found[found > 0], similarity[i, k].exp()[found > 0])
        assert max(found.shape) <= 4


@BOTH_CHOICES
def test_rows_that_are_taken_are_added_where_they_came_from(choose) -> None:
    chosen, rows = choose(LABEL), torch.arange(1.0, 2 * len(LABEL) + 1).view(-1, 2)
    total = torch.full_like(rows, 100.0)
    chosen.add(chosen.take(rows), total)
    assert torch.equal(total[TAKEN], rows[TAKEN] + 100)
    assert torch.equal(total[LABEL == 255], torch.full((2, 2), 100.0))


@BOTH_CHOICES
@pytest.mark.parametrize("label", [LABEL, torch.full((3,), 255), torch.tensor([3, 255, 5])], ids=["some", "no", "two"])
def test_root_shares_multiply_to_the_share_of_a_pair(choose, label: Tensor) -> None:
    """1 / n max(1, |P_i|), with n labelled pixels and |P_i| other ones of the class."""
    labelled = label != 255
    others = (label[:, None] == label).sum(1) - 1
    expected = 1 / (labelled.sum() * others.clamp_min(1))
    shares = choose(label).root_shares(torch.float64)
    torch.testing.assert_close(shares[labelled] ** 2, expected[labelled].double())
    assert not shares[~labelled].any()


def test_sorted_classes_follow_one_another_the_largest_first() -> None:
    chosen = Sorted.of(LABEL)
    assert chosen.classes == [slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 9)]
    assert LABEL[chosen.order].tolist() == [4] * 4 + [0] * 3 + [7, 11]
