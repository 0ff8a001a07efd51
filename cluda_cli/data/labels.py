"""THE class table. All facts about classes are derived from the rows below.

Two kinds of ids: a *label id* is what a publisher's label file stores, a *train id* is the position of a class in a
network's output, 0..K-1, with IGNORE for pixels that are neither trained on nor scored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

IGNORE = 255
Color = tuple[int, int, int]


@dataclass(frozen=True)
class LabelClass:
    """One class of a dataset."""

    name: str
    """Name by which classes of two datasets are matched."""
    color: Color
    """RGB, 0..255, of colour pictures."""
    label_id: int
    """Id in the publisher's label files and on the evaluation server."""
    thing: bool = False
    """Whether it is countable. Feature distance uses these classes."""


# Names, colours and ids of Cityscapes; GTA5 uses the same ids. Position = train id.
CITYSCAPES: tuple[LabelClass, ...] = (
    LabelClass("road", (128, 64, 128), 7),
    LabelClass("sidewalk", (244, 35, 232), 8),
    LabelClass("building", (70, 70, 70), 11),
    LabelClass("wall", (102, 102, 156), 12),
    LabelClass("fence", (190, 153, 153), 13),
    LabelClass("pole", (153, 153, 153), 17),
    LabelClass("traffic light", (250, 170, 30), 19, thing=True),
    LabelClass("traffic sign", (220, 220, 0), 20, thing=True),
    LabelClass("vegetation", (107, 142, 35), 21),
    LabelClass("terrain", (152, 251, 152), 22),
    LabelClass("sky", (70, 130, 180), 23),
    LabelClass("person", (220, 20, 60), 24, thing=True),
    LabelClass("rider", (255, 0, 0), 25, thing=True),
    LabelClass("car", (0, 0, 142), 26, thing=True),
    LabelClass("truck", (0, 0, 70), 27, thing=True),
    LabelClass("bus", (0, 60, 100), 28, thing=True),
    LabelClass("train", (0, 80, 100), 31, thing=True),
    LabelClass("motorcycle", (0, 0, 230), 32, thing=True),
    LabelClass("bicycle", (119, 11, 32), 33, thing=True),
)
THING_NAMES = frozenset(c.name for c in CITYSCAPES if c.thing)
CITYSCAPES_LABEL_IDS = range(-1, 35)
"""Ids that a Cityscapes or GTA5 label file may hold (34: only GTA5). Ids without a row above are ignored."""

# SYNTHIA-RAND-CITYSCAPES class id -> name; 0 void, 13 parking, 14 road-work, 22 lane marking are ignored.
SYNTHIA_IDS: dict[int, str] = {
    1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole", 8: "car",
    9: "traffic sign", 10: "person", 11: "bicycle", 12: "motorcycle", 15: "traffic light", 16: "terrain",
    17: "rider", 18: "truck", 19: "bus", 20: "train", 21: "wall",
}  # fmt: skip
SYNTHIA_LABEL_IDS = range(23)

# CamVid's usual eleven classes. A class that Cityscapes has too has its name; label id = SegNet's index.
CAMVID: tuple[LabelClass, ...] = (
    LabelClass("sky", (128, 128, 128), 0),
    LabelClass("building", (128, 0, 0), 1),
    LabelClass("pole", (192, 192, 128), 2),
    LabelClass("road", (128, 64, 128), 3),
    LabelClass("sidewalk", (0, 0, 192), 4),
    LabelClass("vegetation", (128, 128, 0), 5),
    LabelClass("traffic sign", (192, 128, 128), 6, thing=True),
    LabelClass("fence", (64, 64, 128), 7),
    LabelClass("car", (64, 0, 128), 8, thing=True),
    LabelClass("person", (64, 64, 0), 9, thing=True),
    LabelClass("bicyclist", (0, 128, 192), 10, thing=True),
)

# The usual protocols for SYNTHIA: without the classes that SYNTHIA lacks, and without three hard classes more.
_NOT_IN_16 = {"terrain", "truck", "train"}
_NOT_IN_13 = _NOT_IN_16 | {"wall", "fence", "pole"}
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "16": tuple(c.name for c in CITYSCAPES if c.name not in _NOT_IN_16),
    "13": tuple(c.name for c in CITYSCAPES if c.name not in _NOT_IN_13),
}


@dataclass(frozen=True)
class ClassTable:
    """The classes of one dataset or network; position = train id."""

    classes: tuple[LabelClass, ...]

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.classes)

    @property
    def is_cityscapes(self) -> bool:
        """Whether these are the nineteen Cityscapes classes in order, which have 16 and 13 class protocols."""
        return self.names == tuple(c.name for c in CITYSCAPES)

    def palette(self) -> list[int]:
        """Flat RGB palette of 768 numbers for a PNG of train ids; ignored pixels are black."""
        flat = [channel for c in self.classes for channel in c.color]
        return flat + [0] * (768 - len(flat))

    def things(self) -> tuple[int, ...]:
        """Train ids of the countable classes."""
        return tuple(i for i, c in enumerate(self.classes) if c.thing)

    def remap_to(self, other: "ClassTable") -> list[int]:
        """Table of 256 entries: train id here -> train id of the same name in `other`, else IGNORE."""
        position = {name: i for i, name in enumerate(other.names)}
        table = [IGNORE] * 256
        for i, name in enumerate(self.names):
            table[i] = position.get(name, IGNORE)
        return table

    def union(self, other: "ClassTable") -> "ClassTable":
        """The classes of this table, then those of the other one that it lacks, by name."""
        new = tuple(c for c in other.classes if c.name not in self.names)
        return ClassTable(self.classes + new) if new else self

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"name": c.name, "color": list(c.color), "label_id": c.label_id, "thing": c.thing} for c in self.classes
        ]

    @staticmethod
    def from_json(rows: Any) -> "ClassTable":
        """The table from such rows. Raises ValueError that names the first wrong value."""
        from cluda_cli.data.stored import read_classes

        return ClassTable(read_classes(rows))


def build_id_table(pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Table of 256 entries, label id -> train id, from such pairs. Other ids, and negative ones, are IGNORE."""
    table = [IGNORE] * 256
    for label_id, train_id in pairs:
        if 0 <= label_id < 256:
            table[label_id] = train_id
    return table
