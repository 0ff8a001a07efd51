"""Which crops are kept, and which classes they are said to show."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.objectives.crop_memory import CropMemory, shown_classes


def crop(value: int, *classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of one crop of a grey value that shows these of three classes."""
    everywhere = torch.ones(1, 2, 4, dtype=torch.bool)
    shown = torch.tensor([[k in classes for k in range(3)]])
    return torch.full((1, 3, 2, 4), value, dtype=torch.uint8), everywhere, everywhere.clone(), shown


def values(memory: CropMemory) -> list[int]:
    return [int(image[0, 0, 0]) for image in memory.image]


def test_the_oldest_crop_is_replaced_unless_it_is_the_last_with_some_class() -> None:
    memory = CropMemory(3, (2, 4), 3)
    for value, classes in enumerate([(0, 1), (0,), (0,), (0, 2), (0,), (1,)], start=1):
        memory.remember(*crop(value, *classes))
    assert values(memory) == [1, 4, 6]  # 2, 3 and 5 went; 1 was the only one with class 1 until 6 came
    memory.remember(*crop(7))
    assert values(memory) == [7, 4, 6]
    assert memory.contains.tolist() == [[False, True, False], [False, False, True], [False, True, False]]


def test_where_every_crop_is_the_last_with_some_class_the_oldest_goes() -> None:
    memory = CropMemory(2, (2, 4), 3)
    for value, classes in enumerate([(0,), (1,), (2,)], start=1):
        memory.remember(*crop(value, *classes))
    assert values(memory) == [3, 2]


def test_recalled_crops_are_what_came_and_can_be_corrected() -> None:
    memory = CropMemory(2, (2, 4), 3)
    memory.remember(*crop(5, 0, 1))
    found = memory.recall(torch.tensor([0, 0]))
    assert (found.image == 5).all() and found.image.shape == (2, 3, 2, 4)
    assert found.valid is not None and found.valid.all() and found.label is None
    memory.correct(torch.tensor([0, 0]), torch.tensor([[True, False, False], [False, False, True]]))
    assert memory.contains[:, 0].tolist() == [False, False, True]


@pytest.mark.reference
def test_the_bank_of_the_reference(golden: Any) -> None:
    """Its slots are numbers of images; the one that is pasted comes after the one that is pasted on."""
    tensors, description = golden("21_ael/a09_image_bank")
    memory = CropMemory(description["settings"]["images"], (2, 2), 19)
    memory.contains.copy_(tensors["in.bank0"].bool())
    for step in range(3):
        label = tensors[f"in.step{step}.teacher_logits"].float().argmax(1)
        shown = shown_classes(label, 19, description["settings"]["area_threshold2"])
        memory.correct(tensors[f"in.step{step}.ids"], shown)
        assert torch.equal(memory.contains.to(torch.uint8), tensors[f"out.step{step}.bank"])


def test_a_class_is_shown_from_the_threshold_on_and_ignored_pixels_are_none() -> None:
    label = torch.tensor([[[0, 1, 1, 255]], [[2, 2, 2, 2]]])
    assert shown_classes(label, 3, 0.5).tolist() == [[False, True, False], [False, False, True]]
