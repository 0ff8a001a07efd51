"""Cells of a feature map with the labels of a view. B images, D channels, h w cells, n = h * w, H W pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.adaptation.views import View
from cluda_cli.data.labels import IGNORE
from cluda_cli.objectives.anchor_contrast import DRAWN, LAST, anchor_places


def label_cells(view: View, size: torch.Size) -> Tensor:
    """The label of the upper left pixel of each cell of a grid h w, 255 where this has no weight.  # B h w"""
    label = view.label.where(view.weight > 0, IGNORE)[:, None].float()
    return F.interpolate(label, size, mode="nearest")[:, 0].long()


def draw_cells(view: View, size: torch.Size, purpose: str, each: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw labelled cells of a grid h w: their places B m, labels B m and positions B m among the n cells.

    Every image gives at most `count` cells, and `each` of one class, in the order of `anchor_places`. m is `count`, or
    n if there are fewer. What is drawn beyond the labelled cells has the place `LAST` and the label 255.
    """
    label = label_cells(view, size).flatten(1)  # B n
    drawn = torch.stack([torch.randint(DRAWN, label.shape[1:], generator=g) for g in view.generators(purpose)])
    drawn = drawn.to(label.device, non_blocking=True)
    place, cell = anchor_places(label, torch.zeros_like(drawn, dtype=torch.bool), drawn, each).sort(dim=1, stable=True)
    place, cell = place[:, :count], cell[:, :count]  # B m
    return place, label.gather(1, cell).where(place < LAST, IGNORE), cell


def take_cells(features: Tensor, cell: Tensor) -> Tensor:
    """The features B D h w at positions B m of each image.  # B m D"""
    return features.flatten(2).movedim(1, 2).gather(1, cell[:, :, None].expand(-1, -1, features.shape[1]))
