"""`cluda prepare` from raw files to an index, and everything it must tell."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluda_cli.cli import app
from cluda_cli.commands.prepare import prepare
from cluda_cli.data.cache import choose_cache
from cluda_cli.data.index import Index, find
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import locked
from cluda_cli.preparation import conversion

DESCRIPTION = """
root = "raw"
ignore = [255]
margins = [1, 2, 0, 0]
[ids]
5 = "road"
6 = "car"
[splits.train]
images = "train/*.png"
labels = "train_labels/*.png"
[splits.val]
images = "val/*.png"
"""
CITY = [[5, 5, 6], [255, 5, 6]]  # H W


@pytest.fixture
def town(tmp_path: Path) -> Path:
    """Three labelled images and an unlabelled one, described by the TOML file that is returned."""
    for name in "abc":
        image(tmp_path / f"raw/train/{name}.png")
        label(tmp_path / f"raw/train_labels/{name}.png", CITY)
    image(tmp_path / "raw/val/v.png")
    (tmp_path / "town.toml").write_text(DESCRIPTION)
    return tmp_path / "town.toml"


def image(path: Path, size: tuple[int, int] = (2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def label(path: Path, ids: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(ids, dtype=np.uint8)).save(path)


def run(town: Path, **options: bool) -> Index:
    (index,) = prepare(str(town), town.parent / "data", workers=1, **options)
    return index


def state(folder: Path) -> dict[str, int]:
    """Every file below a folder with the time at which it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_writes_an_index_and_train_id_maps(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = run(town)
    assert index == Index.load(town.parent / "data" / "prepared" / "town")
    assert index.classes.names == ("road", "car")
    assert index.margins == (1, 2, 0, 0)
    item = index.split("train")[0]
    assert (item.size, item.pixels) == ((2, 3), {0: 3, 1: 2})
    assert index.image_path(item).is_file()
    with Image.open(index.label_path(item)) as stored:
        assert stored.mode == "L"
        assert np.asarray(stored).tolist() == [[0, 0, 1], [255, 0, 1]]
    assert [item.label for item in index.split("val")] == [None]
    out = capsys.readouterr().out
    assert "60.00" in out and "40.00" in out
    assert out.endswith("prepare the other domain too, and train with --source and --target\n")


def test_a_second_run_does_nothing(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(town)
    before = state(town.parent)
    capsys.readouterr()
    assert run(town) == first
    assert state(town.parent) == before
    assert "up to date (3 train, 1 val)" in capsys.readouterr().out


def test_a_dataset_that_another_process_prepares_is_not_touched(town: Path) -> None:
    with locked(town.parent / "data" / "prepared" / "town", ""), pytest.raises(SettingsError, match="another process"):
        run(town)


def test_only_what_changed_is_converted_again(town: Path) -> None:
    labels = run(town).folder / "labels" / "train"
    before = state(labels)
    label(town.parent / "raw/train_labels/b.png", [[6, 6, 6], [6, 6, 6]])
    index = run(town)
    assert {name for name, time in state(labels).items() if time != before[name]} == {"b.png"}
    assert [item.pixels for item in index.split("train")] == [{0: 3, 1: 2}, {1: 6}, {0: 3, 1: 2}]


def test_another_class_table_converts_everything_again(town: Path) -> None:
    run(town)
    town.write_text(DESCRIPTION.replace('5 = "road"\n6 = "car"', '6 = "car"\n5 = "road"'))
    assert run(town).split("train")[0].pixels == {0: 2, 1: 3}


def test_an_interrupted_run_goes_on_where_it_stopped(town: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stop_at_c(job: conversion.Conversion) -> conversion.Outcome:
        if job.pair.stem == "c":
            raise KeyboardInterrupt
        return conversion_of(job)

    def note(job: conversion.Conversion) -> conversion.Outcome:
        seen.append(job.pair.stem)
        return conversion_of(job)

    conversion_of = conversion.convert
    monkeypatch.setattr(conversion, "convert", stop_at_c)
    with pytest.raises(KeyboardInterrupt):
        run(town)
    folder = town.parent / "data" / "prepared" / "town"
    assert not (folder / "index.json").exists()
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('["cut sho')
    monkeypatch.setattr(conversion, "convert", note)
    assert len(run(town).split("train")) == 3
    assert seen == ["c", "v"]


def test_a_map_of_an_interrupted_run_is_not_taken_for_that_of_an_earlier_one(
    town: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other classes, stopped half-way, and back to the first classes: every map must be of the first classes."""

    def stop_at_c(job: conversion.Conversion) -> conversion.Outcome:
        if job.pair.stem == "c":
            raise KeyboardInterrupt
        return conversion_of(job)

    conversion_of = conversion.convert
    first = run(town)
    town.write_text(DESCRIPTION.replace('5 = "road"\n6 = "car"', '6 = "car"\n5 = "road"'))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(conversion, "convert", stop_at_c)
        run(town)
    town.write_text(DESCRIPTION)
    assert run(town) == first
    for item in first.labelled("train"):
        with Image.open(first.label_path(item)) as stored:
            assert np.asarray(stored).tolist() == [[0, 0, 1], [255, 0, 1]]


def test_a_lost_train_id_map_is_made_again(town: Path) -> None:
    index = run(town)
    path = index.label_path(index.split("train")[1])
    path.unlink()
    assert run(town) == index
    assert path.is_file()


def test_check_writes_nothing(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(town.parent)
    index = run(town, check=True)
    assert state(town.parent) == before
    assert not (town.parent / "data").exists()
    assert index.class_pixels("train") == [9, 6]
    assert "car" in capsys.readouterr().out


def test_check_decodes_images_in_full(town: Path) -> None:
    path = town.parent / "raw/train/a.png"
    image(path, (40, 60))
    label(town.parent / "raw/train_labels/a.png", [[5] * 60] * 40)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match="1 file would spoil"):
        run(town, check=True)


def spoil(raw: Path) -> None:
    """One of everything that can be wrong."""
    image(raw / "train/lonely.png")
    label(raw / "train_labels/orphan.png", CITY)
    for name in ("size", "ids", "more_ids", "form", "lossy", "cut", "image_cut", "deep"):
        image(raw / f"train/{name}.png")
        label(raw / f"train_labels/{name}.png", CITY)
    label(raw / "train_labels/size.png", [[5]])
    label(raw / "train_labels/ids.png", [[5, 77, 77], [5, 9, 5]])
    label(raw / "train_labels/more_ids.png", [[5, 77, 5], [5, 5, 5]])
    image(raw / "train_labels/form.png")
    Image.new("L", (3, 2), 5).save(raw / "train_labels/lossy.png", format="JPEG")
    for path in (raw / "train_labels/cut.png", raw / "train/image_cut.png"):
        path.write_bytes(path.read_bytes()[:-30])
    Image.fromarray(np.zeros((2, 3), dtype=np.uint16)).save(raw / "train/deep.png")


REPORT = (
    "error: files that cannot be read: 2",
    "error: images that are not 8-bit: 1",
    "error: labels of another size than their image: 1",
    "  train_labels/size.png: 1 x 1, image 3 x 2",
    "error: labels with ids outside the class table: 2 (77 in 3 pixels, 9 in 1 pixel)",
    "  train_labels/ids.png: 77 in 2 pixels, 9 in 1 pixel",
    "error: labels in a lossy format: 1",
    "error: labels of the wrong form: 1",
    "error: images without a label: 1",
    "  train/lonely.png",
    "warning: labels without an image: 1",
    "  train_labels/orphan.png",
)


@pytest.mark.parametrize("check", [False, True])
def test_every_problem_is_reported_with_its_count(town: Path, capsys: pytest.CaptureFixture[str], check: bool) -> None:
    spoil(town.parent / "raw")
    with pytest.raises(DataError, match=r"9 files would spoil training.*--skip-bad"):
        run(town, check=check)
    lines = capsys.readouterr().out.splitlines()
    for expected in REPORT:
        assert any(line.startswith(expected) for line in lines), expected
    assert not (town.parent / "data/prepared/town/index.json").exists()


def test_errors_are_reported_again_from_the_journal(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(town.parent / "raw")
    reports = []
    for _ in range(2):
        with pytest.raises(DataError):
            run(town)
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1]


def test_skip_bad_leaves_out_the_bad_pairs_only(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(town.parent / "raw")
    index = run(town, skip_bad=True)
    assert [Path(item.image).stem for item in index.split("train")] == ["a", "b", "c", "lonely"]
    assert len(index.labelled("train")) == 3
    assert "error: labels with ids outside the class table: 2" in capsys.readouterr().out
    assert sorted(state(index.folder / "labels")) == [f"train/{name}.png" for name in "abc"]
    assert run(town, skip_bad=True) == index
    assert "up to date (4 train, 1 val, without 8 bad files)" in capsys.readouterr().out
    with pytest.raises(DataError):  # what was left out is not forgotten
        run(town)
    assert (index.folder / "index.json").is_file()


def test_nothing_usable_left_is_an_error_even_with_skip_bad(town: Path) -> None:
    for path in town.parent.glob("raw/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no usable image"):
        run(town, skip_bad=True)


def test_an_index_does_not_outlive_the_files_it_describes(town: Path) -> None:
    index = run(town)
    label(town.parent / "raw/train_labels/b.png", [[77]])
    with pytest.raises(DataError):
        run(town)
    assert not (index.folder / "index.json").exists()


def test_many_problems_of_a_kind_are_shortened(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(7):
        label(town.parent / f"raw/train_labels/x{i}.png", CITY)
    run(town, check=True)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("warning: labels without an image: 7")
    assert lines[start + 1 : start + 5] == [*(f"  train_labels/x{i}.png" for i in range(3)), "  and 4 more"]


def test_classes_that_never_occur_are_reported(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    town.write_text(DESCRIPTION.replace('6 = "car"', '6 = "car"\n7 = "tram"'))
    run(town, check=True)
    assert "warning: classes that never occur: 1\n  tram: in the labels of split train" in capsys.readouterr().out


def test_no_images_is_an_error(town: Path) -> None:
    for path in town.parent.glob("raw/*/*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"no images: split train: nothing .*raw/train holds nothing; split val: "):
        run(town)


def save_turned(path: Path, size: tuple[int, int], orientation: int) -> None:
    """A photo of a light upper left corner, stored as some phones do: turned, with a tag."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    tags = Image.Exif()
    tags[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    stored = Image.fromarray(pixels).transpose(turn)
    stored.save(path, exif=tags)


def test_a_turned_photo_that_fits_its_label_only_upright_is_turned(town: Path) -> None:
    save_turned(town.parent / "raw/train/b.png", (2, 3), orientation=6)
    with Image.open(town.parent / "raw/train/b.png") as stored:
        assert stored.size == (2, 3)  # width, height: on its side
    index = run(town)
    assert index.split("train")[1].size == (2, 3)
    pixels = read_image(index.image_path(index.split("train")[1]))
    assert pixels.shape == (3, 2, 3) and pixels[0, 0, 0] == 255


@pytest.mark.parametrize("check", [False, True])
def test_a_turned_photo_whose_label_could_lie_either_way_is_an_error_until_the_user_says(
    town: Path, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    save_turned(town.parent / "raw/train/b.png", (2, 3), orientation=3)
    with pytest.raises(DataError, match="1 file would spoil"):
        run(town, check=check)
    out = capsys.readouterr().out
    assert "error: labels of images that are stored turned: 1; set labels_upright = true" in out
    assert "EXIF orientation 3, upside down" in out
    town.write_text("labels_upright = true\n" + DESCRIPTION)
    index = run(town, check=check)
    assert read_image(index.image_path(index.split("train")[1]))[0, 0, 0] == 255


def test_a_label_drawn_on_the_stored_photo_is_an_error(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_turned(town.parent / "raw/train/b.png", (3, 2), orientation=6)
    with pytest.raises(DataError, match="1 file would spoil"):
        run(town)
    expected = "fits the image only as stored, not turned upright (EXIF orientation 6, on its side)"
    assert expected in capsys.readouterr().out


def test_masks_beside_images_are_not_taken_for_images(town: Path) -> None:
    for name in "abc":
        label(town.parent / f"raw/train/{name}_mask.png", CITY)
    town.write_text(DESCRIPTION.replace("train_labels/*.png", "train/*_mask.png"))
    index = run(town)
    assert [(item.image, item.pixels) for item in index.split("train")] == [
        (f"train/{name}.png", {0: 3, 1: 2}) for name in "abc"
    ]


def test_an_image_without_a_label_is_an_error_unless_the_user_says_so(town: Path) -> None:
    image(town.parent / "raw/train/lonely.png")
    with pytest.raises(DataError, match="1 file would spoil"):
        run(town)
    index = run(town, skip_bad=True)
    assert [item.label is None for item in index.split("train")] == [False, False, False, True]
    with pytest.raises(DataError, match="1 file would spoil"):  # also when nothing has changed
        run(town)


def test_a_split_that_vanishes_is_an_error(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    town.write_text(DESCRIPTION.replace("val/*.png", "valid/*.png"))
    with pytest.raises(DataError, match="1 file would spoil"):
        run(town)
    out = capsys.readouterr().out
    assert "error: splits without images: 1" in out
    assert "  val: there is no folder valid in" in out and "only train, train_labels, val" in out
    assert list(run(town, skip_bad=True).splits) == ["train"]
    assert "left out" not in capsys.readouterr().out


def test_skip_bad_keeps_images_whose_labels_hold_no_class_as_unlabelled(
    town: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        label(town.parent / f"raw/train_labels/{name}.png", [[255] * 3] * 2)
    index = run(town, skip_bad=True)
    assert "left out" not in capsys.readouterr().out
    assert [(item.label, item.pixels) for item in index.split("train")] == [(None, {})] * 3
    assert run(town, skip_bad=True) == index  # up to date
    assert "up to date (3 train, " in (out := capsys.readouterr().out) and "bad files" not in out
    for name in "abc":
        label(town.parent / f"raw/train_labels/{name}.png", CITY)
    assert len(run(town).labelled("train")) == 3


def test_a_list_with_folders_finds_images_and_labels(town: Path) -> None:
    (town.parent / "raw/train.txt").write_text("train/a.png\ntrain/c.png\n")
    town.write_text(DESCRIPTION.replace("[splits.val]", 'list = "train.txt"\n[splits.val]'))
    assert [item.image for item in run(town).labelled("train")] == ["train/a.png", "train/c.png"]


@pytest.mark.parametrize("ids", [5, 255])
def test_labels_of_one_class_or_none_are_reported(town: Path, capsys: pytest.CaptureFixture[str], ids: int) -> None:
    for name in "abc":
        label(town.parent / f"raw/train_labels/{name}.png", [[ids] * 3] * 2)
    if ids == 255:
        with pytest.raises(DataError, match="would spoil"):
            run(town)
        assert "error: splits whose labels hold no class: 1" in capsys.readouterr().out
    else:
        run(town)
        assert "warning: splits whose labels hold one class only: 1" in capsys.readouterr().out


def test_labels_in_a_wider_form_are_read_and_reported(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = np.array(CITY, dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16)).save(town.parent / "raw/train_labels/a.png")
    Image.fromarray(grey[..., None].repeat(3, 2)).save(town.parent / "raw/train_labels/b.png")
    index = run(town)
    assert [item.pixels for item in index.split("train")] == [{0: 3, 1: 2}] * 3
    assert "warning: labels in a wider form than needed, read without loss: 2" in capsys.readouterr().out


def test_a_changed_train_id_map_is_made_again(town: Path) -> None:
    index = run(town)
    path = index.label_path(index.split("train")[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    run(town)
    assert path.read_bytes() == whole


def test_raw_data_reached_through_a_link_or_moved_are_found(town: Path, tmp_path: Path) -> None:
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    (index,) = prepare(str(town), tmp_path / "link/data", workers=1)
    for folder in (tmp_path / "link/data", tmp_path / "far/away/data"):
        again = find("town", folder)
        assert again.image_path(again.split("train")[0]).is_file()
    shutil.move(tmp_path / "far/away/data", tmp_path / "deep-data")  # without the raw files
    again = find("town", tmp_path / "deep-data")
    assert again.image_path(again.split("train")[0]).is_file()
    again.check_files()


def test_a_moved_project_needs_no_other_preparation(
    town: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    for name in ("raw", "town.toml"):
        shutil.move(tmp_path / name, tmp_path / "project" / name)
    run(tmp_path / "project/town.toml")
    shutil.move(tmp_path / "project", tmp_path / "elsewhere")
    index = run(tmp_path / "elsewhere/town.toml")
    assert "up to date" in capsys.readouterr().out
    assert index.image_path(index.split("train")[0]).is_file()


def test_a_manifest_without_sense_is_as_none(town: Path) -> None:
    index = run(town)
    for content in ("[" * 9999, '{"inputs": 3}', '{"inputs": "x", "bad": [1]}', "\0", '{"inputs": "\\udc00"}'):
        (index.folder / "manifest.json").write_text(content)
        assert run(town) == index


def test_an_archive_that_is_a_pipe_is_an_error_not_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "01_images.zip")
    with pytest.raises(DataError, match="is not a regular file"):
        prepare("gta", tmp_path, workers=1)


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r'no dataset "gat".*known: gta, .*demo'):
        prepare("gat", tmp_path)
    with pytest.raises(SettingsError, match="no such description"):
        prepare(str(tmp_path / "gone.toml"), tmp_path)


def test_archives_are_unpacked_and_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "made/images/00001.png")
    label(tmp_path / "made/labels/00001.png", [[7, 26, 0], [34, 8, 7]])
    for kind in ("images", "labels"):
        with zipfile.ZipFile(tmp_path / f"01_{kind}.zip", "w") as file:
            file.write(tmp_path / f"made/{kind}/00001.png", f"{kind}/00001.png")
    with pytest.raises(DataError, match="no images of gta"):
        prepare("gta", tmp_path, check=True, workers=1)
    assert "1 files are not unpacked yet" in capsys.readouterr().out
    assert not (tmp_path / "gta").exists()
    (index,) = prepare("gta", tmp_path, workers=1)
    assert index.root == tmp_path / "gta"
    assert index.split("train")[0].pixels == {0: 2, 1: 1, 13: 1}


def test_archives_do_not_add_a_second_copy_to_another_layout(tmp_path: Path) -> None:
    image(tmp_path / "acdc/rgb_anon/train/x_rgb_anon.png")
    label(tmp_path / "acdc/gt/train/x_gt_labelTrainIds.png", [[0, 1, 2], [255, 0, 1]])
    with zipfile.ZipFile(tmp_path / "rgb_anon_trainvaltest.zip", "w") as file:
        file.write(tmp_path / "acdc/rgb_anon/train/x_rgb_anon.png", "rgb_anon/fog/train/s/x_rgb_anon.png")
    (index,) = prepare("acdc", tmp_path, workers=1)
    assert len(index.split("train")) == 1
    assert not (tmp_path / "acdc/rgb_anon/fog").exists()


def test_demo_is_made_and_gives_two_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_demo(folder: Path) -> None:
        for part in ("render/train", "render/val", "camera/train", "camera/val"):
            image(folder / part / "images/0.png")
            label(folder / part / "labels/0.png", [[7, 26, 0], [0, 8, 7]])
        (folder / "demo.json").write_text(json.dumps({}))

    monkeypatch.setitem(sys.modules, "cluda_cli.demo.dataset", SimpleNamespace(make_demo=make_demo))
    with pytest.raises(DataError, match="run without --check"):
        prepare("demo", tmp_path, check=True)
    render, camera = prepare("demo", tmp_path, workers=1)
    assert (render.name, camera.name) == ("demo-render", "demo-camera")
    assert render.classes.is_cityscapes
    assert [len(index.labelled(split)) for index in (render, camera) for split in ("train", "val")] == [1, 1, 0, 1]
    assert len(camera.split("train")) == 1
    assert "next: cluda train --preset demo --data-root" in capsys.readouterr().out


def test_a_relative_data_root_and_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    image(Path("data/cityscapes/leftImg8bit/train/ulm/ulm_000_leftImg8bit.png"))
    label(Path("data/cityscapes/gtFine/train/ulm/ulm_000_gtFine_labelIds.png"), [[7, 7, 7], [26, 26, 0]])
    (index,) = prepare("cityscapes", Path("data"), workers=1)
    assert index == Index.load(Path("data/prepared/cityscapes"))
    assert capsys.readouterr().out.endswith("prepare the other domain too, and train with --source and --target\n")


def test_processes_give_what_one_process_gives(town: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only test that starts processes: two of them, as a wrong order or an unpicklable job would show."""
    alone = run(town)
    monkeypatch.setattr(conversion, "TASKS_PER_WORKER", 1)
    (index,) = prepare(str(town), town.parent / "other", workers=2)
    assert index.splits == alone.splits
    assert [os.path.basename(path) for path in sorted(state(index.folder / "labels"))] == ["a.png", "b.png", "c.png"]


def test_preparing_needs_no_torch() -> None:
    """Each worker process imports this much; torch would cost it seconds and half a gigabyte."""
    code = "import sys, cluda_cli.commands.prepare, cluda_cli.preparation.conversion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_dataset_of_the_same_name_is_kept(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        image(tmp_path / folder / "images/0.png")
        (tmp_path / f"{folder}.toml").write_text(
            f'name = "city"\nroot = "{folder}"\n[splits.train]\nimages = "images/*.png"\n'
        )
    (first,) = prepare(str(tmp_path / "one.toml"), tmp_path / "data", workers=1)
    with pytest.raises(DataError, match='"city" is prepared from'):
        prepare(str(tmp_path / "other.toml"), tmp_path / "data", workers=1)
    assert Index.load(first.folder) == first


def test_cache_follows_the_files(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = run(town, cache="1x2")
    folder = index.folder / "cache" / "1x2"
    assert f"3 training images cached in {folder}" in capsys.readouterr().out
    before = state(folder)
    assert len(before) == 3 * 2 + 1
    assert choose_cache(index, (1, 2)).box == (1, 2)
    run(town, cache="1x2")
    assert {name: time for name, time in state(folder).items() if not name.endswith("json")} == {
        name: time for name, time in before.items() if not name.endswith("json")
    }
    image(town.parent / "raw/train/b.png")
    os.utime(town.parent / "raw/train/b.png", (1, 1))
    index = run(town)
    capsys.readouterr()
    assert choose_cache(index, (1, 2)) is None
    assert "out of date" in capsys.readouterr().err
    run(town, cache="1x2")
    assert choose_cache(index, (1, 2)) and len(state(folder)) == len(before)
    assert run(town, cache="original").folder == index.folder
    assert (index.folder / "cache" / "original" / "cache.json").is_file()


@pytest.mark.parametrize("size", ["", "big", "0x4", "4x", "4X5", "4x5x6", "-4x5"])
def test_cache_of_no_size_is_refused_before_anything_is_done(town: Path, size: str) -> None:
    with pytest.raises(SettingsError, match="--cache.*760x1280"):
        run(town, cache=size)
    assert not (town.parent / "data").exists()


def test_cache_on_the_command_line(town: Path) -> None:
    arguments = ["prepare", str(town), "--data-root", str(town.parent / "data"), "--workers", "1", "--cache", "1x2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (town.parent / "data/prepared/town/cache/1x2/cache.json").is_file()
    result = CliRunner().invoke(app, [*arguments, "--check"])
    assert result.exit_code == 2 and "--check and --cache exclude each other" in result.stderr
