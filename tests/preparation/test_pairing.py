"""Which label belongs to which image."""

import os
import re
from pathlib import Path

import pytest

from cluda_cli.preparation.pairing import LONGEST_STEM, Split, find_pairs
from cluda_cli.preparation.problems import Kind


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def paired(root: Path, images: str, labels: str) -> dict[str, str | None]:
    return {pair.image: pair.label for pair in find_pairs(root, [Split("train", images, labels)]).pairs}


@pytest.mark.parametrize(
    ("image", "images", "label", "labels"),
    [
        ("i/0001.jpg", "i/*.jpg", "l/0001.png", "l/*.png"),
        ("i/0001.png", "i/*.png", "l/0001_L.png", "l/*_L.png"),
        ("a_leftImg8bit.png", "*_leftImg8bit.png", "a_gtFine_labelIds.png", "*_gtFine_labelIds.png"),
        ("rgb_7.png", "rgb_*.png", "mask_7.png", "mask_*.png"),
        ("i/s1/01.png", "i/*/*.png", "l/s1/01.png", "l/*/*.png"),
        ("s1/images/01.png", "*/images/*.png", "s1/labels/01.png", "*/labels/*.png"),
        ("s1/image.png", "*/image.png", "s1/label.png", "*/label.png"),
        ("i/a/b/01.png", "i/**/*.png", "l/01.png", "l/*.png"),
        ("i/01.tar.png", "i/*.*", "l/01.tar.png", "l/*"),
        ("i/f-12-x.png", "i/f-[0-9][0-9]-?.png", "l/12_x.png", "l/*.png"),
    ],
)
def test_names_that_belong_together(tmp_path: Path, image: str, images: str, label: str, labels: str) -> None:
    make(tmp_path, image, label)
    assert paired(tmp_path, images, labels) == {image: label}


def test_equal_names_in_other_folders_are_not_mixed_up(tmp_path: Path) -> None:
    make(tmp_path, "i/s1/01.png", "i/s2/01.png", "l/s2/01.png", "l/s3/01.png")
    found = find_pairs(tmp_path, [Split("train", "i/*/*.png", "l/*/*.png")])
    assert {p.image: p.label for p in found.pairs} == {"i/s1/01.png": None, "i/s2/01.png": "l/s2/01.png"}
    assert [(p.kind, p.file) for p in found.problems] == [
        (Kind.NO_LABEL, "i/s1/01.png"), (Kind.NO_IMAGE, "l/s3/01.png")
    ]  # fmt: skip


def test_train_id_maps_of_equal_names_keep_their_folder(tmp_path: Path) -> None:
    make(tmp_path, "i/s1/01.png", "i/S2/01.png", "i/s1/02.png", "l/s1/01.png", "l/S2/01.png", "l/s1/02.png")
    pairs = find_pairs(tmp_path, [Split("train", "i/*/*.png", "l/*/*.png")]).pairs
    assert [pair.stem for pair in pairs] == ["S2/01", "s1/01", "02"]


def test_a_name_for_several_files_is_not_guessed_at(tmp_path: Path) -> None:
    make(tmp_path, "i/a.png", "i/a.jpg", "i/b.png", "l/a.png", "l/b.png")
    found = find_pairs(tmp_path, [Split("train", "i/*", "l/*.png")])
    assert [pair.image for pair in found.pairs] == ["i/b.png"]
    assert [(p.kind, p.file) for p in found.problems] == [
        (Kind.DUPLICATE, path) for path in ("i/a.jpg", "i/a.png", "l/a.png")
    ]  # fmt: skip


def test_a_flat_folder_of_labels_does_not_serve_two_images_of_equal_name(tmp_path: Path) -> None:
    make(tmp_path, "i/s1/01.png", "i/s2/01.png", "l/01.png")
    found = find_pairs(tmp_path, [Split("train", "i/*/*.png", "l/*.png")])
    assert found.pairs == []
    assert {p.kind for p in found.problems} == {Kind.DUPLICATE}


