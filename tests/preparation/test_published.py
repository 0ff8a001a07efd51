"""Every published dataset, in the layout and with the kind of files that its publisher gives."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluda_cli.data.index import PUBLISHED_NAMES
from cluda_cli.data.labels import CAMVID, CITYSCAPES, IGNORE, ClassTable
from cluda_cli.errors import DataError
from cluda_cli.preparation.archives import Archive
from cluda_cli.preparation.pairing import Pair, find_pairs
from cluda_cli.preparation.problems import Kind
from cluda_cli.preparation.published import PUBLISHED, TRAIN_ID_LABELS, Dataset, Published, locate_demo

BY_NAME = {published.name: published for published in PUBLISHED}
CAR = 26  # Cityscapes label id, train id 13
VIDEO = "GOPR0475/GOPR0475_frame_000041"


def image(path: Path) -> None:
    save(path, np.zeros((2, 3, 3), dtype=np.uint8))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ids(path: Path, value: int) -> None:
    save(path, np.full((2, 3), value, dtype=np.uint8))


def palette_ids(path: Path, value: int) -> None:
    """8-bit palette PNG whose palette is not the order of the ids, as in GTA5."""
    picture = Image.new("P", (3, 2), value)
    picture.putpalette([255 - i // 3 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def sixteen_bit_ids(path: Path, value: int) -> None:
    """16-bit RGB PNG: class, instance, 0."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress((b"\0" + struct.pack(">3H", value, 700, 0) * 3) * 2)),
        (b"IEND", b""),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ))  # fmt: skip


def located(name: str, data_root: Path) -> tuple[Dataset, dict[str, list[Pair]]]:
    """The dataset and its pairs by split; nothing may be wrong, but a split may be left out."""
    dataset = BY_NAME[name].locate(data_root)
    found = find_pairs(dataset.root, dataset.splits)
    assert {problem.kind for problem in found.problems} <= {Kind.NOT_THERE, Kind.NO_REFERENCE}
    splits = {split.name: [pair for pair in found.pairs if pair.split == split.name] for split in dataset.splits}
    return dataset, splits


def value_of(dataset: Dataset, pair: Pair) -> int:
    """The train id of a label that holds one class."""
    assert dataset.reader and pair.label
    (value,) = np.unique(dataset.reader.read(dataset.root / pair.label).train_ids)
    return int(value)


def test_gta(tmp_path: Path) -> None:
    image(tmp_path / "gta/images/00001.png")
    palette_ids(tmp_path / "gta/labels/00001.png", CAR)
    ids(tmp_path / "gta/labels/00001_labelTrainIds.png", 13)
    dataset, splits = located("gta", tmp_path)
    (pair,) = splits["train"]
    assert (pair.image, pair.label, pair.stem) == ("images/00001.png", "labels/00001.png", "00001")
    assert value_of(dataset, pair) == 13
    assert dataset.margins == (0, 0, 0, 0)
    assert dataset.classes == ClassTable(CITYSCAPES)


@pytest.mark.parametrize("prefix", ["", "RAND_CITYSCAPES/"])
def test_synthia(tmp_path: Path, prefix: str) -> None:
    image(tmp_path / f"synthia/{prefix}RGB/0000000.png")
    sixteen_bit_ids(tmp_path / f"synthia/{prefix}GT/LABELS/0000000.png", 8)
    dataset, splits = located("synthia", tmp_path)
    assert value_of(dataset, splits["train"][0]) == 13


