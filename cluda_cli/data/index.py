"""A prepared dataset on disk: which images and labels belong together, and what the labels hold.

    <data root>/prepared/<name>/index.json            this file
    <data root>/prepared/<name>/labels/<split>/*.png  train-id maps, 8-bit, one channel, 255 = ignored

The folder may hold other files; a pseudo-labelled dataset has confidence maps. Readers need only these two.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import DataError
from cluda_cli.files import write_json

FORMAT = 1
RENDERED = ("gta", "synthia")
PHOTOGRAPHED = ("cityscapes", "camvid", "acdc", "dark-zurich")
PUBLISHED_NAMES = RENDERED + PHOTOGRAPHED
"""Datasets that `cluda prepare` knows; `preparation/published.py` says where each keeps its files."""
DEMO_NAMES = ("demo-render", "demo-camera")
"""Source and target that `cluda prepare demo` makes."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})
"""Lower-case suffixes of files that are taken for images."""


@dataclass(frozen=True)
class Item:
    """One image, with its label if it has one."""

    image: str
    """Path of the image relative to the index's root (the raw dataset)."""
    label: str | None
    """Path of the train-id map relative to the prepared folder."""
    size: tuple[int, int]
    """Height and width of the image, pixels."""
    pixels: dict[int, int] = field(default_factory=dict)
    """Train id -> number of pixels in the label at original size, without absent classes."""


@dataclass(frozen=True)
class Index:
    """All that training and evaluation need to know about a prepared dataset."""

    name: str
    folder: Path
    """The prepared folder, where index.json and the train-id maps lie."""
    root: Path
    """The folder of the raw dataset, to which image paths are relative."""
    classes: ClassTable
    splits: dict[str, tuple[Item, ...]]
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, bottom, left, right bands of the original frame, pixels, without pseudo-labels (a bonnet, borders)."""

    def image_path(self, item: Item) -> Path:
        return self.root / item.image

    def label_path(self, item: Item) -> Path:
        """Path of the train-id map; the item must have a label."""
        assert item.label is not None
        return self.folder / item.label

    def split(self, name: str) -> tuple[Item, ...]:
        """The items of a split. Raises DataError if there is no such split or it is empty."""
        items = self.splits.get(name, ())
        if not items:
            have = ", ".join(f"{key} ({len(value)})" for key, value in self.splits.items() if value) or "none"
            raise DataError(f'dataset {self.name} has no images in split "{name}"', self.folder, f"splits: {have}")
        return items

    def labelled(self, name: str) -> tuple[Item, ...]:
        """The items of a split that have labels; empty if there are none."""
        return tuple(item for item in self.splits.get(name, ()) if item.label)

    def class_pixels(self, split: str) -> list[int]:
        """Pixels of each class over a split, by train id."""
        totals = [0] * len(self.classes)
        for item in self.splits.get(split, ()):
            for train_id, count in item.pixels.items():
                totals[train_id] += count
        return totals

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes, class table and class statistics. It does not depend on the folder."""
        content = json.dumps([self.classes.to_json(), _splits_to_json(self.splits), self.margins], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self) -> None:
        """Write index.json atomically; paths are stored relative to it, so that a data root can move."""
        write_json(self.folder / "index.json", {
            "format": FORMAT,
            "name": self.name,
            "root": Path(os.path.relpath(self.root, self.folder)).as_posix(),
            "fingerprint": self.fingerprint,
            "classes": self.classes.to_json(),
            "margins": list(self.margins),
            "splits": _splits_to_json(self.splits),
        }, indent=None)  # fmt: skip

    @staticmethod
    def load(folder: Path) -> "Index":
        """Read a prepared folder. Raises DataError if it is missing, broken or of another format."""
        path = folder / "index.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise DataError(
                    f"index format {content['format']}, expected {FORMAT}", path, "run `cluda prepare` again"
                )
            return Index(
                name=content["name"],
                folder=folder,
                root=Path(os.path.normpath(folder / content["root"])),
                classes=ClassTable.from_json(content["classes"]),
                splits={name: tuple(map(_item_from_json, rows)) for name, rows in content["splits"].items()},
                margins=(*content["margins"],),
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"not a readable index ({error})", path, "run `cluda prepare` again") from error


def find(name: str, data_root: Path) -> Index:
    """A prepared dataset by its name, or by the path of a folder with an index.json.

    Raises DataError with the command that prepares it.
    """
    for folder in (data_root / "prepared" / name, Path(name)):
        if (folder / "index.json").is_file():
            return Index.load(folder)
    known = sorted(path.parent.name for path in (data_root / "prepared").glob("*/index.json"))
    what = "demo" if name in DEMO_NAMES else name if name in PUBLISHED_NAMES else "DESCRIPTION.toml"
    remedy = f"run `cluda prepare {what} --data-root {shlex.quote(str(data_root))}`"
    if known:
        remedy += f"; prepared: {', '.join(known)}"
    raise DataError(f'dataset "{name}" is not prepared', data_root / "prepared", remedy)


def joint_classes(sources: Sequence[Index]) -> ClassTable:
    """The classes of all sources, matched by name, those of the first source first."""
    classes = sources[0].classes
    for source in sources[1:]:
        classes = classes.union(source.classes)
    return classes


def seen_classes(sources: Sequence[Index], split: str = "train") -> tuple[str, ...]:
    """Names of the joint classes that occur in the labels of a split of any source."""
    found = {
        name
        for source in sources
        for name, count in zip(source.classes.names, source.class_pixels(split), strict=True)
        if count
    }
    return tuple(name for name in joint_classes(sources).names if name in found)


def _splits_to_json(splits: dict[str, tuple[Item, ...]]) -> dict[str, list[list[Any]]]:
    """Items as rows [image, label, [height, width], {train id: pixels}]. 25 000 rows take a few megabytes."""
    return {
        name: [[i.image, i.label, list(i.size), {str(k): v for k, v in i.pixels.items()}] for i in items]
        for name, items in splits.items()
    }


def _item_from_json(row: Sequence[Any]) -> Item:
    image, label, size, pixels = row
    return Item(image, label, (size[0], size[1]), {int(k): v for k, v in pixels.items()})
