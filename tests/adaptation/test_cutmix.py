"""Parts of a class, the rectangles around them, and images that are enlarged before they are pasted."""

from typing import Any

import pytest
import torch

from cluda_cli.adaptation.cutmix import choose_box, find_parts, label_parts, random_box, zoom
from cluda_cli.adaptation.mixing import class_mask, class_mix


@pytest.mark.reference
def test_boxes_of_the_reference(golden: Any) -> None:
    tensors, description = golden("21_ael/a07_adaptive_cutmix_box")
    share, cases = description["settings"]["area_threshold"], tensors["in.cases"].tolist()
    eligible = tensors["out.eligible_components"].tolist()
    for k, (number, train_id) in enumerate(cases):
        mask = tensors["in.predictions"][number] == train_id
        parts = find_parts(mask, share * mask.numel())
        assert sorted(parts) == sorted(tuple(row[1:5]) for row in eligible if row[0] == k)
        assert len(parts) == int(tensors["out.number_eligible"][k])
        row, column = tensors["in.drawn_component_pixel"][k].tolist()
        first = 0.0
        if parts:
            number_of_part = label_parts(mask)
            numbers = [
                n for n in number_of_part.unique().tolist() if n and (number_of_part == n).sum() > share * mask.numel()
            ]
            first = (numbers.index(int(number_of_part[row, column])) + 0.5) / len(parts)
        uniforms = [first, *tensors["in.drawn_uniforms"][k].tolist()]
        assert list(choose_box(mask, share, uniforms)) == tensors["out.box"][k].tolist()


@pytest.mark.reference
def test_random_boxes_of_the_reference(golden: Any) -> None:
    tensors, _ = golden("21_ael/a08_random_rectangle")
    sizes = {f"out.rectangles_{n}": (n, n) for n in tensors["in.sizes"].tolist()}
    for name, size in (sizes | {"out_consistent.rectangles_64x128": (64, 128)}).items():
        found = [list(random_box(size, uniforms)) for uniforms in tensors["in.uniforms"].tolist()]
        assert found == tensors[name].tolist(), name


def test_parts_are_connected_by_corners_too_and_may_wind() -> None:
    rows = [
        "##.......#",
        "..#.####.#",
        "....#..#.#",
        "###.#.##.#",
        "....#....#",
        "....######",
    ]  # fmt: skip
    mask = torch.tensor([[cell == "#" for cell in row] for row in rows])
    assert sorted(find_parts(mask, 0)) == [(0, 0, 2, 3), (0, 4, 6, 10), (3, 0, 4, 3)]
    assert find_parts(mask, 3) == [(0, 4, 6, 10)]
    assert find_parts(torch.zeros(4, 4, dtype=torch.bool), 0) == []


def test_a_spiral_is_one_part() -> None:
    mask = torch.zeros(41, 41, dtype=torch.bool)
    row, column, length, way = 0, 0, 40, (0, 1)
    mask[0, 0] = True
    while length > 0:
        for _ in range(length):
            row, column = row + way[0], column + way[1]
            mask[row, column] = True
        way = (way[1], -way[0])
        length -= 1 if way[0] else 2
    assert len(label_parts(mask).unique()) == 2


def test_without_a_large_part_the_box_is_random() -> None:
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[3, 4] = True
    assert choose_box(mask, 0.005, [0.0, 0.5, 0.5, 0.5]) == random_box((20, 40), [0.5, 0.5, 0.5])
    assert choose_box(mask, 0.0, [0.99, 0.5, 0.5, 0.5]) == (3, 4, 4, 5)


@pytest.mark.reference
def test_copied_classes_of_the_reference(golden: Any) -> None:
    """The last image gets none."""
    tensors, description = golden("21_ael/a10_copy_paste")
    chosen = torch.zeros(2, 256, dtype=torch.bool)
    chosen[0, description["settings"]["classes"]] = True
    label, other = tensors["in.labels"].long(), tensors["in.paste_labels"].long()
    pasted = class_mask(other, chosen)
    image, mixed, _ = class_mix(
        tensors["in.paste_image"], other, tensors["in.image"], label, torch.ones(2, 16, 20), pasted
    )
    assert torch.equal(image, tensors["out.image"]) and torch.equal(mixed, tensors["out.labels"].long())


def test_zoom_moves_image_and_label_alike() -> None:
    """Twice as large at the upper left corner, half as large at the lower right one, as it is."""
    row, column = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    label = (row // 4 * 3 + column // 4).expand(3, 8, 12)
    image = label[:, None].float().expand(3, 3, 8, 12)
    scale, shift = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.3, 0.7]])
    shown, moved = zoom(image, label, scale, shift)
    assert moved[0].unique().tolist() == [0, 1] and (moved[0, :, :8] == 0).all()
    assert (moved[1, 4:, 6:] == label[1, ::2, ::2]).all()
    assert (moved[1, :4] == 255).all() and (moved[1, :, :6] == 255).all() and not shown[1, :, :4].any()
    assert torch.equal(moved[2], label[2])
    torch.testing.assert_close(shown[2], image[2])
    inner = moved[0, 1:-1, 1:7]
    torch.testing.assert_close(shown[0, 0, 1:-1, 1:7], inner.float())
