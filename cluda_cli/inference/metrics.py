"""Confusion counts and the scores computed from them: IoU, accuracy, the 16- and 13-class protocols. K classes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluda_cli.data.labels import IGNORE, PROTOCOLS, ClassTable

PIXELS_AT_ONCE = 2**24  # counted at a time, to bound memory


def count_values(values: Tensor, bins: int) -> Tensor:
    """Count how often each of 0..bins-1 occurs among integers of any shape.  # int64 bins

    On a GPU, `bincount` would wait for the device, to read the largest value. `scatter_add_` does not wait.
    """
    values = values.flatten()
    if values.device.type == "cpu":
        return values.bincount(minlength=bins)
    ones = torch.ones(1, dtype=torch.int64, device=values.device).expand(len(values))
    return torch.zeros(bins, dtype=torch.int64, device=values.device).scatter_add_(0, values.long(), ones)


class Confusion:
    """Exact pixel counts, rows = label, columns = prediction.

    If the network has more classes than the labels, there are more columns than rows. Predictions of the further
    classes are errors of the labelled class.
    """

    def __init__(
        self, num_classes: int, num_predicted: int | None = None, device: torch.device | str | None = None
    ) -> None:
        self.counts = torch.zeros(num_classes, num_predicted or num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of one or more images, except those labelled 255.

        Both are train ids of one shape and any integer type. Labels are below the number of rows, or 255. Predictions
        are below the number of columns. The caller checks this, because a check here would wait for a GPU.
        """
        rows, columns = self.counts.shape
        parts = (tensor.flatten().split(PIXELS_AT_ONCE) for tensor in (prediction, label))
        for found, true in zip(*parts, strict=True):
            pair = true.int() * columns + found  # counts ignored pixels too: cheaper than selecting the others
            self.counts += count_values(pair, (IGNORE + 1) * columns).view(-1, columns)[:rows]

    def only_labelled(self, chosen: Sequence[bool]) -> "Confusion":
        """The counts without the pixels whose label is not among the chosen rows."""
        kept = Confusion(*self.counts.shape, device=self.counts.device)
        kept.counts += self.counts * torch.tensor(chosen, device=self.counts.device)[:, None]
        return kept

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, 0..1, float64; NaN where a class has neither label nor prediction."""
        intersect, label, prediction = self._areas()
        return intersect / (label + prediction - intersect)

    @property
    def accuracy(self) -> Tensor:
        """Share of each class's labelled pixels that are predicted right, 0..1, float64; NaN without such pixels."""
        intersect, label, _ = self._areas()
        return intersect / label

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that are predicted right, 0..1; NaN without labelled pixels."""
        intersect, label, _ = self._areas()
        return float(intersect.sum() / label.sum())

    def _areas(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per class, the number of pixels predicted right, labelled, and predicted. float64 holds these exactly."""
        counts = self.counts.cpu().double()
        return counts.diagonal(), counts.sum(1), counts.sum(0)[: len(counts)]


@dataclass(frozen=True)
class Scores:
    """Scores of a network on the labelled images of a split.

    Common classes are those that source labels show and the dataset has. Target-private classes are those that the
    dataset has and source labels never show: the network cannot have learned them, so a pixel of one is an error of the
    class that takes it (the terms of open-set domain adaptation).
    """

    classes: ClassTable
    """The network's classes."""
    seen: tuple[str, ...]
    """Names of the classes that occur in the source labels."""
    defined: tuple[str, ...]
    """Names of the dataset's classes. Other classes of the network have no IoU."""
    confusion: Confusion
    """Both axes are `names`."""
    images: int

    @property
    def names(self) -> tuple[str, ...]:
        """The network's classes, then those that only the dataset has."""
        return self.classes.names + tuple(name for name in self.defined if name not in self.classes.names)

    @property
    def target_private(self) -> tuple[str, ...]:
        """Names of the classes that have labelled pixels here, but none in the source."""
        return tuple(name for name, pixels in self._label_counts() if pixels and name not in self.seen)

    @property
    def common_pixels(self) -> int:
        """Number of pixels that are labelled with a common class."""
        return sum(pixels for name, pixels in self._label_counts() if name in self.seen)

    @property
    def never_predicted(self) -> tuple[str, ...]:
        """Names of the common classes that have labelled pixels here, of which not one pixel is predicted."""
        predicted = dict(zip(self.names, self.confusion.counts.sum(0).tolist(), strict=False))
        return tuple(n for n, pixels in self._label_counts() if pixels and n in self.seen and not predicted[n])

    @property
    def miou(self) -> float:
        """Mean IoU over the common classes, percent; NaN if none of them has one. Every labelled pixel counts."""
        return self._average(self.confusion.iou, self.seen)

    @property
    def miou_common_pixels(self) -> float:
        """`miou` without the pixels of target-private classes."""
        return self._average_common(self.seen)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that are predicted right, percent."""
        return 100 * self.confusion.pixel_accuracy

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over the common classes, percent."""
        return self._average(self.confusion.accuracy, self.seen)

    def iou_by_name(self) -> dict[str, float]:
        """IoU of each of the network's classes, percent; NaN for a class without one. Every labelled pixel counts."""
        values = dict(self._pair_with_names(self.confusion.iou))
        return {name: 100 * values[name] if name in self.defined else torch.nan for name in self.classes.names}

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Mean IoU and IoU of each class by protocol: percent, two decimals; None where there is none.

        The protocol "all" averages the common classes, and as `miou_all_classes` all classes of the dataset. A network
        with the Cityscapes classes also gets the 16- and 13-class protocols of SYNTHIA -> Cityscapes. Each averages
        exactly the classes that it names. Of each, `miou_common_pixels` leaves out the pixels of target-private classes
        that it does not name.
        """
        result = {"all": self._means(self.seen)}
        result["all"] |= {"miou_all_classes": round_percent(self._average(self.confusion.iou, self.names))}
        result["all"] |= {"iou": self._round_iou(self.seen)}
        for protocol, names in PROTOCOLS.items() if self.classes.is_cityscapes else ():
            result[protocol] = self._means(names) | {"iou": self._round_iou(names)}
        return result

    def _means(self, names: Collection[str]) -> dict[str, Any]:
        miou = round_percent(self._average(self.confusion.iou, names))
        return {"miou": miou, "miou_common_pixels": round_percent(self._average_common(names))}

    def _average_common(self, names: Collection[str]) -> float:
        """Mean IoU over the named classes, without the pixels of other classes that the source never shows."""
        confusion = self.confusion.only_labelled([name in names or name in self.seen for name in self.names])
        return self._average(confusion.iou, names)

    def _label_counts(self) -> list[tuple[str, int]]:
        return list(zip(self.names, self.confusion.counts.sum(1).tolist(), strict=True))

    def _pair_with_names(self, values: Tensor) -> list[tuple[str, float]]:
        return list(zip(self.names, values.tolist(), strict=True))

    def _average(self, values: Tensor, names: Collection[str]) -> float:
        """Mean over the named classes that have a value, percent."""
        chosen = [value for name, value in self._pair_with_names(values) if name in names and name in self.defined]
        return 100 * float(torch.tensor(chosen, dtype=torch.float64).nanmean())

    def _round_iou(self, names: Collection[str]) -> dict[str, float | None]:
        """IoU of the named classes, percent, two decimals; None for the other classes."""
        return {name: round_percent(value) if name in names else None for name, value in self.iou_by_name().items()}


def round_percent(value: float) -> float | None:
    """Round a percentage to two decimals; NaN becomes None, which JSON can hold."""
    return None if value != value else round(value, 2)
