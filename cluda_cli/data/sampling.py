"""Which labelled image is drawn and where it is cropped. h w pixels of the resized image, K classes.

Rare-class sampling follows DAFormer (arXiv:2111.14887), section 3.3 and equations 8 and 9.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli import console, settings
from cluda_cli.data.index import Item
from cluda_cli.data.labels import IGNORE, ClassTable

REDRAWS = 10  # the last crop is kept however it is: an image may hold no better one


@dataclass(frozen=True)
class Crop:
    """A rectangle of the resized image, pixels; smaller than asked for where the image is smaller."""

    top: int
    left: int
    height: int
    width: int

    def of(self, label: Tensor) -> Tensor:
        """The view of this rectangle of ... h w."""
        return label[..., self.top : self.top + self.height, self.left : self.left + self.width]


def class_probabilities(class_pixels: Sequence[int], temperature: float) -> Tensor:
    """Probability of drawing each class: softmax((1 - frequency) / temperature), float32 K.

    Classes without pixels are never drawn; `class_pixels` must have some. Computed in float32 like the published
    results: at temperature 0.01 the rounding already shows in the sixth digit.
    """
    pixels = torch.tensor(class_pixels, dtype=torch.float32)
    logits = (1 - pixels / pixels.sum()) / temperature
    return logits.masked_fill(pixels == 0, -torch.inf).softmax(0)


class RareClasses:
    """Draws a class, rare ones more often, then an image that holds enough of it."""

    def __init__(
        self,
        items: Sequence[Item],
        classes: ClassTable,
        section: settings.RareClass,
        size: tuple[int, int],
        kind: str = "source",
    ) -> None:
        """`items` are labelled and hold pixels of at least one class; `size` is that of the crop.

        `kind` is what messages call the images.
        """
        min_pixels = section.image_pixels(size)
        pixels = np.zeros((len(items), len(classes)), dtype=np.int64)  # N K
        for i, item in enumerate(items):
            for train_id, count in item.pixels.items():
                pixels[i, train_id] = count
        probabilities = class_probabilities(pixels.sum(0).tolist(), section.temperature).double().numpy()
        self.probabilities: NDArray[np.float64] = probabilities / probabilities.sum()
        self.images = [np.flatnonzero(pixels[:, k] > min_pixels) for k in range(len(classes))]
        """Positions in `items` of the images that are drawn for each class."""
        self.crop_pixels = section.min_crop_share * size[0] * size[1] if section.min_crop_share else -1.0
        """A crop holds enough of the drawn class with more pixels than this; below zero, any crop does."""
        scarce = []
        for k in range(len(classes)):
            if not len(self.images[k]) and pixels[:, k].any():
                self.images[k] = np.flatnonzero(pixels[:, k])
                scarce.append(classes.names[k])
        if scarce:
            console.warn(
                f"no {kind} image holds more than {min_pixels} pixels (data.rare_class.min_pixels) of "
                f"{', '.join(scarce)}; all images that hold any are drawn for them"
            )

    def draw(self, rng: Generator, law: Sequence[float] | None = None) -> tuple[int, int]:
        """Train id of a class, and the position of an image for it.

        `law` takes the place of the probabilities of the settings, as far as there are images of its classes.
        """
        probabilities = self.probabilities if law is None else self._possible(law)
        train_id = int(rng.choice(len(probabilities), p=probabilities))
        return train_id, int(rng.choice(self.images[train_id]))

    def _possible(self, law: Sequence[float]) -> NDArray[np.float64]:
        """A law without the classes that no image has; the settings' own where nothing is left."""
        possible = np.where([len(images) > 0 for images in self.images], law, 0.0)
        return possible / possible.sum() if possible.sum() > 0 else self.probabilities


def random_crop(rng: Generator, image: tuple[int, int], size: tuple[int, int]) -> Crop:
    """A crop of `size`, or of the whole side where the image is smaller; every position is equally likely."""
    height, width = min(size[0], image[0]), min(size[1], image[1])
    top, left = rng.integers(image[0] - height + 1), rng.integers(image[1] - width + 1)
    return Crop(int(top), int(left), height, width)


def diverse_crop(rng: Generator, label: Tensor, size: tuple[int, int], max_share: float) -> Crop:
    """A crop in which no class covers `max_share` of the labelled pixels or more.

    `label` is uint8 h w. Some labelled pixel is required; after ten rejections any crop will do.
    """
    return _diverse_crop(rng, label, size, max_share, _common_first(label))


def rare_crop(
    rng: Generator, label: Tensor, size: tuple[int, int], max_share: float, train_id: int, min_pixels: float
) -> Crop:
    """A diverse crop with more than `min_pixels` pixels of one class; after ten rejections any diverse crop will do."""
    train_ids = _common_first(label)
    for _ in range(REDRAWS + 1):
        crop = _diverse_crop(rng, label, size, max_share, train_ids)
        if np.count_nonzero(crop.of(label).numpy() == train_id) > min_pixels:
            break
    return crop


def _diverse_crop(
    rng: Generator, label: Tensor, size: tuple[int, int], max_share: float, train_ids: Sequence[int]
) -> Crop:
    for _ in range(REDRAWS + 1):
        crop = random_crop(rng, (label.shape[0], label.shape[1]), size)
        if _is_diverse(crop.of(label).numpy(), max_share, train_ids):
            break
    return crop


def _is_diverse(window: NDArray[np.uint8], max_share: float, train_ids: Sequence[int]) -> bool:
    """Whether every class covers less than `max_share` of the labelled pixels of h w, of which there must be some.

    Exact, and much cheaper than a histogram: classes are counted one by one, common ones first, until too few pixels
    are left for any other class to be too many.
    """
    left = window.size - np.count_nonzero(window == IGNORE)
    limit = np.float32(max_share) * np.float32(left)  # float32, so that ties are decided as by tensors
    if not left:
        return False
    for train_id in train_ids:
        if left < limit:
            break
        count = np.count_nonzero(window == train_id)
        if count >= limit:
            return False
        left -= count
    return True


def _common_first(label: Tensor) -> list[int]:
    """All train ids, by their frequency in a coarse grid of h w."""
    counts = torch.bincount(label[::8, ::8].flatten(), minlength=IGNORE + 1)[:IGNORE]
    order: list[int] = counts.argsort(descending=True, stable=True).tolist()
    return order
