"""Crop boxes. B batch, C channels, H W of the whole, h w of a box."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.models.boxes import Boxes, random_boxes

SIZE = (12, 20)
BOXES = Boxes(torch.tensor([[0, 0], [3, 7], [8, 14]]), (4, 6))  # the first and the last touch the border
SLICES = [(slice(0, 4), slice(0, 6)), (slice(3, 7), slice(7, 13)), (slice(8, 12), slice(14, 20))]


def images(channels: int = 2) -> Tensor:
    return torch.arange(1, 3 * channels * 240 + 1).view(3, channels, *SIZE)


def test_crop_takes_the_box_of_each_image() -> None:
    whole = images()
    parts, labels = BOXES.crop(whole), BOXES.crop(whole[:, 0])
    assert parts.shape == (3, 2, 4, 6) and labels.shape == (3, 4, 6)
    for b, (rows, columns) in enumerate(SLICES):
        assert torch.equal(parts[b], whole[b, :, rows, columns])
        assert torch.equal(labels[b], whole[b, 0, rows, columns])


@pytest.mark.parametrize("channels", [1, 2])
def test_paste_puts_each_map_at_its_box_on_zeros(channels: int) -> None:
    parts = images(channels)[:, :, :4, :6]
    whole = BOXES.paste(parts, SIZE)
    assert whole.shape == (3, channels, *SIZE) and whole.dtype == parts.dtype
    expected = torch.zeros_like(images(channels))
    for b, (rows, columns) in enumerate(SLICES):
        expected[b, :, rows, columns] = parts[b]
    assert torch.equal(whole, expected)


def test_crop_paste_and_inside_agree() -> None:
    whole, inside = images(), BOXES.inside(SIZE)
    assert inside.shape == (3, *SIZE) and inside.dtype == torch.bool and inside.sum() == 3 * 24
    assert torch.equal(BOXES.paste(BOXES.crop(whole), SIZE), whole * inside[:, None])
    parts = BOXES.crop(whole)
    assert torch.equal(BOXES.crop(BOXES.paste(parts, SIZE)), parts)
    assert BOXES.crop(inside).all()


def test_paste_and_crop_hand_gradients_through() -> None:
    parts = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, *SIZE, dtype=torch.float64)
    (BOXES.paste(parts, SIZE) * weight).sum().backward()
    assert parts.grad is not None and torch.equal(parts.grad, BOXES.crop(weight))
    whole = torch.randn(3, 2, *SIZE, dtype=torch.float64, requires_grad=True)
    BOXES.crop(whole).square().sum().backward()
    assert whole.grad is not None
    assert torch.equal(whole.grad, BOXES.paste(2 * BOXES.crop(whole.detach()), SIZE))


def test_boxes_in_cells() -> None:
    boxes = Boxes(torch.tensor([[16, 40], [0, 8]]), (64, 32))
    cells = boxes.over(8)
    assert cells.corner.tolist() == [[2, 5], [0, 1]] and cells.size == (8, 4)
    assert cells.corner.dtype == torch.int64
    assert boxes.over(4).corner.tolist() == [[4, 10], [0, 2]] and boxes.over(4).size == (16, 8)
    fine = boxes.inside((96, 96))
    assert torch.equal(fine[:, ::8, ::8], cells.inside((12, 12)))


def test_boxes_of_some_images() -> None:
    part = BOXES.part(slice(1, 3))
    assert part.corner.tolist() == [[3, 7], [8, 14]] and part.size == (4, 6)
    assert torch.equal(part.crop(images()[1:]), BOXES.crop(images())[1:])


@pytest.mark.parametrize(("image", "size"), [((1024, 1024), (512, 512)), ((128, 160), (64, 64)), ((96, 96), (96, 96))])
def test_every_aligned_position_that_fits_is_drawn(image: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.stack([random_boxes(1, image, size, 8, generator).corner[0] for _ in range(1500)])
    for axis, (whole, part) in enumerate(zip(image, size, strict=True)):
        assert corners[:, axis].unique().tolist() == list(range(0, whole - part + 1, 8))


def test_positions_are_drawn_uniformly_and_independently() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [random_boxes(1, (24, 32), (16, 16), 8, generator).corner[0] for _ in range(3000)]
    cells = torch.stack(drawn) // 8  # rows 0-1, columns 0-2
    counts = (3 * cells[:, 0] + cells[:, 1]).bincount(minlength=6)
    assert len(counts) == 6
    assert (counts - 500).square().sum() / 500 < 20.5  # chi-squared, 5 degrees of freedom: 0.1 %


def test_one_place_for_the_whole_batch_from_the_given_generator_alone() -> None:
    before = torch.get_rng_state()
    boxes, again = (random_boxes(3, (64, 96), (16, 24), 8, torch.Generator().manual_seed(5)) for _ in range(2))
    assert boxes.corner.shape == (3, 2) and boxes.corner.dtype == torch.int64 and boxes.size == (16, 24)
    assert torch.equal(boxes.corner, boxes.corner[:1].expand(3, 2)) and torch.equal(boxes.corner, again.corner)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("multiple", [8, 16])
def test_positions_are_multiples(multiple: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        corner = random_boxes(1, (100, 200), (48, 64), multiple, generator).corner[0]
        assert torch.all(corner % multiple == 0) and corner[0] + 48 <= 100 and corner[1] + 64 <= 200


@pytest.mark.reference
def test_reference_positions(golden: Any) -> None:
    _, description = golden("05_hrda/crop_boxes")
    for case, offsets in description["attainable"].items():
        image, crop = case.split(" crop ")
        length, part = int(image.split("x")[0]), int(crop.split()[0])
        # The published code never draws the last position; there it is one of several, if it is not the only one.
        expected = offsets["y_offsets"] if length == part else [*offsets["y_offsets"], length - part]
        generator = torch.Generator().manual_seed(0)
        drawn = {int(random_boxes(1, (length, part), (part, part), 8, generator).corner[0, 0]) for _ in range(1000)}
        assert sorted(drawn) == expected
