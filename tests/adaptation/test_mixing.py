"""Class choice and class mix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.adaptation.mixing import choose_by_law, choose_classes, class_mask, class_mix, draw_classes, tail_law
from cluda_cli.adaptation.style import transfer_moments


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


# Rare classes


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("statistic", "temperature"), [("frequency", 0.01), ("confidence", 1.0)])
def test_tail_law_as_the_reference(statistic: str, temperature: float, dtype: torch.dtype, golden: Any) -> None:
    tensors, description = golden("26_style_tail/z04_tail_law")
    tail = tensors["in.frequency"] < description["settings"]["tail_share"]
    assert torch.equal(tail, tensors["out.tail_classes"].bool())
    law = tail_law(tensors[f"in.{statistic}"].to(dtype), tail, temperature)
    bound = description["tolerance_demanded"]["bounds"][f"law_{statistic}"][f"{str(dtype)[6:]}_max_abs"]
    assert (law - tensors[f"out64.law_{statistic}"]).abs().max() <= bound
    if statistic == "frequency":
        assert torch.equal(draw_classes(law[None], tensors["in.u"].to(dtype)[None])[0], tensors["out.drawn_frequency"])


@pytest.mark.reference
@pytest.mark.parametrize("case", ["z05_tail_mix", "z06_tail_mix_absent"])
def test_tail_mix_as_the_reference(case: str, golden: Any) -> None:
    """Of the two readings in the file, the moments are those of the pasted region."""
    tensors, description = golden(f"26_style_tail/{case}")
    source, target = tensors["in.source"].float(), tensors["in.target"].float()
    label, target_label = tensors["in.source_labels"].long(), tensors["in.target_labels"].long()
    chosen = torch.zeros(len(label), 256, dtype=torch.bool)
    chosen[:, tensors["in.drawn_classes"]] = True
    pasted = class_mask(label, chosen)
    assert torch.equal(pasted, tensors["out.mask"].bool())
    shown = transfer_moments(source, pasted, target, torch.ones_like(pasted), description["settings"]["eps"])
    mixed = class_mix(shown, label, target, target_label, tensors["in.target_weight"].float(), pasted)
    bound = description["tolerance_demanded"]["bounds"]["region_moments.image"]["float32_max_abs"]
    assert (mixed[0] - tensors["out64.region_moments.image"]).abs().max() <= bound
    assert torch.equal(mixed[1], tensors["out.labels"].long())
    assert torch.equal(mixed[2], tensors["out.weight"])
    assert pasted.any() or torch.equal(mixed[0], target)


def test_only_classes_of_the_law_that_the_image_shows_are_chosen() -> None:
    label = label_of([0, 3, 255, 7], [0, 0, 9, 255])
    law = torch.zeros(19)
    law[[3, 5, 7]] = torch.tensor([0.2, 0.7, 0.1])
    for seed in range(50):
        chosen = choose_by_law(label, law, 2, generators(2, seed))
        assert chosen.shape == (2, 256) and chosen.dtype == torch.bool
        assert set(chosen[0].nonzero().flatten().tolist()) <= {3, 7}
        assert 1 <= chosen[0].sum() <= 2 and not chosen[1].any()
    assert not choose_by_law(label, torch.zeros(19), 2, generators(2)).any()


def test_classes_are_drawn_as_often_as_the_law_says() -> None:
    label, law = label_of([3, 7, 3, 7]), torch.zeros(19)
    law[[3, 5, 7]] = torch.tensor([0.2, 0.7, 0.1])
    drawn = torch.stack([choose_by_law(label, law, 1, generators(1, seed))[0] for seed in range(1000)]).float()
    assert drawn[:, 3].mean().item() == pytest.approx(2 / 3, abs=0.06)  # four standard deviations
    assert torch.all(drawn.sum(dim=1) == 1)
