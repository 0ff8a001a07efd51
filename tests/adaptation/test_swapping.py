"""Which regions are swapped, and how they are pasted."""

import pytest
import torch
from torch import Tensor

from cluda_cli.adaptation.swapping import choose_regions, paste_softly


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def bands(*classes: int) -> Tensor:
    """One image of 20 x 20 pixels, with a band of four rows for each class."""
    return torch.tensor(classes).repeat_interleave(4)[None, :, None].expand(1, 20, 20).clone()


def regions_of(label: Tensor, other: Tensor, count: int, max_share: float) -> set[frozenset[int]]:
    """The sets of classes that are pasted, over many draws."""
    sets = set()
    for seed in range(40):
        region = choose_regions(label, other, count, max_share, generators(1, seed))
        assert torch.all(other[region] != label[region]) and torch.all(other[region] != 255)
        chosen = frozenset(other[region].tolist())
        differs = (other != label) & torch.isin(other, torch.tensor(sorted(chosen), dtype=other.dtype))
        assert torch.equal(region, differs)  # all of a class, where the image shows another one
        sets.add(chosen)
    return sets


def test_regions_are_small_classes_of_the_other_image() -> None:
    """Class 3 covers two bands, which is too much; class 0 is where the image has it already; 255 is no class."""
    label, other = bands(0, 0, 0, 0, 255), bands(0, 3, 3, 255, 7)
    assert regions_of(label, other, 3, 0.2) == {frozenset({7})}
    assert regions_of(label, other, 3, 0.4) == {frozenset({3, 7})}
    assert regions_of(label, other, 1, 0.4) == {frozenset({3}), frozenset({7})}
    assert regions_of(label, other, 3, 0.19) == {frozenset()}
    assert regions_of(label, label, 3, 1.0) == {frozenset()}


def test_a_swapped_region_shows_the_other_image_and_the_seam_fades() -> None:
    image, other = torch.zeros(2, 3, 40, 40), torch.ones(2, 3, 40, 40)
    region = torch.zeros(2, 40, 40, dtype=torch.bool)
    region[0, :, 20:] = True
    mixed = paste_softly(image, other, region, 1.0)
    assert torch.all(mixed[1] == 0)
    row = mixed[0, 0, 20]
    torch.testing.assert_close(row[[0, 15, 25, 39]], torch.tensor([0.0, 0, 1, 1]), atol=1e-3, rtol=0)
    assert 0.2 < row[19] < 0.5 < row[20] < 0.8
    assert row[19] + row[20] == pytest.approx(1, abs=1e-5)
