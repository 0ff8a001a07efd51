"""The prepared dataset on disk."""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluda_cli.data.index import Index, Item, class_frequencies, find, read_stamp, seen_classes
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
    "content",
    ["", "[1, 2]", '{"format": 2}', '{"format": 1}', '{"format": 99}', "[" * 99_999, '{"format": 1e999}', "\0"],
    ids=["empty", "list", "no keys", "older", "newer", "deep", "infinite", "NUL"],
)
def test_a_broken_index_is_reported_as_such(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "prepared" / "town"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json.*cluda prepare"):
        Index.load(folder)


Change = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, Change] = {
    "short row": lambda content: content["splits"]["train"].__setitem__(0, ["only a name"]),
    "id beyond the classes": lambda content: content["splits"]["train"][0].__setitem__(3, {"3": 1}),
    "negative id": lambda content: content["splits"]["train"][0].__setitem__(3, {"-1": 1}),
    "more pixels than the image": lambda content: content["splits"]["train"][0].__setitem__(3, {"0": 25}),
    "huge width": lambda content: content["splits"]["train"][0].__setitem__(2, [4, 10**12]),
    "no height": lambda content: content["splits"]["train"][0].__setitem__(2, [0, 6]),
    "NUL in a path": lambda content: content["splits"]["train"][0].__setitem__(0, "a\0.png"),
    "number for a path": lambda content: content["splits"]["train"][0].__setitem__(0, 7),
    "long number": lambda content: content.update(margins=[10**4000, 0, 0, 0]),
    "margins of another number": lambda content: content.update(margins=[1, 2]),
    "no root": lambda content: content.update(roots=[]),
    "two classes of one name": lambda content: content["classes"][0].update(name=content["classes"][1]["name"]),
    "no such color": lambda content: content["classes"][0].update(color=[0, 0, 256]),
    "no classes": lambda content: content.update(classes=[]),
    "other counts": lambda content: content["splits"]["train"][0].__setitem__(3, {"0": 19, "2": 4}),
    "split of no list": lambda content: content["splits"].update(train=3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    index = make_index(tmp_path)
    index.save()
    content = json.loads((index.folder / "index.json").read_text())
    DAMAGES[damage](content)
    (index.folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"(not a readable index|damaged).*cluda prepare DESCRIPTION.toml") as caught:
        Index.load(index.folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_random_damage_to_an_index_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    index.save()
    path, draw = index.folder / "index.json", random.Random(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        content, where = bytearray(whole), draw.randrange(len(whole))
        length = draw.choice([0, 1, 1, 20])
        content[where : where + length] = draw.randbytes(draw.choice([1, 1, 5]))
        path.write_bytes(content)
        try:
            assert (again := Index.load(index.folder)).splits == index.splits and again.classes == index.classes
        except DataError:
            refused += 1
    assert refused > 200


def test_files_that_changed_since_they_were_prepared_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = make_index(tmp_path)
    for item in index.splits["train"]:
        for path in (index.image_path(item), index.label_path(item)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"12345")
    items = [
        dataclasses.replace(item, stamp=(*read_stamp(index.image_path(item)), *read_stamp(index.label_path(item))))
        for item in index.splits["train"]
    ]
    index = dataclasses.replace(index, splits={"train": tuple(items)})
    index.save()
    index = Index.load(index.folder)
    index.check_files()
    assert capsys.readouterr().err == ""
    os.utime(index.image_path(items[0]), (1, 1))
    index.check_files()
    assert "1 files have another time than when the dataset was made and the same size" in capsys.readouterr().err
    index.label_path(items[1]).write_bytes(b"1234")
    with pytest.raises(DataError, match=r"1 files changed .*b\.png \(5 bytes then, 4 now\) -> run `cluda prepare"):
        index.check_files()
    index.image_path(items[0]).unlink()
    with pytest.raises(DataError, match="2 files changed"):
        index.check_files()


def test_files_without_a_record_are_not_compared(tmp_path: Path) -> None:
    make_index(tmp_path).check_files()  # none of them exists


def test_an_unprepared_dataset_names_the_command(tmp_path: Path) -> None:
    make_index(tmp_path).save()
    with pytest.raises(DataError, match=r"cluda prepare gta .*prepared: town"):
        find("gta", tmp_path)
    with pytest.raises(DataError, match=r"cluda prepare demo "):
        find("demo-camera", tmp_path)
