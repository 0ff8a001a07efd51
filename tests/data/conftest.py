"""Datasets whose images tell where each pixel comes from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, ClassTable


def _coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.mgrid[:height, :width]
    image = np.stack([row, column, np.full_like(row, 100)], 2).astype(np.uint8)
    return image, ((3 * row + 5 * column) % 19).astype(np.uint8)


@pytest.fixture
def coordinates() -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
    """An image whose red is the row and whose green is the column, and a label computed from both."""
    return _coordinates


@pytest.fixture
def make_index() -> Callable[..., Index]:
    """Write a dataset of coordinate images; blue tells the number of the image."""

    def make(folder: Path, sizes: list[tuple[int, int]], *, labels: bool = True, name: str = "made") -> Index:
        folder.mkdir(parents=True, exist_ok=True)
        items = []
        for i, size in enumerate(sizes):
            image, label = _coordinates(*size)
            image[:, :, 2] = i
            Image.fromarray(image).save(folder / f"{i}.png")
            Image.fromarray(label).save(folder / f"{i}_label.png")
            pixels = {k: int((label == k).sum()) for k in range(19) if (label == k).any()} if labels else {}
            items.append(Item(f"{i}.png", f"{i}_label.png" if labels else None, size, pixels))
        return Index(name, folder, folder, ClassTable(CITYSCAPES), {"train": tuple(items)})

    return make


@pytest.fixture
def index(tmp_path: Path, make_index: Callable[..., Index]) -> Index:
    """Three images, the last one smaller."""
    return make_index(tmp_path / "made", [(40, 60), (40, 60), (30, 50)])
