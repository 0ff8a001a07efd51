"""What one step learns from: a mapping of named crops. B batch, H W pixels of the crop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Crops:
    """Crops of one kind. A crop of an image that is smaller than the crop is padded at the bottom and the right."""

    image: Tensor  # B 3 H W, uint8 RGB, 0 on padding
    inside: Tensor  # B H W, bool, False on padding
    label: Tensor | None = None  # B H W, uint8 train ids, 255 = ignore, also on padding; None: without labels
    valid: Tensor | None = None  # B H W, bool, where pseudo-labels count: inside and not in the margins of the frame

    @classmethod
    def stack(cls, crops: Sequence[Self]) -> Self:
        """A batch of single crops, whose tensors lack B."""
        return cls(*(None if one[0] is None else torch.stack(one) for one in zip(*map(_values, crops), strict=True)))

    def to(self, device: torch.device) -> Self:
        """Copy to a device; a copy of pinned memory to a GPU does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory; the loader calls it."""
        return self._map(Tensor.pin_memory)

    def select(self, images: Tensor) -> Self:
        """The crops at the positions `images`, int64."""
        return self._map(lambda tensor: tensor[images])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*(None if value is None else function(value) for value in _values(self)))


def _values(crops: Crops) -> list[Tensor | None]:
    return [getattr(crops, field.name) for field in fields(crops)]


Batch = Mapping[str, Crops]
"""By name: `target` with `valid`; with labels, where a run has them, `source` and `labelled`, some target images."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device."""
    return {name: crops.to(device) for name, crops in batch.items()}
