"""Cells of a map: their labels, and how some are drawn."""

import torch

from cluda_cli.adaptation.views import View
from cluda_cli.objectives.anchor_contrast import LAST
from cluda_cli.objectives.cells import draw_cells, label_cells, take_cells

SIZE = torch.Size((6, 6))


def make_view() -> View:
    """Two images of 6 x 6 cells of two pixels: class 0, then 1, 2 in the last column; the first row is ignored."""
    label = torch.tensor([0] * 6 + [1] * 4 + [2] * 2).expand(2, 12, 12).clone()
    label[:, :2] = 255
    return View("some", torch.zeros(2, 3, 12, 12), label, *torch.ones(2, 2, 12, 12), seed=torch.tensor([3, 4]))


def test_a_cell_has_the_label_of_its_upper_left_pixel_if_this_has_a_weight() -> None:
    view = make_view()
    view.weight[1, 4:] = 0
    view.label[:, 3, 3] = 9  # within a cell
    cells = label_cells(view, SIZE)
    assert cells[0].tolist() == [[255] * 6] + [[0, 0, 0, 1, 1, 2]] * 5
    assert cells[1].tolist() == [[255] * 6, [0, 0, 0, 1, 1, 2]] + [[255] * 6] * 4


def test_classes_share_the_cells_that_are_drawn() -> None:
    place, label, cell = draw_cells(make_view(), SIZE, "some", 10, 9)
    assert place.shape == label.shape == cell.shape == (2, 9)
    assert all(sorted(one.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2] for one in label)
    known = label_cells(make_view(), SIZE).flatten(1)
    assert torch.equal(known.gather(1, cell), label)
    assert all(len(set(one.tolist())) == 9 for one in cell)
    assert not torch.equal(cell, draw_cells(make_view(), SIZE, "other", 10, 9)[2])


def test_what_is_drawn_beyond_the_labelled_cells_is_told_apart() -> None:
    place, label, _ = draw_cells(make_view(), SIZE, "some", 2, 99)
    assert label.shape == (2, 36)
    assert ((label != 255).sum(dim=1) == 6).all() and torch.equal(label == 255, place == LAST)


def test_features_of_cells() -> None:
    features = torch.arange(2 * 3 * 36).view(2, 3, 6, 6)
    rows = take_cells(features, torch.tensor([[0, 7], [35, 1]]))
    assert rows[:, :, 1].tolist() == [[36, 43], [179, 145]]
