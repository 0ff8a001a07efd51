"""Weights of classes in the cross-entropy. K classes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_weights(frequencies: Sequence[float], exponent: float) -> Tensor:
    """Weight of a pixel of each class: its frequency to the power of minus `exponent`, scaled to a mean of 1 per pixel.

    `frequencies` (K) are shares of pixels and sum to 1; the mean is over pixels that are distributed like them. Classes
    without pixels weigh as much as the rarest class that has some.  # float32 K
    """
    frequency = torch.tensor(frequencies, dtype=torch.float64)
    weight = frequency.clamp(min=frequency[frequency > 0].min()) ** -exponent
    return (weight / (weight * frequency).sum()).float()
