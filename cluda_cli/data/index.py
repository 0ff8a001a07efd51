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

from cluda_cli import console
from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import DataError
from cluda_cli.files import write_json

FORMAT = 2  # 1: images were not turned upright
Stamp = tuple[int, int, int, int]
"""Size, bytes, and time of change, ns, of an image, then of its train-id map (0 without one)."""
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
    """Height and width of the upright image, pixels."""
    pixels: dict[int, int] = field(default_factory=dict)
    """Train id -> number of pixels in the label at original size, without absent classes."""
    stamp: Stamp | None = field(default=None, compare=False)
    """The files at the time of `cluda prepare`, by which changed ones are noticed; None: not recorded."""


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
    references: dict[str, str] = field(default_factory=dict)
    """Image -> its paired picture, of the same size; both relative to `root`."""

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
        rows = {name: [_to_row(item) for item in items] for name, items in self.splits.items()}
        parts = [self.classes.to_json(), rows, self.margins, *([self.references] if self.references else [])]
        content = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self) -> None:
        """Write index.json atomically."""
        write_json(self.folder / "index.json", {
            "format": FORMAT,
            "name": self.name,
            "roots": _find_ways(self.root, self.folder),
            "fingerprint": self.fingerprint,
            "classes": self.classes.to_json(),
            "margins": list(self.margins),
            "references": self.references,
            "splits": {name: [[*_to_row(i), i.stamp] for i in items] for name, items in self.splits.items()},
        }, indent=None)  # fmt: skip

    @staticmethod
    def load(folder: Path) -> "Index":
        """Read a prepared folder. Raises DataError if it is missing, damaged or of another format."""
        from cluda_cli.data.stored import IndexFile, IndexHead, read_stored

        path, remedy = folder / "index.json", f"run `{_name_command(folder)}` again"
        try:
            version = read_stored(path, IndexHead).format
            if version != FORMAT:
                what = "an earlier" if version < FORMAT else "a later"
                raise DataError(f"made by {what} version of cluda (format {version}, not {FORMAT})", path, remedy)
            stored = read_stored(path, IndexFile)
            splits = {name: tuple(Item(*row) for row in rows) for name, rows in stored.splits.items()}
            classes = ClassTable.from_json(stored.classes)
        except (OSError, ValueError) as error:
            raise DataError(f"not a readable index ({error})", path, remedy) from error
        first = next((items[0].image for items in splits.values() if items), "")
        root = _find_root(stored.roots, folder, first)
        index = Index(stored.name, folder, root, classes, splits, stored.margins, stored.references)
        if index.fingerprint != stored.fingerprint:
            raise DataError("damaged: its content does not fit its fingerprint", path, remedy)
        return index

    def check_files(self) -> None:
        """Compare sizes and times of all images and train-id maps with those at the time when the dataset was made.

        Reads no file. Raises DataError if one is missing or has another size; warns if only times differ, as after a
        copy.
        """
        changed, retimed = [], 0
        for item in (item for items in self.splits.values() for item in items):
            stamp = item.stamp or (0, 0, 0, 0)
            files = [(self.image_path(item), stamp[:2])] + ([(self.label_path(item), stamp[2:])] if item.label else [])
            for path, then in files if item.stamp else ():
                now = read_stamp(path)
                if now[0] != then[0]:
                    changed.append(f"{path} ({then[0]} bytes then, {now[0]} now)")
                elif now != then:
                    retimed += 1
        if changed:
            what = f"{len(changed)} files changed since the dataset was made, such as {changed[0]}"
            raise DataError(what, self.folder, f"run `{_name_command(self.folder)}` again")
        if retimed:
            console.warn(
                f"{self.name}: {retimed} files have another time than when the dataset was made and the same size: "
                f"copied, or changed? if in doubt, run `{_name_command(self.folder)}` again"
            )


def read_stamp(path: Path) -> tuple[int, int]:
    """Size, bytes, and time of change, ns, of a file; zeros for a missing file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _find_ways(root: Path, folder: Path) -> list[str]:
    """Ways from the prepared folder to the raw one, of which one is right after folders were moved, copied or linked:
    relative as the paths are written, relative without links, absolute.
    """
    real = os.path.realpath(root)
    ways = os.path.relpath(root, folder), os.path.relpath(real, os.path.realpath(folder)), real
    return list(dict.fromkeys(Path(way).as_posix() for way in ways))


def _find_root(ways: Sequence[str], folder: Path, image: str) -> Path:
    """The first of these ways that leads to the image, else the first."""
    places = [Path(os.path.normpath(base / way)) for way in ways for base in (folder, Path(os.path.realpath(folder)))]
    return next((place for place in places if os.path.exists(place / image)), places[0])


def _name_command(folder: Path) -> str:
    """The command that prepares a folder again."""
    name, prepared = folder.name, folder.parent
    if prepared.name != "prepared":
        return "cluda pseudo-label --overwrite" if (folder / "confidence").is_dir() else "cluda prepare"
    what = "demo" if name in DEMO_NAMES else name if name in PUBLISHED_NAMES else "DESCRIPTION.toml"
    return f"cluda prepare {what} --data-root {shlex.quote(str(prepared.parent))}"


def find(name: str, data_root: Path) -> Index:
    """A prepared dataset by its name, or by the path of a folder with an index.json.

    Raises DataError with the command that prepares it.
    """
    for folder in (data_root / "prepared" / name, Path(name)):
        if (folder / "index.json").is_file():
            return Index.load(folder)
    known = sorted(path.parent.name for path in (data_root / "prepared").glob("*/index.json"))
    remedy = f"run `{_name_command(data_root / 'prepared' / name)}`"
    if known:
        remedy += f"; prepared: {', '.join(known)}"
    raise DataError(f'dataset "{name}" is not prepared', data_root / "prepared", remedy)


def joint_classes(sources: Sequence[Index]) -> ClassTable:
    """The classes of all sources, matched by name, those of the first source first."""
    classes = sources[0].classes
    for source in sources[1:]:
        classes = classes.union(source.classes)
    return classes


def class_frequencies(
    sources: Sequence[Index], shares: Sequence[float] | None = None, labelled: Index | None = None
) -> list[float]:
    """Share of each joint class, by train id, in the labelled pixels of the train splits.

    `shares` are those of the sources' images; None: in proportion to their number. A batch has as many images of
    `labelled` as of all sources. Without any labelled pixel all classes are alike.
    """
    datasets = [*sources, *([labelled] if labelled else [])]
    joint = joint_classes(datasets)
    frequencies = [0.0] * len(joint)
    parts = list(shares or (len(source.labelled("train")) for source in sources))
    if labelled:
        parts.append(sum(parts) or 1)
    for source, part in zip(datasets, parts, strict=True):
        pixels, images = source.class_pixels("train"), len(source.labelled("train"))
        share = part / max(images, 1)
        for name, count in zip(source.classes.names, pixels, strict=True):
            frequencies[joint.names.index(name)] += share * count
    total = sum(frequencies)
    return [frequency / total if total else 1 / len(joint) for frequency in frequencies]


def seen_classes(sources: Sequence[Index], split: str = "train") -> tuple[str, ...]:
    """Names of the joint classes that occur in the labels of a split of any source."""
    found = {
        name
        for source in sources
        for name, count in zip(source.classes.names, source.class_pixels(split), strict=True)
        if count
    }
    return tuple(name for name in joint_classes(sources).names if name in found)


def _to_row(item: Item) -> list[Any]:
    """[image, label, [height, width], {train id: pixels}]. 25 000 rows take a few megabytes."""
    return [item.image, item.label, list(item.size), {str(k): v for k, v in item.pixels.items()}]
