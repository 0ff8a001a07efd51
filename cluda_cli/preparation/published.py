"""The published datasets: where each keeps its files, and how its labels are read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluda_cli.data.globs import find_files
from cluda_cli.data.index import DEMO_NAMES
from cluda_cli.data.labels import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    IGNORE,
    SYNTHIA_IDS,
    SYNTHIA_LABEL_IDS,
    ClassTable,
    LabelClass,
    build_id_table,
)
from cluda_cli.errors import DataError
from cluda_cli.preparation.archives import Archive
from cluda_cli.preparation.camvid import CAMVID_COLORS, SEGNET_LABELS, find_camvid_split
from cluda_cli.preparation.label_files import FirstChannelLabels, IdLabels, LabelReader
from cluda_cli.preparation.pairing import Split

Margins = tuple[int, int, int, int]


@dataclass(frozen=True)
class Dataset:
    """A raw dataset on disk: all that `prepare` needs."""

    name: str
    root: Path
    classes: ClassTable
    reader: LabelReader | None
    """How its label files are read; None if it has none."""
    splits: tuple[Split, ...]
    margins: Margins = (0, 0, 0, 0)
    labels_upright: bool = False
    """Whether labels lie on the images as their EXIF orientation turns them, where sizes do not tell."""


@dataclass(frozen=True)
class Layout:
    """One of the ways in which a dataset is stored."""

    splits: tuple[Split, ...]
    reader: LabelReader
    as_published: bool = True
    """Whether the publisher's archives unpack to this layout, so that missing files can be added from them."""


@dataclass(frozen=True)
class Published:
    """A dataset that is known by name."""

    name: str
    layouts: tuple[Layout, ...]
    classes: tuple[LabelClass, ...] = CITYSCAPES
    archives: tuple[Archive, ...] = ()
    margins: Margins = (0, 0, 0, 0)

    def find_folder(self, data_root: Path) -> Path:
        """The folder of the raw files: <data root>/<name>, with dashes or underscores."""
        folders = [data_root / name for name in (self.name, self.name.replace("-", "_"))]
        return next((folder for folder in folders if folder.is_dir()), folders[-1])

    def find_layout(self, data_root: Path) -> Layout | None:
        """The layout of the files on disk: the first with images and labels, else the first with images."""
        root = self.find_folder(data_root)
        with_images = [layout for layout in self.layouts if _has_files(root, [s.images for s in layout.splits])]
        with_labels = [
            layout for layout in with_images if _has_files(root, [s.labels for s in layout.splits if s.labels])
        ]
        return next(iter(with_labels + with_images), None)

    def locate(self, data_root: Path) -> Dataset:
        """The dataset in the layout of its files. Raises DataError if no images are found."""
        root, layout = self.find_folder(data_root), self.find_layout(data_root)
        if layout is None:
            patterns = dict.fromkeys(layout.splits[0].images for layout in self.layouts)
            archives = ", ".join(archive.files for archive in self.archives)
            raise DataError(
                f"no images of {self.name} found, such as {' or '.join(patterns)}",
                root,
                f"unpack the dataset there, or put its archives there or into {data_root}: {archives}",
            )
        return Dataset(self.name, root, ClassTable(self.classes), layout.reader, layout.splits, self.margins)


def _has_files(root: Path, patterns: list[str]) -> bool:
    return any(next(find_files(root, pattern), None) for pattern in patterns)


def _map_ids_by_name(ids: dict[int, str]) -> tuple[int, ...]:
    position = {c.name: i for i, c in enumerate(CITYSCAPES)}
    return tuple(build_id_table((label_id, position[name]) for label_id, name in ids.items()))


# A label id of -1 is stored as 255 in 8-bit files.
CITYSCAPES_LABELS = IdLabels(
    tuple(build_id_table((c.label_id, i) for i, c in enumerate(CITYSCAPES))),
    tuple(sorted({i % 256 for i in CITYSCAPES_LABEL_IDS})),
)
TRAIN_ID_LABELS = IdLabels(
    tuple(build_id_table((i, i) for i in range(len(CITYSCAPES)))), (*range(len(CITYSCAPES)), IGNORE)
)  # fmt: skip
SYNTHIA_LABELS = FirstChannelLabels(_map_ids_by_name(SYNTHIA_IDS), tuple(SYNTHIA_LABEL_IDS))


def _select_camvid(split: str) -> Callable[[str], bool]:
    return lambda stem: find_camvid_split(stem) == split


def _build_gta(labels: str, reader: LabelReader) -> Layout:
    return Layout((Split("train", "images/*.png", labels),), reader)


def _build_synthia(prefix: str) -> Layout:
    split = Split("train", f"{prefix}RGB/*.png", f"{prefix}GT/LABELS/*.png")
    return Layout((split,), SYNTHIA_LABELS, as_published=not prefix)


def _build_cityscapes(suffix: str, reader: LabelReader) -> Layout:
    def split(name: str, labels: str | None) -> Split:
        return Split(name, f"leftImg8bit/{name}/*/*_leftImg8bit.png", labels)

    # The labels of the test split are withheld: its published files hold no classes.
    labelled = (split(name, f"gtFine/{name}/*/*_gtFine_{suffix}.png") for name in ("train", "val"))
    return Layout((*labelled, split("test", None)), reader)


