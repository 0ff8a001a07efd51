"""How a crop is drawn from prepared datasets. h w pixels of a resized image or of a crop, H W of the padded crop."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy import random
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.batch import Crops
from cluda_cli.data.cache import SPLIT, Box
from cluda_cli.data.frames import Frames
from cluda_cli.data.index import Index, seen_classes
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.data.sampling import RareClasses, diverse_crop, random_crop, rare_crop
from cluda_cli.data.transforms import resize_label_region
from cluda_cli.errors import DataError, SettingsError

Law = tuple[float, ...] | None
"""Probabilities with which classes are drawn, by train id; None: those of the settings."""
Draw = Callable[[random.Generator, Law], Crops]
"""Draws one crop, whose tensors lack the batch axis."""


class LabelledImages:
    """Draws from one labelled dataset, in the train ids of `classes`, which holds all classes of the dataset.

    Images are resized to fit `box`; `kind` is what messages call them. Raises DataError if the dataset has no label, or
    no labelled pixel.
    """

    def __init__(self, index: Index, classes: ClassTable, data: settings.Data, box: Box, kind: str = "source") -> None:
        table = index.classes.remap_to(classes)
        self.items = [
            replace(item, pixels={table[train_id]: count for train_id, count in item.pixels.items()})
            for item in index.labelled(SPLIT)
        ]
        if not self.items:
            index.split(SPLIT)
            raise DataError(f'no image of split "{SPLIT}" has a label', index.folder, f"the {kind} must be labelled")
        if not any(item.pixels for item in self.items):
            raise DataError("the labels hold no pixel of any class", index.folder, "check its description")
        self.data, self.frames = data, Frames(index, box)
        self.remap = None if index.classes == classes else torch.tensor(table, dtype=torch.uint8)  # 256
        self.rare = RareClasses(self.items, classes, data.rare_class, data.crop, kind) if data.rare_class else None

    def __call__(self, rng: random.Generator, law: Law = None) -> Crops:
        """Image, label and inside of one crop; `law` acts with rare-class sampling.

        The crop is chosen on the label, so that of the image, which takes longest to decode, only the crop is read or
        resized, and once. The law is that of repeating the whole pipeline until the crop is accepted.
        """
        if self.rare:
            train_id, position = self.rare.draw(rng, law)
        else:
            position = int(rng.integers(len(self.items)))
        item, data = self.items[position], self.data
        label = self.frames.label(item)  # h w
        if self.remap is not None:
            label = self.remap[label.long()]
        if self.rare:
            crop = rare_crop(rng, label, data.crop, data.max_class_share, train_id, self.rare.crop_pixels)
        else:
            crop = diverse_crop(rng, label, data.crop, data.max_class_share)
        image, label = _flip(rng, self.frames.image(item, crop), crop.of(label))
        inside = torch.ones_like(label, dtype=torch.bool)
        return Crops(_pad(image, data.crop, 0), _pad(inside, data.crop, 0), label=_pad(label, data.crop, IGNORE))


class Sources:
    """Draws from several labelled datasets: first the dataset, by its share, then the crop."""

    def __init__(self, sources: Sequence[Index], classes: ClassTable, data: settings.Data) -> None:
        self.parts = [LabelledImages(index, classes, data, data.source_box) for index in sources]
        shares = np.array(data.source_shares or [len(part.items) for part in self.parts], dtype=np.float64)
        self.shares = shares / shares.sum()

    def __call__(self, rng: random.Generator, law: Law = None) -> Crops:
        chosen = rng.choice(len(self.parts), p=self.shares) if len(self.parts) > 1 else 0
        return self.parts[chosen](rng, law)


class TargetImages:
    """Draws from the target without labels.

    Raises SettingsError if the margins leave nothing of an image.
    """

    def __init__(self, index: Index, data: settings.Data) -> None:
        self.items = index.split(SPLIT)
        self.margins = index.margins if data.target_margins is None else data.target_margins
        top, bottom, left, right = self.margins
        for height, width in {item.size for item in self.items}:
            if top + bottom >= height or left + right >= width:
                raise SettingsError(
                    f"{list(self.margins)} leave nothing of a {height} x {width} image of {index.name}",
                    "data.target_margins",
                    "top, bottom, left and right in pixels of the original frame",
                )
        self.data, self.frames = data, Frames(index, data.target_box)

    def __call__(self, rng: random.Generator, law: Law = None) -> Crops:
        """Image, inside and valid of one crop; there is no class to draw."""
        item, data = self.items[rng.integers(len(self.items))], self.data
        size = self.frames.size(item)
        crop = random_crop(rng, size, data.crop)
        (height, width), (top, bottom, left, right) = item.size, self.margins
        valid = torch.zeros(height, width, dtype=torch.bool)
        valid[top : height - bottom, left : width - right] = True
        valid = resize_label_region(valid, size, crop.top, crop.left, crop.height, crop.width)
        image, valid = _flip(rng, self.frames.image(item, crop), valid)
        inside = torch.ones_like(valid)
        return Crops(_pad(image, data.crop, 0), _pad(inside, data.crop, 0), valid=_pad(valid, data.crop, 0))


def require_classes(datasets: Sequence[Index]) -> None:
    """Raises DataError if their labels hold one class only: its loss would go to 0, and nothing would be learnt."""
    if len(seen := seen_classes(datasets, SPLIT)) == 1:
        remedy = 'label what is not of this class as another one, such as "background"'
        raise DataError(f"the labels hold one class only: {seen[0]}", datasets[0].folder, remedy)


class ReferenceImages(TargetImages):
    """Draws the paired pictures of target images: with the generator of a target crop, the same crop of its picture.

    Of an image without a paired picture nothing is inside. Raises DataError if no image has one.
    """

    def __init__(self, index: Index, data: settings.Data) -> None:
        super().__init__(index, data)
        if not any(item.image in index.references for item in self.items):
            remedy = "prepare it with paired pictures, or take paired out of objectives.feature_distance.views"
            raise DataError(f"dataset {index.name} has no paired pictures", index.folder, remedy)

    def __call__(self, rng: random.Generator, law: Law = None) -> Crops:
        item, data = self.items[rng.integers(len(self.items))], self.data
        crop = random_crop(rng, self.frames.size(item), data.crop)
        paired = item.image in self.frames.index.references
        inside = torch.full((crop.height, crop.width), paired)
        black = torch.zeros(3, crop.height, crop.width, dtype=torch.uint8)
        image, inside = _flip(rng, self.frames.reference(item, crop) if paired else black, inside)
        return Crops(_pad(image, data.crop, 0), _pad(inside, data.crop, 0))


def _flip(rng: random.Generator, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both mirrored left to right, or neither, equally likely."""
    return (image.flip(-1), label.flip(-1)) if rng.random() < 0.5 else (image, label)


def _pad(region: Tensor, size: tuple[int, int], value: int) -> Tensor:
    """... h w at the top left of ... H W; as it is where it has that size."""
    if region.shape[-2:] == size:
        return region
    padded = region.new_full((*region.shape[:-2], *size), value)
    padded[..., : region.shape[-2], : region.shape[-1]] = region
    return padded
