"""Confusion counts and what follows from them: IoU, accuracy, the 16- and 13-class protocols. K classes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluda_cli.data.labels import IGNORE, PROTOCOLS, ClassTable


def histogram(values: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs among integers of any shape.  # int64 bins

    `bincount`, which on a GPU would read the largest value back and so wait.
    """
    values = values.flatten()
    if values.device.type == "cpu":
        return values.bincount(minlength=bins)
    ones = torch.ones(1, dtype=torch.int64, device=values.device).expand(len(values))
    return torch.zeros(bins, dtype=torch.int64, device=values.device).scatter_add_(0, values.long(), ones)


class Confusion:
    """Exact pixel counts, rows = label, columns = prediction.

    A network with more classes than the labels has more columns; predictions there are errors of the label's class.
    """

    def __init__(
        self, num_classes: int, num_predicted: int | None = None, device: torch.device | str | None = None
    ) -> None:
        self.counts = torch.zeros(num_classes, num_predicted or num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of one or more images; pixels labelled 255 are left out.

        Train ids of equal shape and any integer type: labels below the number of rows, or 255, predictions below
        the number of columns. The caller checks them, because on a GPU a check here would wait for the device, which
        nothing here does.
        """
        rows, columns = self.counts.shape
        pair = label.int() * columns + prediction  # also where ignored: cheaper than to select the others
        self.counts += histogram(pair, (IGNORE + 1) * columns).view(-1, columns)[:rows]

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, 0..1, float64; NaN where a class has neither label nor prediction."""
        intersect, label, prediction = self._areas()
        return intersect / (label + prediction - intersect)

    @property
    def accuracy(self) -> Tensor:
        """Share of each class's pixels that are right, 0..1, float64; NaN where a class has no label."""
        intersect, label, _ = self._areas()
        return intersect / label

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that are right, 0..1; NaN where nothing is labelled."""
        intersect, label, _ = self._areas()
        return float(intersect.sum() / label.sum())

    def _areas(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of each class that are right, that are labelled so, that are predicted so; float64 is exact here."""
        counts = self.counts.cpu().double()
        return counts.diagonal(), counts.sum(1), counts.sum(0)[: len(counts)]


@dataclass(frozen=True)
class Scores:
    """How well a network does on the labelled images of a split."""

    classes: ClassTable
    """The network's classes."""
    seen: tuple[str, ...]
    """Names of the classes that the source had."""
    defined: tuple[str, ...]
    """Names of the classes that the labels can have; others have no IoU."""
    confusion: Confusion
    """Over the network's classes."""
    images: int

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of the network's classes that the source never had."""
        return tuple(name for name in self.classes.names if name not in self.seen)

    @property
    def miou(self) -> float:
        """Mean IoU over the seen classes, percent; NaN where there is none."""
        return self._mean(self.confusion.iou, self.seen)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that are right, percent."""
        return 100 * self.confusion.pixel_accuracy

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes of `miou` of the share of their pixels that are right, percent."""
        return self._mean(self.confusion.accuracy, self.seen)

    def iou_by_name(self) -> dict[str, float]:
        """IoU of every class, percent; NaN where a class has none."""
        named = self._named(self.confusion.iou)
        return {name: 100 * value if name in self.defined else torch.nan for name, value in named}

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Per protocol the mean and the IoU of each class: percent, two decimals, None where there is none.

        "all" takes the seen classes, with the mean over all classes beside it. The 16- and 13-class protocols of
        SYNTHIA -> Cityscapes, for networks with the Cityscapes classes, average exactly the classes they name.
        """
        iou = self.confusion.iou
        everything = {"miou": percent(self.miou), "miou_with_unseen": percent(self._mean(iou, self.classes.names))}
        result = {"all": everything | {"classes": self._rounded(self.seen)}}
        for protocol, names in PROTOCOLS.items() if self.classes.is_cityscapes else ():
            result[protocol] = {"miou": percent(self._mean(iou, names)), "classes": self._rounded(names)}
        return result

    def _named(self, values: Tensor) -> list[tuple[str, float]]:
        return list(zip(self.classes.names, values.tolist(), strict=True))

    def _mean(self, values: Tensor, names: Collection[str]) -> float:
        """Mean over the named classes that have a value, percent."""
        chosen = [value for name, value in self._named(values) if name in names and name in self.defined]
        return 100 * float(torch.tensor(chosen, dtype=torch.float64).nanmean())

    def _rounded(self, names: Collection[str]) -> dict[str, float | None]:
        """IoU of the named classes; None for the others."""
        return {name: percent(value) if name in names else None for name, value in self.iou_by_name().items()}


def percent(value: float) -> float | None:
    """Two decimals, for people and JSON; NaN becomes None."""
    return None if value != value else round(value, 2)
