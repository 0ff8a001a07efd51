"""What the JSON files of a prepared folder may hold: every value is checked, and the first wrong one is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluda_cli.data.stored import CacheFile, IndexFile, ManifestFile, read_classes, read_stored

ROAD = {"name": "road", "color": [1, 2, 3], "label_id": 7}
INDEX: dict[str, Any] = {
    "format": 2,
    "name": "town",
    "roots": ["../../town"],
    "fingerprint": "0" * 16,
    "classes": [ROAD],
    "margins": [0, 0, 0, 0],
    "splits": {
        "train": [["a.png", "labels/a.png", [4, 5], {"0": 20}, [1, 2, 3, 4]], ["b.png", None, [4, 5], {}, None]]
    },
}


def write(folder: Path, content: object) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(content))
    return path


def test_a_whole_index_is_read(tmp_path: Path) -> None:
    stored = read_stored(write(tmp_path, INDEX), IndexFile)
    assert stored.splits["train"][0][3] == {0: 20} and stored.splits["train"][1][1] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roots": []}, "roots: "),
        ({"margins": [0, 0, 0, -1]}, "margins.3: "),
        ({"name": "a\0b"}, "name: .*NUL"),
        ({"splits": {"train": [["a.png", None, [0, 5], {}, None]]}}, "splits.train.0.2.0: "),
        ({"splits": {"train": [["a.png", None, [60000, 60000], {}, None]]}}, "more than an image can have"),
        ({"splits": {"train": [["a.png", "l.png", [4, 5], {"0": 21}, None]]}}, "more labelled pixels than the image"),
        ({"splits": {"train": [["a.png", "l.png", [4, 5], {"1": 2}, None]]}}, "train id 1, but there are 1 classes"),
    ],
)
def test_a_wrong_value_of_an_index_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_stored(write(tmp_path, INDEX | change), IndexFile)


@pytest.mark.parametrize("model", [IndexFile, ManifestFile, CacheFile])
@pytest.mark.parametrize(
    "text", ["", "[", "null", "[]", "[" * 100_000, '{"inputs": 1e999}', "{" + '"format": ' + "9" * 5000]
)
def test_hostile_json_is_a_value_error(tmp_path: Path, model: Any, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_stored(path, model)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file: manifest.json"):
        read_stored(tmp_path / "manifest.json", ManifestFile)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "classes: "),
        ([ROAD | {"color": [1, 2, 300]}], "classes: 0.color.2"),
        ([ROAD, ROAD], "two have the same name"),
        ([{"name": "road"}], "classes: 0.color"),
        ("road", "classes: "),
    ],
)
def test_wrong_classes_are_named(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_classes(rows)
