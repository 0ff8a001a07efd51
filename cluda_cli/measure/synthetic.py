"""Synthetic batches for measurements: noise, with class shares like those of streets. B images, H W pixels."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.batch import Batch, Crops
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, ClassTable

BLOCKS = 16  # of one class each, per side of a label map
UNEVENNESS = 1.5
"""The share of the class of rank r falls as r to this power. With 19 classes two pixels then share their class with
probability 0.25, on Cityscapes 0.23: that is what the cost of a contrast depends on."""


def synthetic_source() -> Index:
    """A labelled dataset with the classes of Cityscapes, as frequent as in synthetic labels; it has no files."""
    classes = ClassTable(CITYSCAPES)
    pixels = {train_id: round(10**6 * (train_id + 1) ** -UNEVENNESS) for train_id in range(len(classes))}
    item = Item("no image", "no label", (1, 1), pixels)
    return Index("synthetic", Path(), Path(), classes, {"train": (item,)})


def synthetic_batch(data: settings.Data, num_classes: int, generator: torch.Generator) -> Batch:
    """A batch of the sizes of the settings, without padding or margins."""
    shape = (data.batch_size, *data.crop)
    everywhere = torch.ones(shape, dtype=torch.bool)
    source, target = (synthetic_images(data.batch_size, data.crop, generator) for _ in range(2))
    truth = Crops(source, everywhere, label=synthetic_labels(data.batch_size, data.crop, num_classes, generator))
    names = ["source"] * bool(data.source) + ["labelled"] * (data.labelled is not None)
    return dict.fromkeys(names, truth) | {"target": Crops(target, everywhere, valid=everywhere)}


def synthetic_images(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Noise.  # uint8 B 3 H W"""
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def synthetic_labels(count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> Tensor:
    """Train ids in blocks, low ids more often than high ones.  # uint8 B H W"""
    shares = torch.arange(1, num_classes + 1).float() ** -UNEVENNESS
    drawn = torch.multinomial(shares, count * BLOCKS**2, replacement=True, generator=generator)
    blocks = drawn.view(count, 1, BLOCKS, BLOCKS).to(torch.uint8)
    return F.interpolate(blocks, size, mode="nearest")[:, 0]
