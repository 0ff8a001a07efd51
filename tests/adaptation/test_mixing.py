"""Class choice and class mix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.adaptation.mixing import choose_classes, class_mask, class_mix


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def label_of(*images: list[int]) -> Tensor:
    """One row of pixels per image."""
    return torch.tensor(images, dtype=torch.int64)[:, None]


@pytest.mark.parametrize(("values", "count"), [([4], 1), ([4, 9], 1), ([0, 4, 9], 2), ([0, 4, 9, 255], 2)])
def test_half_of_the_classes_rounded_up(values: list[int], count: int) -> None:
    label = label_of((values * 4)[:4], [values[0]] * 4)
    for seed in range(20):
        chosen = choose_classes(label, generators(len(label), seed))
        assert chosen.shape == (2, 256) and chosen.dtype == torch.bool
        assert chosen.sum(dim=1).tolist() == [count, count]
        assert set(chosen.nonzero()[:, 1].tolist()) <= set(values)


def test_classes_are_those_of_the_whole_batch() -> None:
    label = label_of([1, 1], [2, 255])
    sets = {
        tuple(image.nonzero().flatten().tolist())
        for s in range(50)
        for image in choose_classes(label, generators(2, s))
    }
    assert sets == {(1, 2), (1, 255), (2, 255)}


def test_every_class_is_chosen_half_the_time_and_images_differ() -> None:
    label = label_of([0, 3, 7], [11, 18, 255])
    drawn = [choose_classes(label, generators(2, s)) for s in range(2000)]
    chosen = torch.stack(drawn)[:, :, label.flatten()].float()
    assert torch.all((chosen.mean(dim=0) - 0.5).abs() < 0.05)  # 4.5 standard deviations
    first, second = chosen[:, 0], chosen[:, 1]
    assert torch.all(
        ((first * second).mean(dim=0) - 0.25).abs() < 0.05
    )  # independent, hence neither equal nor opposite
    assert len({tuple(row.tolist()) for row in first}) == 20  # three of six: every set occurs


def test_choice_does_not_depend_on_how_often_or_where_a_class_occurs() -> None:
    few = choose_classes(label_of([0, 1, 2, 2], [2, 2, 2, 2]), generators(2))
    many = choose_classes(label_of([2, 2, 1, 1], [1, 0, 0, 0]), generators(2))
    assert torch.equal(few, many)


def test_mask_shows_the_chosen_classes_of_each_image() -> None:
    chosen = torch.zeros(2, 256, dtype=torch.bool)
    chosen[0, [1, 255]] = True
    chosen[1, 2] = True
    mask = class_mask(label_of([0, 1, 2, 255], [0, 1, 2, 255]), chosen)
    assert mask.tolist() == [[[False, True, False, True]], [[False, False, True, False]]]


def test_bytes_and_integers_choose_alike() -> None:
    label = label_of([0, 5, 255], [7, 7, 8])
    assert torch.equal(choose_classes(label, generators(2)), choose_classes(label.byte(), generators(2)))


@pytest.mark.reference
def test_masks_of_recorded_choices(golden: Any) -> None:
    tensors, description = golden("08_strong/class_masks")
    for case in description["settings"]["cases"]:
        label = tensors[f"in.{case['labels']}.labels"][:, 0]
        chosen = torch.zeros(2, 256, dtype=torch.bool)
        for image in (0, 1):
            chosen[image, case[f"chosen_classes_image{image}"]] = True
        assert chosen.sum(dim=1).tolist() == choose_classes(label, generators(2)).sum(dim=1).tolist()
        expected = tensors[f"out.{case['labels']}.seed{case['numpy_seed']}.mask"][:, 0]
        assert torch.equal(class_mask(label, chosen), expected.bool())


@pytest.mark.reference
def test_mix_as_the_reference(golden: Any) -> None:
    tensors, _ = golden("08_strong/class_mix")
    label, mask = tensors["in.source_labels"][:, 0].long(), tensors["in.mask"][:, 0].bool()
    chosen = torch.zeros(2, 256, dtype=torch.bool)
    for i in range(2):
        chosen[i, label[i][mask[i]]] = True
    assert torch.equal(class_mask(label, chosen), mask)
    image, mixed, weight = class_mix(
        tensors["in.source_image"],
        label,
        tensors["in.target_image"],
        tensors["in.pseudo_labels"].long(),
        tensors["in.pseudo_weight"],
        mask,
    )
    assert torch.equal(image, tensors["out.mixed_image"])
    assert torch.equal(mixed, tensors["out.mixed_labels"][:, 0].long())
    assert torch.equal(weight, tensors["out.mixed_weight"][:, 0])
