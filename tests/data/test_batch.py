"""Crops by name: stacking, choosing, moving."""

import torch

from cluda_cli.data.batch import Crops, to_device


def crop(value: int) -> Crops:
    """A single labelled crop, whose tensors lack the batch axis."""
    inside = torch.ones(2, 4, dtype=torch.bool)
    return Crops(torch.full((3, 2, 4), value, dtype=torch.uint8), inside, label=torch.full((2, 4), value).byte())


def test_crops_are_stacked_in_order_and_what_is_missing_stays_missing() -> None:
    batch = Crops.stack([crop(1), crop(2)])
    assert batch.image.shape == (2, 3, 2, 4) and batch.label.shape == (2, 2, 4)
    assert batch.image[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.valid is None


def test_crops_are_selected_by_position() -> None:
    chosen = Crops.stack([crop(1), crop(2)]).select(torch.tensor([1, 1, 0]))
    assert chosen.label[:, 0, 0].tolist() == [2, 2, 1] and chosen.valid is None


def test_a_batch_moves_with_its_names() -> None:
    moved = to_device({"source": Crops.stack([crop(1)])}, torch.device("meta"))
    assert moved["source"].image.device.type == moved["source"].label.device.type == "meta"
