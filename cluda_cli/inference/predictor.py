"""A trained network in Python: `cluda_cli.load("runs/x").predict("street.png")`. H W pixels of one image, K classes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cluda_cli.data.labels import ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError
from cluda_cli.files import atomic
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.sliding import ResizedImage, fit_image, segment
from cluda_cli.inference.weights_file import TrainedNetwork, load_weights
from cluda_cli.models.segmenter import Segmenter

Picture = str | Path | Image.Image | NDArray[np.uint8]
"""A file, a Pillow image, or an array of red, green and blue, uint8 H W 3."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image."""

    labels: NDArray[np.uint8]
    """Train ids, H W: positions in `classes`."""
    confidence: NDArray[np.float32]
    """Softmax probability of the label, H W, 0..1."""
    classes: ClassTable
    pixels: NDArray[np.uint8]
    """The image, upright, H W 3."""

    def color(self) -> Image.Image:
        """The labels as a palette image, whose indices are train ids."""
        image = Image.fromarray(self.labels)
        image.putpalette(self.classes.palette())
        return image

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image with the colours of the labels over it; an opacity of 1 hides the image."""
        return Image.blend(Image.fromarray(self.pixels), self.color().convert("RGB"), opacity)

    def save(self, path: str | Path) -> None:
        """Write the labels as a palette PNG of train ids. Raises OSError if it cannot be written."""
        with atomic(Path(path)) as temporary:
            self.color().save(temporary, format="PNG")


class Predictor:
    """A trained network, ready to predict images of any size.

    `module` is the torch module underneath, in eval mode. It takes `module.normalisation.apply(pixels)`, float32 B 3 h
    w, whose sides are multiples of `module.pad_multiple`, and returns an object whose `logits` are B K h/stride
    w/stride. Training images were resized to fit `settings.data.target_box` first.
    """

    def __init__(self, trained: TrainedNetwork) -> None:
        self.module: Segmenter = trained.network
        self.settings, self.classes, self.path = trained.settings, trained.classes, trained.path

    def predict(self, picture: Picture) -> Prediction:
        """Segment one image. Raises DataError for a file that is no image, or an array of another shape or type."""
        return next(self.predict_all([picture]))

    def predict_all(self, pictures: Iterable[Picture]) -> Iterator[Prediction]:
        """Segment images one after another, in order. Consecutive images of one size share a forward."""
        results = segment(self.module, self._resize(pictures), self.settings.inference, confidence=True)
        for pixels, label, confidence in results:
            assert confidence is not None
            yield Prediction(label.cpu().numpy(), confidence.cpu().numpy(), self.classes, pixels)

    def _resize(self, pictures: Iterable[Picture]) -> Iterator[tuple[ResizedImage, NDArray[np.uint8]]]:
        device = next(self.module.parameters()).device
        for picture in pictures:
            image = _read(picture)
            yield fit_image(image, self.settings.data.target_box, device), image.permute(1, 2, 0).contiguous().numpy()


def _read(picture: Picture) -> Tensor:
    """The pixels of a picture.  # uint8 3 H W"""
    if isinstance(picture, str | Path):
        return read_image(Path(picture))
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):
            what = f"Pillow image of mode {picture.mode}, which has more than 8 bits per channel"
            raise DataError(what, "picture", "convert it to RGB")
        picture = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        what = f"array of {picture.dtype} and shape {picture.shape}"
        raise DataError(what, "picture", "give uint8 of shape height x width x 3, red first")
    return torch.from_numpy(np.array(picture, order="C")).permute(2, 0, 1)


def load(checkpoint: str | Path, device: str = "auto") -> Predictor:
    """Load the network of a run folder, or of a weights file, onto a device: auto, cpu, cuda, cuda:1, mps.

    Raises DataError for weights that are missing or damaged, EnvironmentProblem for a device that cannot be used.
    """
    return Predictor(load_weights(Path(checkpoint), pick_device(device)))