@pytest.mark.parametrize(("suffix", "value"), [("labelIds", CAR), ("labelTrainIds", 13)])
def test_cityscapes(tmp_path: Path, suffix: str, value: int) -> None:
    for split, city in (("train", "aachen"), ("val", "munster"), ("test", "berlin")):
        image(tmp_path / f"cityscapes/leftImg8bit/{split}/{city}/{city}_000000_000019_leftImg8bit.png")
        ids(tmp_path / f"cityscapes/gtFine/{split}/{city}/{city}_000000_000019_gtFine_{suffix}.png", value)
        image(tmp_path / f"cityscapes/gtFine/{split}/{city}/{city}_000000_000019_gtFine_color.png")
    dataset, splits = located("cityscapes", tmp_path)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [1, 1, 1]
    assert [splits[name][0].label is None for name in ("train", "val", "test")] == [False, False, True]
    assert value_of(dataset, splits["val"][0]) == 13
    assert dataset.margins == (30, 240, 0, 0)


@pytest.mark.parametrize(("suffix", "value"), [("labelIds", CAR), ("labelTrainIds", 13)])
@pytest.mark.parametrize("nested", [True, False], ids=["published", "flat"])
def test_acdc(tmp_path: Path, suffix: str, value: int, nested: bool) -> None:
    for split in ("train", "val", "test"):
        for condition in ("fog", "night"):
            place = f"{condition}/{split}/{VIDEO}_{condition}" if nested else f"{split}/{condition}"
            image(tmp_path / f"acdc/rgb_anon/{place}_rgb_anon.png")
            if split != "test":
                ids(tmp_path / f"acdc/gt/{place}_gt_{suffix}.png", value)
    image(tmp_path / f"acdc/rgb_anon/fog/train_ref/{VIDEO}_rgb_ref_anon.png")
    dataset, splits = located("acdc", tmp_path)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert value_of(dataset, splits["train"][1]) == 13
    assert splits["test"][0].label is None


def test_acdc_ships_pairs(tmp_path: Path) -> None:
    for condition in ("fog", "night"):
        image(tmp_path / f"acdc/rgb_anon/{condition}/train/{VIDEO}_rgb_anon.png")
        ids(tmp_path / f"acdc/gt/{condition}/train/{VIDEO}_gt_labelIds.png", CAR)
    image(tmp_path / f"acdc/rgb_anon/fog/train_ref/{VIDEO}_rgb_ref_anon.png")
    _, splits = located("acdc", tmp_path)
    pairs = {pair.image: pair.reference for pair in splits["train"]}
    assert pairs == {
        f"rgb_anon/fog/train/{VIDEO}_rgb_anon.png": f"rgb_anon/fog/train_ref/{VIDEO}_rgb_ref_anon.png",
        f"rgb_anon/night/train/{VIDEO}_rgb_anon.png": None,
    }


def test_dark_zurich_lists_pairs(tmp_path: Path) -> None:
    root = tmp_path / "dark_zurich"
    night, day = "train/night/GOPR0351/GOPR0351_frame_000159", "train/day/GOPR0345/GOPR0345_frame_001206"
    for place in (night, day, "train/night/GOPR0351/GOPR0351_frame_000160"):
        image(root / f"rgb_anon/{place}_rgb_anon.png")
    (root / "corresp/train/night").mkdir(parents=True)
    (root / "corresp/train/night/GOPR0351.csv").write_text(f"{night},{day}\n")
    _, splits = located("dark-zurich", tmp_path)
    assert [pair.reference for pair in splits["train"]] == [f"rgb_anon/{day}_rgb_anon.png", None]


def test_label_ids_are_preferred_to_train_ids(tmp_path: Path) -> None:
    image(tmp_path / f"acdc/rgb_anon/fog/train/{VIDEO}_rgb_anon.png")
    ids(tmp_path / f"acdc/gt/fog/train/{VIDEO}_gt_labelIds.png", CAR)
    ids(tmp_path / f"acdc/gt/fog/train/{VIDEO}_gt_labelTrainIds.png", 13)
    dataset, splits = located("acdc", tmp_path)
    assert splits["train"][0].label == f"gt/fog/train/{VIDEO}_gt_labelIds.png"
    assert value_of(dataset, splits["train"][0]) == 13


