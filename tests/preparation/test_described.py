"""Users' own data, described in TOML."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluda_cli.data.labels import CITYSCAPES, IGNORE
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.preparation.described import generate_color, parse_color, read_description
from cluda_cli.preparation.label_files import ColorLabels
from cluda_cli.preparation.pairing import find_pairs

MINIMAL = """
[ids]
0 = "road"
1 = "tram"
4 = "road"
[splits.train]
images = "images/*.jpg"
labels = "labels/*.png"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mycity.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read_description(write(folder, text))
    assert str(folder / "mycity.toml") in str(caught.value)
    return caught.value.what


def test_defaults(tmp_path: Path) -> None:
    dataset = read_description(write(tmp_path, MINIMAL))
    assert (dataset.name, dataset.root, dataset.margins) == ("mycity", tmp_path.resolve(), (0, 0, 0, 0))
    assert dataset.classes.names == ("road", "tram")
    assert [c.label_id for c in dataset.classes.classes] == [0, 1]
    assert dataset.classes.classes[0].color == (128, 64, 128)
    assert dataset.classes.things() == ()


def test_several_ids_share_a_class_and_ignored_ones_are_known(tmp_path: Path) -> None:
    dataset = read_description(write(tmp_path, "ignore = [255, 9]\n" + MINIMAL))
    assert dataset.reader
    Image.fromarray(np.array([[0, 1, 4, 9, 255]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert dataset.reader.read(tmp_path / "a.png").train_ids.tolist() == [[0, 1, 0, IGNORE, IGNORE]]


def test_colors_things_palette_and_margins(tmp_path: Path) -> None:
    dataset = read_description(write(tmp_path, """
name = "other"
root = "raw"
ignore = ["#000000"]
margins = [1, 2, 3, 4]
things = ["tram"]
[colors]
"128, 64,128" = "street"
"#0000ff" = "tram"
"1,2,3" = "street"
[palette]
tram = [9, 8, 7]
[splits.val]
images = "*.png"
labels = "labels/*.png"
""")) if (tmp_path / "raw").mkdir() is None else None  # fmt: skip
    assert dataset and isinstance(dataset.reader, ColorLabels)
    assert (dataset.name, dataset.root, dataset.margins) == ("other", (tmp_path / "raw").resolve(), (1, 2, 3, 4))
    assert [c.color for c in dataset.classes.classes] == [(128, 64, 128), (9, 8, 7)]
    assert [c.label_id for c in dataset.classes.classes] == [0, 1]
    assert dataset.classes.things() == (1,)
    Image.fromarray(np.array([[(1, 2, 3), (0, 0, 255), (0, 0, 0)]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert dataset.reader.read(tmp_path / "a.png").train_ids.tolist() == [[0, 1, IGNORE]]


def test_things_are_known_by_their_cityscapes_names(tmp_path: Path) -> None:
    dataset = read_description(write(tmp_path, MINIMAL.replace("tram", "car")))
    assert dataset.classes.things() == (1,)


def test_unlabelled_data_need_no_classes(tmp_path: Path) -> None:
    dataset = read_description(write(tmp_path, '[splits.train]\nimages = "*.jpg"'))
    assert dataset.reader is None
    assert dataset.classes.classes == CITYSCAPES


@pytest.mark.parametrize("line", ["01", "01.png", "01.pgm", "images/01", "images\\01.png"])
def test_a_list_names_images_in_several_ways(tmp_path: Path, line: str) -> None:
    (tmp_path / "images").mkdir()
    for name in ("01.jpg", "02.jpg"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "train.txt").write_text(f"\ufeff{line}\r\n\r\n", encoding="utf-8")
    dataset = read_description(write(tmp_path, '[splits.train]\nimages = "images/*.jpg"\nlist = "train.txt"'))
    found = find_pairs(dataset.root, dataset.splits)
    assert [pair.image for pair in found.pairs] == ["images/01.jpg"]
    assert found.problems == []


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = problems(tmp_path, """
nmae = "x"
margins = [1, 2, -3, 4]
ignore = 255
[ids]
0 = 3
[splits.train]
image = "*.png"
labels = "../labels/*.png"
[splits."a/b"]
images = "images/"
""")  # fmt: skip
    for expected in (
        'nmae: no such key, did you mean "name"?', "margins.2: ", "ignore: ", "ids.0: ",
        "splits.train.images: is needed",
        'splits.train.image: no such key, did you mean "images"?', "splits.train.labels: patterns lie below root",
        "splits.a/b", "the pattern names a folder",
    ):  # fmt: skip
        assert expected in text, expected
    assert len(text.splitlines()) == 9


def test_inconsistent_classes_are_reported_at_once(tmp_path: Path) -> None:
    text = problems(tmp_path, """
ignore = [1, 300]
things = ["raod"]
[ids]
1 = "road"
x = "car"
[palette]
bus = [1, 2, 3]
[splits.train]
images = "*.png"
labels = "l/*.png"
""")  # fmt: skip
    assert text.splitlines() == [
        'ids: "x" is no label id; ids are whole numbers from 0 to 255',
        'ignore: "1" is already given in ids',
        'ignore: "300" is no label id; ids are whole numbers from 0 to 255',
        'things: no class "raod", did you mean "road"?',
        'palette: no class "bus"',
    ]


def test_labels_need_classes_of_one_kind(tmp_path: Path) -> None:
    assert "need a table [ids] or [colors]" in problems(
        tmp_path, '[splits.train]\nimages = "*.png"\nlabels = "l/*.png"'
    )
    assert "give one of them" in problems(tmp_path, MINIMAL + '\n[colors]\n"1,2,3" = "road"')


@pytest.mark.parametrize(("text", "words"), [("name = ", "cannot be read"), ("", "splits: is needed")])
def test_files_without_sense(tmp_path: Path, text: str, words: str) -> None:
    assert words in problems(tmp_path, text)


def test_missing_folder_and_list_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*correct root in"):
        read_description(write(tmp_path, 'root = "gone"\n' + MINIMAL))
    with pytest.raises(DataError, match="list of split train cannot be read"):
        read_description(write(tmp_path, MINIMAL + '\nlist = "gone.txt"'))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "mycity.toml").write_text(MINIMAL, encoding="utf-8-sig")
    assert read_description(tmp_path / "mycity.toml").classes.names == ("road", "tram")


def test_one_class_is_too_few(tmp_path: Path) -> None:
    text = problems(tmp_path, MINIMAL.replace("tram", "road"))
    assert text.startswith('the only class is "road", so that every prediction would be right')


def test_orientation_and_tolerance_reach_the_readers(tmp_path: Path) -> None:
    text = MINIMAL.replace("[ids]", '[colors]\n"1,2,3" = "road"\n"#ffffff" = "sky"\n[palette]').split("0 =")[0]
    text += '[splits.train]\nimages = "i/*.png"\nlabels = "l/*.png"'
    dataset = read_description(write(tmp_path, "color_tolerance = 9\nlabels_upright = true\n" + text))
    assert isinstance(dataset.reader, ColorLabels) and dataset.reader.tolerance == 9 and dataset.labels_upright
    assert "color_tolerance: is for labels of colours" in problems(tmp_path, "color_tolerance = 9\n" + MINIMAL)
    assert "color_tolerance: " in problems(tmp_path, "color_tolerance = 999\n" + text)


@pytest.mark.parametrize("line", ["a.png b.png", "i/a.JPG,l/a.png", "a\tb", "a.jpg 3", "a.png ; b.png"])
def test_a_list_of_several_columns_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.txt").write_text(f"first.png\n{line}\n")
    with pytest.raises(DataError, match="line 2 of the list of split train has several columns"):
        read_description(write(tmp_path, '[splits.train]\nimages = "images/*.jpg"\nlist = "train.txt"'))


@pytest.mark.parametrize("line", ["a b.png", "a, b", "my photo", "a.b c"])
def test_a_name_with_spaces_is_one_column(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.txt").write_text(line)
    dataset = read_description(write(tmp_path, '[splits.train]\nimages = "images/*.jpg"\nlist = "train.txt"'))
    assert dataset.splits[0].listed == {line.removesuffix(".png")}


def test_a_list_that_is_a_pipe_is_an_error_not_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(DataError, match="list of split train cannot be read"):
        read_description(write(tmp_path, '[splits.train]\nimages = "images/*.jpg"\nlist = "train.txt"'))


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000 + "]" * 5000,
        "margins = [" + "9" * 5000 + ", 0, 0, 0]",
        "margins = [0x" + "f" * 9000 + ", 0, 0, -1]",
        "margins = [inf, 0, 0, 0]",
        'root = "a\\u0000b"',
        'root = "' + "9" * 9000 + '"',
        'name = "a\\nb"',
        'name = "' + "a" * 300 + '"',
        '[ids]\n0 = "a\\u001bb"\n1 = " "',
        '[splits.train]\nimages = "[z-a]*.png"',
        '[splits.train]\nimages = "a\\u0000/*.png"',
        '[splits.train]\nimages = "i/*.png"\nlist = "a\\u0000"',
    ],
    ids=[
        "deep",
        "long",
        "long hex",
        "inf",
        "NUL",
        "long root",
        "newline",
        "long name",
        "control",
        "range",
        "NUL glob",
        "NUL list",
    ],
)
def test_hostile_descriptions_are_settings_errors(tmp_path: Path, text: str) -> None:
    assert len(problems(tmp_path, text)) < 1000


def test_colors_are_written_in_two_ways() -> None:
    assert parse_color("#804080") == parse_color("128, 64, 128") == (128, 64, 128)
    for wrong in ("128,64", "256,0,0", "#12345", "red", "-1,2,3"):
        with pytest.raises(ValueError, match="no colour"):
            parse_color(wrong)


def test_generated_colors_differ() -> None:
    assert len({generate_color(i) for i in range(50)}) == 50
