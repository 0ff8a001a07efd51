"""The prepared dataset on disk."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cluda_cli.data.index import Index, Item, class_frequencies, find, seen_classes
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.errors import DataError


def make_index(data_root: Path, name: str = "town") -> Index:
    items = (
        Item("images/a.png", "labels/train/a.png", (4, 6), {0: 20, 2: 4}),
        Item("images/b.png", "labels/train/b.png", (4, 6), {2: 24}),
    )
    unlabelled = (Item("images/c.png", None, (5, 5)),)
    return Index(
        name=name,
        folder=data_root / "prepared" / name,
        root=data_root / name,
        classes=ClassTable(CITYSCAPES[:3]),
        splits={"train": items, "val": unlabelled},
        margins=(1, 2, 3, 4),
    )


def test_round_trip(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    index.save()
    assert Index.load(index.folder) == index


def test_a_moved_data_root_still_finds_its_images(tmp_path: Path) -> None:
    make_index(tmp_path / "here").save()
    shutil.move(tmp_path / "here", tmp_path / "there")
    index = find("town", tmp_path / "there")
    assert index.image_path(index.split("train")[0]) == tmp_path / "there" / "town" / "images" / "a.png"
    assert index.label_path(index.split("train")[0]) == index.folder / "labels" / "train" / "a.png"


def test_fingerprint_changes_with_the_data_and_not_with_the_place(tmp_path: Path) -> None:
    index, elsewhere = make_index(tmp_path / "here"), make_index(tmp_path / "there")
    assert index.fingerprint == elsewhere.fingerprint
    changed = dataclasses.replace(index.splits["train"][0], pixels={0: 19, 2: 5})
    other = dataclasses.replace(index, splits={**index.splits, "train": (changed, index.splits["train"][1])})
    assert other.fingerprint != index.fingerprint
    assert dataclasses.replace(index, margins=(0, 0, 0, 0)).fingerprint != index.fingerprint


def test_frequencies_follow_the_shares_of_the_sources(tmp_path: Path) -> None:
    first = make_index(tmp_path)
    items = (Item("images/d.png", "labels/train/d.png", (5, 5), {0: 25}),)
    second = dataclasses.replace(first, name="city", classes=ClassTable(CITYSCAPES[1:3]), splits={"train": items})
    assert class_frequencies([first]) == [20 / 48, 0, 28 / 48]
    assert class_frequencies([first, second]) == pytest.approx([20 / 73, 25 / 73, 28 / 73])
    # Each source's images hold 24 and 25 pixels on average; equal shares draw both equally often.
    assert class_frequencies([first, second], (1.0, 1.0)) == pytest.approx([10 / 49, 25 / 49, 14 / 49])


def test_statistics_add_up_over_a_split(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    assert index.class_pixels("train") == [20, 0, 28]
    assert seen_classes([index]) == ("road", "building")
    assert len(index.labelled("train")) == 2
    assert index.labelled("val") == ()


def test_a_missing_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no images in split "test".*train \(2\), val \(1\)'):
        make_index(tmp_path).split("test")


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"format": 1}', '{"format": 99}'], ids=["empty", "list", "no keys", "newer"]
)
def test_a_broken_index_is_reported_as_such(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "prepared" / "town"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json.*cluda prepare"):
        Index.load(folder)


def test_an_index_of_strange_items_is_reported_as_such(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    index.save()
    content = json.loads((index.folder / "index.json").read_text())
    content["splits"]["train"][0] = ["only a name"]
    (index.folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a readable index"):
        Index.load(index.folder)


def test_an_unprepared_dataset_names_the_command(tmp_path: Path) -> None:
    make_index(tmp_path).save()
    with pytest.raises(DataError, match=r"cluda prepare gta .*prepared: town"):
        find("gta", tmp_path)
    with pytest.raises(DataError, match=r"cluda prepare demo "):
        find("demo-camera", tmp_path)