def _build_acdc(between: str, below: str, suffix: str, reader: LabelReader) -> Layout:
    """ACDC; `between` and `below` are the folders around that of the split: condition and sequence, or none."""
    return Layout(tuple(
        Split(
            name,
            f"rgb_anon/{between}{name}/{below}*_rgb_anon.png",
            None if name == "test" else f"gt/{between}{name}/{below}*_gt_{suffix}.png",
            references=f"rgb_anon/{between}train_ref/{below}*_rgb_ref_anon.png" if name == "train" else None,
        )
        for name in ("train", "val", "test")
    ), reader, as_published=bool(between))  # fmt: skip


def _build_dark_zurich(suffix: str, reader: LabelReader) -> Layout:
    return Layout((
        Split(
            "train",
            "rgb_anon/train/night/**/*_rgb_anon.png",
            references="rgb_anon/train/day/**/*_rgb_anon.png",
            pairs="corresp/train/night/**/*.csv",
        ),
        Split("val", "rgb_anon/val/**/*_rgb_anon.png", f"gt/val/**/*_gt_{suffix}.png"),
        Split("test", "rgb_anon/test/**/*_rgb_anon.png"),
    ), reader)  # fmt: skip


LABEL_FILES: tuple[tuple[str, LabelReader], ...] = (
    ("labelIds", CITYSCAPES_LABELS),
    ("labelTrainIds", TRAIN_ID_LABELS),
)
_FROM_VIDEO = ("rgb_anon", "gt")
_CAMVID_FOLDERS = (
    "701_StillsRaw_full", "LabeledApproved_full", "train", "val", "test", "trainannot", "valannot", "testannot",
)  # fmt: skip

PUBLISHED: tuple[Published, ...] = (
    Published(
        "gta",
        # `[0-9].png` does not find the train-id files that other tools write beside the labels.
        (_build_gta("labels/*[0-9].png", CITYSCAPES_LABELS),),
        archives=(
            Archive("[0-9][0-9]_images.zip", ("images",)),
            Archive("[0-9][0-9]_labels.zip", ("labels",)),
        ),
    ),
    Published(
        "synthia",
        (_build_synthia(""), _build_synthia("RAND_CITYSCAPES/")),
        archives=(Archive("*RAND_CITYSCAPES.zip", ("RGB", "GT")), Archive("*RAND_CITYSCAPES.rar", ())),
    ),
    Published(
        "cityscapes",
        tuple(_build_cityscapes(*files) for files in LABEL_FILES),
        archives=(
            Archive("leftImg8bit_trainvaltest.zip", ("leftImg8bit",)),
            Archive("gtFine_trainvaltest.zip", ("gtFine",)),
        ),
        # Rectification artefacts at the top and the bonnet at the bottom of the 1024 x 2048 frame: DAFormer's
        # 15 and 120 rows at half size.
        margins=(30, 240, 0, 0),
    ),
    Published(
        "camvid",
        (
            Layout(
                tuple(
                    Split(name, "701_StillsRaw_full/*.png", "LabeledApproved_full/*_L.png", _select_camvid(name))
                    for name in ("train", "val", "test")
                ),
                CAMVID_COLORS,
            ),
            Layout(
                tuple(Split(name, f"{name}/*.png", f"{name}annot/*.png") for name in ("train", "val", "test")),
                SEGNET_LABELS,
            ),
        ),
        classes=CAMVID,
        archives=(
            Archive("701_StillsRaw_full.zip", ("701_StillsRaw_full",), into="701_StillsRaw_full"),
            Archive("LabeledApproved_full.zip", ("LabeledApproved_full",), into="LabeledApproved_full"),
            Archive("[Cc]am[Vv]id*.zip", _CAMVID_FOLDERS),
        ),
    ),
    Published(
        "acdc",
        (
            *(_build_acdc("*/", "*/", *files) for files in LABEL_FILES),
            *(_build_acdc("", "", *files) for files in LABEL_FILES),
        ),
        archives=(
            Archive("rgb_anon_trainvaltest.zip", _FROM_VIDEO),
            Archive("gt_trainval.zip", _FROM_VIDEO),
        ),
    ),
    Published(
        "dark-zurich",
        tuple(_build_dark_zurich(*files) for files in LABEL_FILES),
        archives=(Archive("Dark_Zurich_*_anon.zip", (*_FROM_VIDEO, "corresp")),),
    ),
)


def locate_demo(folder: Path) -> tuple[Dataset, ...]:
    """The two datasets of the demonstration. The target has training labels on disk, which are not used."""

    def split(domain: str, name: str, labelled: bool) -> Split:
        labels = f"{domain}/{name}/labels/*.png" if labelled else None
        return Split(name, f"{domain}/{name}/images/*.png", labels)

    source, target = DEMO_NAMES
    return tuple(
        Dataset(name, folder, ClassTable(CITYSCAPES), CITYSCAPES_LABELS, splits)
        for name, splits in (
            (source, (split("render", "train", True), split("render", "val", True))),
            (target, (split("camera", "train", False), split("camera", "val", True))),
        )
    )
