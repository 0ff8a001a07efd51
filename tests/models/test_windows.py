"""Sliding windows. B images, C channels, K classes, H W pixels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.models.windows import average_windows, window_corners, window_starts

K = 4


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (1920, 1024, 512, [0, 512, 896]),  # ACDC
        (1080, 1024, 512, [0, 56]),
        (2048, 1024, 512, [0, 512, 1024]),  # Cityscapes
        (1024, 1024, 512, [0]),
        (1025, 1024, 512, [0, 1]),
        (500, 1024, 512, [0]),
        (10, 4, 4, [0, 4, 6]),
    ],
)
def test_windows_start_every_stride_and_end_with_the_image(
    length: int, window: int, stride: int, starts: list[int]
) -> None:
    assert window_starts(length, window, stride) == starts


@pytest.mark.parametrize(("length", "window", "stride"), [(17, 5, 3), (64, 16, 8), (5, 5, 1), (20, 6, 6)])
def test_windows_cover_every_position_and_lie_inside(length: int, window: int, stride: int) -> None:
    starts = window_starts(length, window, stride)
    covered = {position for start in starts for position in range(start, start + window)}
    assert covered == set(range(length)) and len(set(starts)) == len(starts)


def test_window_corners_go_row_by_row() -> None:
    assert window_corners((10, 9), (4, 4), (4, 5)) == [(0, 0), (0, 5), (4, 0), (4, 5), (6, 0), (6, 5)]
    assert window_corners((4, 4), (4, 4), (2, 2)) == [(0, 0)]


@pytest.mark.reference
def test_reference_windows(golden: Any) -> None:
    _, description = golden("05_hrda/crop_boxes")
    for image, expected in description["sliding_boxes"].items():
        height, width = (int(side) for side in image.split("x"))
        high, wide = min(64, height), min(64, width)
        corners = window_corners((height, width), (high, wide), (32, 32))
        assert [[y, y + high, x, x + wide] for y, x in corners] == expected


def make_images(height: int, width: int, count: int = 3) -> Tensor:
    return torch.randn(count, 2, height, width, generator=torch.Generator().manual_seed(0))


def logits_of(windows: Tensor, cell: int) -> Tensor:
    """Logits that depend on the position in the window. Each is one product, equal in batches of every size."""
    cells = windows[:, :1, ::cell, ::cell]
    ramp = torch.arange(1.0, cells[0, 0].numel() + 1).view(cells.shape[2:])
    return cells * ramp * torch.tensor([1.0, -2.0, 4.0, 0.5])[:, None, None]


@pytest.mark.parametrize("windows_at_once", [1, 4, 5, None])
@pytest.mark.parametrize(
    ("size", "window", "stride", "cell"),
    [
        ((20, 28), (8, 12), (4, 6), 1),
        ((21, 29), (8, 12), (4, 6), 1),  # the last windows are moved back
        ((5, 30), (8, 12), (4, 6), 1),  # clipped to 5 x 12
        ((5, 7), (8, 12), (4, 6), 1),  # one window
        ((24, 32), (8, 16), (4, 8), 4),
        ((20, 32), (16, 16), (8, 8), 4),
    ],
)
def test_mean_is_that_of_a_plain_loop(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], cell: int, windows_at_once: int | None
) -> None:
    images = make_images(*size)
    high, wide = min(window[0], size[0]), min(window[1], size[1])
    total = torch.zeros(len(images), K, size[0] // cell, size[1] // cell)
    count = torch.zeros(size[0] // cell, size[1] // cell)
    for y, x in window_corners(size, (high, wide), stride):
        cells = (..., slice(y // cell, (y + high) // cell), slice(x // cell, (x + wide) // cell))
        total[cells] += logits_of(images[..., y : y + high, x : x + wide], cell)
        count[cells] += 1
    batches: list[int] = []

    def compute_logits(windows: Tensor) -> Tensor:
        batches.append(len(windows))
        return logits_of(windows, cell)

    mean = average_windows(images, window, stride, compute_logits, windows_at_once=windows_at_once, cell=cell)
    assert torch.equal(mean, total / count)
    assert sum(batches) == 3 * len(window_corners(size, window, stride))
    assert max(batches) == min(windows_at_once or sum(batches), sum(batches))


def test_windows_come_corner_by_corner_and_in_each_image_by_image() -> None:
    images, seen = make_images(4, 6, count=2), []

    def compute_logits(windows: Tensor) -> Tensor:
        seen.append(windows)
        return windows

    average_windows(images, (4, 4), (4, 2), compute_logits, windows_at_once=3)
    assert torch.equal(torch.cat(seen), torch.cat([images[..., :4], images[..., 2:]]))


def test_the_mean_has_the_type_of_the_logits_and_hands_gradients_back() -> None:
    images = make_images(8, 8).requires_grad_()
    mean = average_windows(images, (4, 4), (2, 2), Tensor.double)
    assert mean.dtype == torch.float64
    mean.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.ones_like(images))