@pytest.mark.parametrize("pattern", ["**/*.png", "*/**/*.png", "**/**/*.png", "*/*/*/*/*/*.png"])
def test_a_loop_of_links_is_named_and_ends(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, "i/a/01.png", "i/b/c/d/e/02.png")
    (tmp_path / "i/a/back").symlink_to(tmp_path / "i")
    (tmp_path / "i/b/self").symlink_to(".")
    (tmp_path / "i/b/endless").symlink_to("endless")
    found = find_pairs(tmp_path, [Split("train", pattern)])
    images = [pair.image for pair in found.pairs]
    assert "i/b/c/d/e/02.png" in images
    assert len({(tmp_path / image).resolve() for image in images}) == len(images)
    if "**" in pattern:  # else, each of the folders is searched at one depth only
        assert images == ["i/a/01.png", "i/b/c/d/e/02.png"]
        assert [(p.kind, p.file, p.detail) for p in found.problems] == [
            (Kind.LINKED, "i/a/back", "leads to i"), (Kind.LINKED, "i/b/self", "leads to i/b")
        ]  # fmt: skip


def test_images_that_a_link_shows_again_are_taken_once(tmp_path: Path) -> None:
    make(tmp_path, "i/real/01.png", "l/real/01.png", "i/fog/01.png")
    (tmp_path / "i/again").symlink_to("real")
    (tmp_path / "l/fog").symlink_to("real")  # labels may serve several images
    found = find_pairs(tmp_path, [Split("train", "i/*/*.png", "l/*/*.png")])
    assert {p.image: p.label for p in found.pairs} == {"i/fog/01.png": "l/fog/01.png", "i/real/01.png": "l/real/01.png"}
    assert [(p.kind, p.file) for p in found.problems] == [(Kind.LINKED, "i/again")]


def test_a_mask_is_never_an_image(tmp_path: Path) -> None:
    make(tmp_path, "t/a.png", "t/a_mask.png", "t/b.png", "t/b_mask.png")
    splits = [Split("train", "t/*.png"), Split("val", "t/*.png", "t/*_mask.png")]
    found = find_pairs(tmp_path, splits)
    assert [(p.split, p.image, p.label) for p in found.pairs] == [
        ("train", "t/a.png", None), ("train", "t/b.png", None),
        ("val", "t/a.png", "t/a_mask.png"), ("val", "t/b.png", "t/b_mask.png"),
    ]  # fmt: skip
    assert {p.kind for p in found.problems} == {Kind.SHARED}
    found = find_pairs(tmp_path, [Split("train", "t/*.png", "t/*.png", required=True)])
    assert (found.pairs, [p.kind for p in found.problems][0]) == ([], Kind.EMPTY)
    assert "all 4 files that match t/*.png are also matched as labels" in found.problems[0].detail


@pytest.mark.parametrize("entry", ["i/s1/01", "s1/01", "01"])
def test_a_list_with_folders_finds_labels_too(tmp_path: Path, entry: str) -> None:
    make(tmp_path, "i/s1/01_rgb.png", "l/s1/01_id.png", "i/s1/02_rgb.png", "l/s1/02_id.png")
    listed = frozenset({entry if entry == "01" else entry + "_rgb"})
    found = find_pairs(tmp_path, [Split("val", "i/*/*_rgb.png", "l/*/*_id.png", listed.__contains__, listed)])
    assert [(pair.image, pair.label) for pair in found.pairs] == [("i/s1/01_rgb.png", "l/s1/01_id.png")]
    assert found.problems == []


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("val/*.png", r"there is no folder val in .*, only labels, train"),
        ("train/*.jpg", r"nothing matches train/\*\.jpg; .*train holds 2 \.jpeg, 1 folders"),
        ("train/**/*.bmp", r"train holds 2 \.jpeg, 1 folders"),
        ("train/deep/none/*.png", r"there is no folder none in .*deep, nor any other"),
    ],
)
def test_a_split_without_images_says_what_lies_beside(tmp_path: Path, pattern: str, words: str) -> None:
    make(tmp_path, "train/a.jpeg", "train/b.jpeg", "train/deep/c.txt", "labels/a.png")
    splits = [Split("train", "train/*.jpeg"), Split("val", pattern, required=True), Split("test", pattern)]
    problems = find_pairs(tmp_path, splits).problems
    assert [(p.kind, p.file) for p in problems] == [(Kind.EMPTY, "val"), (Kind.NOT_THERE, "test")]
    assert all(re.search(words, problem.detail) for problem in problems)


