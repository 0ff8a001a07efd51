"""Read the cache of a prepared dataset: training images as plain pixels, so that crops need no decoding.

    <prepared folder>/cache/<box>/cache.json             what the files were made from; written last
    <prepared folder>/cache/<box>/<split>/<name>.ppm     RGB; the format is uncompressed, and any viewer opens it
    <prepared folder>/cache/<box>/<split>/<name>.pgm     train ids

The box is the setting data.source_box or data.target_box, height x width, or "original". Images that the box would
enlarge are stored at their own size, because reading more pixels costs more than enlarging a crop. Crops are equal to
the last bit to decoded and resized ones. H W original size, h w stored size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluda_cli import console
from cluda_cli.data.index import Index, Item
from cluda_cli.data.stored import CacheFile, ManifestFile, read_stored
from cluda_cli.data.transforms import fit_box
from cluda_cli.errors import DataError

FORMAT = 1  # raise it when equal images and labels would be stored differently
SPLIT = "train"
Box = tuple[int, int] | None


@dataclass(frozen=True)
class Cache:
    """The stored images of a prepared dataset."""

    folder: Path
    box: Box
    files: dict[str, str]
    """Image, as the index names it -> its file below the folder, without suffix."""

    @property
    def name(self) -> str:
        return self.folder.name

    def size(self, item: Item) -> tuple[int, int]:
        """Height and width as stored."""
        return fit_stored(item.size, self.box)

    def num_bytes(self, item: Item) -> int:
        """Bytes of an image and its label on disk."""
        return math.prod(self.size(item)) * (4 if item.label else 3)

    def serves(self, item: Item, box: Box) -> bool:
        """Whether the cache can give this image resized to fit `box`."""
        return item.image in self.files and self.size(item) in (item.size, fit_box(item.size, box))

    def image(self, item: Item) -> Tensor:
        """uint8 3 h w, channels last in memory, mapped from the file: only used pixels are read. Raises as `label`."""
        return self._map(item, ".ppm", 3).permute(2, 0, 1)

    def label(self, item: Item) -> Tensor:
        """uint8 h w train ids, mapped from the file. Raises DataError if the file is missing or of another size."""
        return self._map(item, ".pgm", 1)[:, :, 0]

    def _map(self, item: Item, suffix: str, channels: int) -> Tensor:
        path, size = self.folder / (self.files[item.image] + suffix), self.size(item)
        head = make_netpbm_header(size, channels)
        if not path.is_file():
            raise DataError("a cached file is missing", path, self._remedy())
        try:
            # Copy-on-write: torch wants writable memory, though nobody writes to it.
            content = np.memmap(path, dtype=np.uint8, mode="c")
        except (OSError, ValueError) as error:
            raise DataError(f"a cached file cannot be read ({error})", path, self._remedy()) from error
        if len(content) != len(head) + math.prod(size) * channels or content[: len(head)].tobytes() != head:
            raise DataError(f"not the cached {size[0]} x {size[1]} image", path, self._remedy())
        return torch.from_numpy(content[len(head) :].reshape(*size, channels))

    def _remedy(self) -> str:
        return f"remove {self.folder}, or make it again with `cluda prepare ... --cache {self.name}`"


def name_box(box: Box) -> str:
    """The name of a box on the command line and of its folder."""
    return "original" if box is None else f"{box[0]}x{box[1]}"


def fit_stored(size: tuple[int, int], box: Box) -> tuple[int, int]:
    """Height and width at which an image of `size` is stored, never larger than the image."""
    resized = fit_box(size, box)
    return resized if math.prod(resized) < math.prod(size) else size


def choose_cache(index: Index, box: Box) -> Cache | None:
    """The cache with the most training images for `box`, of several the smallest; None if no cache has one.

    Prints its choice, and warns of caches that were made from other files than the index.
    """
    items, caches = index.split(SPLIT), []
    for folder in sorted(path.parent for path in (index.folder / "cache").glob("*/cache.json")):
        cache = read_cache(folder)
        if cache is None:
            console.warn(
                f"{folder}: this cache of {index.name} is out of date and is not used; "
                f"make it again with `cluda prepare ... --cache {folder.name}`, or remove it"
            )
        elif served := [item for item in items if cache.serves(item, box)]:
            caches.append((len(served), -sum(map(cache.num_bytes, served)), cache))
        else:
            console.info(f"{index.name}: the cache {cache.name} is not of the size of this run, {name_box(box)}")
    if not caches:
        return None
    number, _, best = max(caches, key=lambda entry: entry[:2])
    which = f"{number} of {len(items)}" if number < len(items) else "all"
    console.info(f"{index.name}: {which} training images are read from the cache {best.name}")
    return best


def read_cache(folder: Path) -> Cache | None:
    """The cache in a folder; None if it is incomplete, of another format, or made from other files than the index."""
    try:
        stored = read_stored(folder / "cache.json", CacheFile)
        inputs = read_stored(folder.parent.parent / "manifest.json", ManifestFile).inputs
    except (OSError, ValueError):
        return None
    if stored.format != FORMAT or stored.inputs != inputs:
        return None
    return Cache(folder, stored.box, stored.files)


def make_netpbm_header(size: tuple[int, int], channels: int) -> bytes:
    """The first bytes of an uncompressed image file (Netpbm)."""
    return b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, size[1], size[0])
