"""Which pixels a contrast compares, and in which tiles.

Sorted by class, pairs of one class and pairs of two are rectangles, and no pair is computed in vain; but the sizes of
the classes decide the shapes, so the host has to know them. That costs nothing on a CPU. A GPU would have to be waited
for, so there every tile holds all pairs, shapes depend on the number of pixels alone, and masks say which pairs count:
twice the products, but no look at the device.

Legend: N pixels, n of them taken, D channels, R products in the weight of a pair, i j k slices of the n pixels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cluda_cli.data.labels import IGNORE


@dataclass(frozen=True)
class Pairs(ABC):
    """Pixels as anchors and as what they are compared with.

    The similarity of a pair is anchors_i . others_j, and its weight left_i . right_j, where each column of `right` is
    plus or minus that of `left`. Where `others` is `anchors`, similarity is symmetric.
    """

    anchors: Tensor  # n D
    others: Tensor  # n D
    left: Tensor  # n R
    right: Tensor  # n R
    tile: int  # side of a tile, at most

    @property
    def symmetric(self) -> bool:
        return self.others is self.anchors

    def similarity(self, i: slice, j: slice) -> Tensor:  # i j
        return self.anchors[i] @ self.others[j].T

    @abstractmethod
    def within(self) -> Iterator[tuple[slice, slice, bool]]:
        """Tiles that cover every pair of pixels of one class.

        With each comes whether its numbers also stand for the same pairs in the opposite order. A tile on the diagonal
        (i = j) holds both orders anyway.
        """

    @abstractmethod
    def across(self) -> Iterator[tuple[slice, slice]]:
        """Tiles that cover every pair of pixels of different classes, in one order if similarity is symmetric; but a
        tile on the diagonal holds both."""

    @abstractmethod
    def positives(self, i: slice, j: slice) -> Tensor:
        """Similarities in a tile of `within`, infinite where a pair is none of positives: that costs it nothing."""

    @abstractmethod
    def negatives(self, i: slice, k: slice) -> Tensor:
        """Exponentials of similarities in a tile of `across`, 0 where a pair is none of negatives."""


@dataclass(frozen=True)
class SortedPairs(Pairs):
    """Of pixels in order of class."""

    classes: list[slice]  # one after another, from 0 to n

    def within(self) -> Iterator[tuple[slice, slice, bool]]:
        for run in self.classes:
            for i in _chunks(run.start, run.stop, self.tile):
                for j in _chunks(i.start if self.symmetric else run.start, run.stop, self.tile):
                    yield i, j, self.symmetric and i != j

    def across(self) -> Iterator[tuple[slice, slice]]:
        for run in self.classes:
            for i in _chunks(run.start, run.stop, self.tile):
                for j in _chunks(0, 0 if self.symmetric else run.start, self.tile):
                    yield i, j
                for j in _chunks(run.stop, len(self.anchors), self.tile):
                    yield i, j

    def positives(self, i: slice, j: slice) -> Tensor:
        similarity = self.similarity(i, j)
        return similarity.fill_diagonal_(torch.inf) if i == j else similarity  # no pixel is a positive of itself

    def negatives(self, i: slice, k: slice) -> Tensor:
        return self.similarity(i, k).exp_()


@dataclass(frozen=True)
class MaskedPairs(Pairs):
    """Of pixels in any order, all tiles of nearly one shape."""

    label: Tensor  # n, train ids, 255 = ignored

    def within(self) -> Iterator[tuple[slice, slice, bool]]:
        for i, j in self.across():
            yield i, j, self.symmetric and i != j

    def across(self) -> Iterator[tuple[slice, slice]]:
        length = len(self.anchors)
        size = math.ceil(length / math.ceil(length / self.tile))
        for i in _chunks(0, length, size):
            for j in _chunks(i.start if self.symmetric else 0, length, size):
                yield i, j

    def positives(self, i: slice, j: slice) -> Tensor:
        similarity = self.similarity(i, j)
        similarity.masked_fill_((self.label[i, None] != self.label[j]) | self._ignored(i, j), torch.inf)
        return similarity.fill_diagonal_(torch.inf) if i == j else similarity

    def negatives(self, i: slice, k: slice) -> Tensor:
        neither = (self.label[i, None] == self.label[k]) | self._ignored(i, k)
        return self.similarity(i, k).exp_().masked_fill_(neither, 0)

    def _ignored(self, i: slice, j: slice) -> Tensor:  # i j
        return (self.label[i, None] == IGNORE) | (self.label[j] == IGNORE)


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


class Choice(ABC):
    """The labelled ones of N pixels."""

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """Their rows: N ... -> n ..., a copy."""

    @abstractmethod
    def add(self, rows: Tensor, total: Tensor) -> None:
        """Add rows n ... to theirs in N ...."""

    @abstractmethod
    def root_shares(self, dtype: torch.dtype) -> Tensor:
        """Square root of the share of a pair in the value, 1 / n max(1, |P_i|), N, where n are the labelled pixels and
        P_i the other ones of the class of i: both pixels of a pair carry it."""

    @abstractmethod
    def pairs(self, anchors: Tensor, others: Tensor, left: Tensor, right: Tensor, tile: int) -> Pairs:
        """All pairs of what was taken: rows n D twice and weights n R twice."""


@dataclass(frozen=True)
class Sorted(Choice):
    """Taken class by class; the largest class comes first.

    That order leaves the thin tiles of small classes short: they pair with smaller classes only.
    """

    order: Tensor  # n, into the N pixels
    classes: list[slice]
    length: int  # N

    @classmethod
    def of(cls, label: Tensor) -> Self:
        sorted_label, order = label.sort(stable=True)
        ids = torch.arange(IGNORE, device=label.device, dtype=label.dtype)
        ends = torch.searchsorted(sorted_label, ids, right=True).tolist()
        runs = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]
        runs.sort(key=lambda run: run.start - run.stop)
        classes: list[slice] = []
        for run in runs:
            start = classes[-1].stop if classes else 0
            classes.append(slice(start, start + run.stop - run.start))
        return cls(torch.cat([order[run] for run in runs] or [order[:0]]), classes, len(label))

    def take(self, rows: Tensor) -> Tensor:
        return rows[self.order]

    def add(self, rows: Tensor, total: Tensor) -> None:
        total[self.order] += rows

    def root_shares(self, dtype: torch.dtype) -> Tensor:
        shares = torch.zeros(self.length, dtype=dtype, device=self.order.device)
        for run in self.classes:
            shares[self.order[run]] = (len(self.order) * max(1, run.stop - run.start - 1)) ** -0.5
        return shares

    def pairs(self, anchors: Tensor, others: Tensor, left: Tensor, right: Tensor, tile: int) -> SortedPairs:
        return SortedPairs(anchors, others, left, right, tile, self.classes)


@dataclass(frozen=True)
class Masked(Choice):
    """All taken in their order, the rows of ignored ones as zeros; n = N."""

    label: Tensor  # N

    def take(self, rows: Tensor) -> Tensor:
        ignored = self.label == IGNORE
        return rows.masked_fill(ignored[:, None] if rows.dim() > 1 else ignored, 0)

    def add(self, rows: Tensor, total: Tensor) -> None:
        total += rows

    def root_shares(self, dtype: torch.dtype) -> Tensor:
        ids, ones = self.label.long(), torch.ones_like(self.label, dtype=torch.int64)
        sizes = torch.zeros(IGNORE + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, ones)  # by train id
        pairs = (len(ids) - sizes[IGNORE]) * (sizes - 1).clamp_min(1)
        shares = pairs.to(dtype).rsqrt()
        shares[IGNORE].zero_()
        return shares[ids]

    def pairs(self, anchors: Tensor, others: Tensor, left: Tensor, right: Tensor, tile: int) -> MaskedPairs:
        return MaskedPairs(anchors, others, left, right, tile, self.label)