def test_a_name_that_is_not_utf8_is_reported_in_letters(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    found = find_pairs(tmp_path, [Split("train", "*.png")])
    assert [pair.image for pair in found.pairs] == ["a.png"]
    assert [(p.kind, p.file) for p in found.problems] == [(Kind.NAME, "caf\\udce9.png")]


def test_names_of_255_bytes_leave_room_for_names_made_from_them(tmp_path: Path) -> None:
    for name in ("ä" * 125 + "0", "ä" * 125 + "1"):
        make(tmp_path, f"i/{name}.png", f"l/{name}.png")
    stems = [pair.stem for pair in find_pairs(tmp_path, [Split("train", "i/*.png", "l/*.png")]).pairs]
    assert len(set(stems)) == 2
    assert all(len(stem.encode()) <= LONGEST_STEM and stem.startswith("ää") for stem in stems)


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    make(tmp_path, "i/01.png", "i/._01.png", "i/.cache/02.png")
    assert paired(tmp_path, "i/**/*.png", "l/*.png") == {"i/01.png": None}


def test_a_list_restricts_images_and_labels_alike(tmp_path: Path) -> None:
    make(tmp_path, "i/01_rgb.png", "i/02_rgb.png", "l/01_id.png", "l/02_id.png", "l/03_id.png")
    listed = frozenset({"02", "03", "04"})
    found = find_pairs(tmp_path, [Split("val", "i/*_rgb.png", "l/*_id.png", listed.__contains__, listed)])
    assert [(pair.image, pair.label) for pair in found.pairs] == [("i/02_rgb.png", "l/02_id.png")]
    assert [(p.kind, p.file) for p in found.problems] == [
        (Kind.NO_IMAGE, "l/03_id.png"), (Kind.LISTED, "03"), (Kind.LISTED, "04")
    ]  # fmt: skip


def test_an_image_in_two_splits_is_reported(tmp_path: Path) -> None:
    make(tmp_path, "i/01.png", "i/02.png")
    found = find_pairs(tmp_path, [Split("train", "i/*.png"), Split("val", "i/02.png")])
    assert [(p.kind, p.file, p.detail) for p in found.problems] == [(Kind.SHARED, "i/02.png", "train, val")]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_an_image_that_a_second_split_sees_through_a_link_is_reported(tmp_path: Path, what: str) -> None:
    make(tmp_path, "train/01.png", "train/02.png")
    if what == "folder":
        (tmp_path / "val").symlink_to("train")
    else:
        (tmp_path / "val").mkdir()
        (tmp_path / "val/02.png").symlink_to("../train/02.png")
        (tmp_path / "train/03.png").symlink_to("01.png")  # twice in one split is not two splits
    found = find_pairs(tmp_path, [Split("train", "train/*.png"), Split("val", "val/*.png")])
    shared = [(p.file, p.detail) for p in found.problems if p.kind is Kind.SHARED]
    first = [("train/01.png", "train, val as val/01.png")] if what == "folder" else []
    assert shared == [*first, ("train/02.png", "train, val as val/02.png")]


def test_a_mask_that_is_seen_through_a_link_is_no_image(tmp_path: Path) -> None:
    make(tmp_path, "img/a.png", "lab/a.png")
    (tmp_path / "img/extra").symlink_to("../lab")
    assert paired(tmp_path, "img/**/*.png", "lab/*.png") == {"img/a.png": "lab/a.png"}
    found = find_pairs(tmp_path, [Split("train", "img/extra/*.png", "lab/*.png")])
    assert "all 1 files that match img/extra/*.png are also matched as labels" in found.problems[0].detail


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("i/*_rgb.png", "l/*_label.*"),
        ("i/*_rgb.*", "l/*_label.png"),
        ("i/*_rgb.*", "l/*_label.*"),
        ("i/*", "l/*_label.*"),
    ],
)
def test_a_wildcard_for_the_suffix_does_not_count_as_part_of_the_name(tmp_path: Path, images: str, labels: str) -> None:
    if images == "i/*":
        make(tmp_path, "i/00.png", "i/01.png", "l/00_label.png", "l/01_label.png")
    else:
        make(tmp_path, "i/00_rgb.png", "i/01_rgb.png", "l/00_label.png", "l/01_label.png")
    found = find_pairs(tmp_path, [Split("train", images, labels)])
    assert [pair.label for pair in found.pairs] == ["l/00_label.png", "l/01_label.png"]
    assert not found.problems


def test_a_split_in_which_nothing_fits_is_an_error_that_shows_both_names(tmp_path: Path) -> None:
    make(tmp_path, "i/0.png", "l/0x.png")
    found = find_pairs(tmp_path, [Split("train", "i/*.png", "l/*.png")])
    (problem,) = [p for p in found.problems if p.kind.is_error]
    assert (problem.kind, problem.file) == (Kind.UNPAIRED, "train")
    assert problem.detail == "images are named like 0, labels like 0x"
