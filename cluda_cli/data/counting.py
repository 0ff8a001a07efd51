"""Count the ids in labels, uint8 of any shape. Imports no torch, which would start threads in each reading thread."""

import numpy as np
from numpy.typing import NDArray

from cluda_cli.data.labels import IGNORE

PIXELS_AT_ONCE = 2**24
"""Pixels that are counted at a time, to bound memory: `bincount` takes 8 bytes for each."""


def count_ids(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each of 0..255 occurs.  # int64 256"""
    parts = np.array_split(label.ravel(), max(-(-label.size // PIXELS_AT_ONCE), 1))
    counts: NDArray[np.int64] = np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)
    return counts


def count_pixels(train_ids: NDArray[np.uint8]) -> dict[int, int]:
    """Train id -> number of pixels, without ignored pixels and absent classes."""
    counts = count_ids(train_ids)
    return {int(i): int(counts[i]) for i in np.flatnonzero(counts) if i != IGNORE}