@pytest.mark.parametrize("folder", ["dark_zurich", "dark-zurich"])
@pytest.mark.parametrize(("suffix", "value"), [("labelIds", CAR), ("labelTrainIds", 13)])
def test_dark_zurich(tmp_path: Path, folder: str, suffix: str, value: int) -> None:
    for split, time in (("train", "day"), ("train", "night"), ("val", "night"), ("test", "night")):
        image(tmp_path / f"{folder}/rgb_anon/{split}/{time}/{VIDEO}_rgb_anon.png")
    image(tmp_path / f"{folder}/rgb_anon/val_ref/day/{VIDEO}_ref_rgb_anon.png")
    ids(tmp_path / f"{folder}/gt/val/night/{VIDEO}_gt_{suffix}.png", value)
    dataset, splits = located("dark-zurich", tmp_path)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 1, "val": 1, "test": 1}
    assert splits["train"][0].label is None
    assert value_of(dataset, splits["val"][0]) == 13
    assert dataset.name == "dark-zurich"


def test_camvid_as_published(tmp_path: Path) -> None:
    for stem in ("0001TP_006690", "0001TP_008550", "0006R0_f00930", "0016E5_00390", "0016E5_07959", "Seq05VD_f00000"):
        image(tmp_path / f"camvid/701_StillsRaw_full/{stem}.png")
        save(
            tmp_path / f"camvid/LabeledApproved_full/{stem}_L.png",
            np.full((2, 3, 3), (192, 128, 192), dtype=np.uint8),  # truck or bus
        )
    dataset, splits = located("camvid", tmp_path)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 3, "val": 1, "test": 2}
    assert dataset.classes.names[value_of(dataset, splits["val"][0])] == "car"
    assert dataset.classes == ClassTable(CAMVID)


def test_camvid_as_in_segnet(tmp_path: Path) -> None:
    for split, value in (("train", 8), ("val", 11), ("test", 0)):
        image(tmp_path / f"camvid/{split}/{split}.png")
        ids(tmp_path / f"camvid/{split}annot/{split}.png", value)
    dataset, splits = located("camvid", tmp_path)
    assert [value_of(dataset, splits[name][0]) for name in ("train", "val", "test")] == [8, IGNORE, 0]


def test_demo(tmp_path: Path) -> None:
    for domain in ("render", "camera"):
        for split in ("train", "val"):
            image(tmp_path / domain / split / "images/0.png")
            ids(tmp_path / domain / split / "labels/0.png", CAR)
    render, camera = locate_demo(tmp_path)
    labelled = {
        dataset.name: [pair.label is not None for pair in find_pairs(dataset.root, dataset.splits).pairs]
        for dataset in (render, camera)
    }
    assert labelled == {"demo-render": [True, True], "demo-camera": [False, True]}


def test_train_id_files_are_read_as_they_are() -> None:
    assert list(TRAIN_ID_LABELS.table[:19]) == list(range(19))
    assert set(TRAIN_ID_LABELS.table[19:]) == {IGNORE}


def test_every_known_name_is_a_published_dataset() -> None:
    assert tuple(BY_NAME) == PUBLISHED_NAMES


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_nothing_there_says_what_is_expected(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        BY_NAME[name].locate(tmp_path)
    assert BY_NAME[name].layouts[0].splits[0].images in caught.value.what
    assert BY_NAME[name].archives[0].files in caught.value.remedy


def test_archives_and_layouts_name_the_same_folders() -> None:
    """What an archive unpacks to must be where the published layouts look."""

    def tops(published: Published) -> set[str]:
        patterns = [
            pattern
            for layout in published.layouts
            if layout.as_published
            for split in layout.splits
            for pattern in (split.images, split.labels, split.references, split.pairs)
            if pattern
        ]
        return {pattern.split("/")[0] for pattern in patterns}

    def unpacked(archives: tuple[Archive, ...]) -> set[str]:
        return {folder for archive in archives for folder in archive.folders}

    for published in PUBLISHED:
        assert tops(published) == unpacked(published.archives), published.name
