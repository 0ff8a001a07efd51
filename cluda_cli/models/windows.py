"""Windows that slide over images, and the mean of their logits.

B images, n windows in one batch, C channels, K classes, H W pixels of an image, h w pixels of a window. A cell is one
position of the logits, `cell` pixels high and wide.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cluda_cli.models.boxes import Size


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis: every `stride` pixels. The last window is moved back to end with the axis."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def window_corners(size: Size, window: Size, stride: Size) -> list[Size]:
    """Top and left of every window on an image of `size`, row by row."""
    rows, columns = (window_starts(*axis) for axis in zip(size, window, stride, strict=True))
    return [(top, left) for top in rows for left in columns]


def average_windows(
    images: Tensor,
    window: Size,
    stride: Size,
    compute_logits: Callable[[Tensor], Tensor],
    *,
    windows_at_once: int | None = None,
    cell: int = 1,
) -> Tensor:
    """Mean of the logits of all windows that cover a cell.  # B C H W -> B K H/cell W/cell

    A window larger than the image is clipped to it. `stride` and all sizes are multiples of `cell`. `compute_logits`
    turns windows n C h w into logits n K h/cell w/cell. It gets at most `windows_at_once` windows in one call, which
    bounds memory; None means all windows. They come in the order of `window_corners`, each from all images before the
    next, so the logits of an image are added in the same order whatever the batch. The mean of an image depends on the
    other images by the rounding of `compute_logits` alone: a convolution may round batches of other sizes differently.
    """
    (high, wide), grid = window, (images.shape[2] // cell, images.shape[3] // cell)
    corners = window_corners((images.shape[2], images.shape[3]), window, stride)
    places = [(i, top, left) for top, left in corners for i in range(len(images))]
    at_once = windows_at_once or len(places)
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        logits = compute_logits(torch.stack([images[i, :, y : y + high, x : x + wide] for i, y, x in part]))
        if start == 0:
            total, count = logits.new_zeros(len(images), logits.shape[1], *grid), logits.new_zeros(grid)
        rows, columns = logits.shape[2:]
        for (i, top, left), one in zip(part, logits, strict=True):
            cells = (slice(top // cell, top // cell + rows), slice(left // cell, left // cell + columns))
            total[i, :, *cells] += one
            if i == 0:
                count[cells] += 1
    return total / count
