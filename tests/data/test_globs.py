"""Which files a glob finds, and what its wildcards stand for."""

import errno
import fnmatch
import os
from pathlib import Path

import pytest

from cluda_cli.data.globs import check_glob, find_files, split_root


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    make(tmp_path, "i/a/01.png", "elsewhere/02.png", "elsewhere/deep/03.png")
    (tmp_path / "i/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "i/a/file.png").symlink_to(tmp_path / "elsewhere/02.png")
    own, linked = ["i/a/01.png", "i/a/file.png"], ["i/link/02.png", "i/link/deep/03.png"]
    assert [found.path for found in find_files(tmp_path, "i/*/*.png")] == [*own, linked[0]]
    for pattern in ("i/**/*.png", "i/*/**/*.png"):
        assert [found.path for found in find_files(tmp_path, pattern)] == [*own, *linked]


def test_a_link_to_nothing_is_found_so_that_it_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    assert [found.path for found in find_files(tmp_path, "*.png")] == ["a.png"]


@pytest.mark.parametrize("pattern", ["**/*.png", "*/**/*.png", "**/?/**/*.png"])
def test_folders_that_link_to_each_other_are_searched_once(tmp_path: Path, pattern: str) -> None:
    names = "abcdefghijkl"
    make(tmp_path, "a/1.png", *(f"{name}/{name}.txt" for name in names))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / name / other).symlink_to(f"../{other}")
    again = dict[str, str]()
    assert [found.path for found in find_files(tmp_path, pattern, again)] == ["a/1.png"]
    assert again["a/b"] == "b" and len(again) >= 12 * 11


def test_a_path_without_links_is_preferred(tmp_path: Path) -> None:
    make(tmp_path, "z/deep/1.png")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "b").symlink_to("z/deep")
    again = dict[str, str]()
    assert [found.path for found in find_files(tmp_path, "**/*.png", again)] == ["z/deep/1.png"]
    assert again == {"a": "z", "b": "z/deep"}


def test_files_are_repeated_below_each_link_but_no_loop(tmp_path: Path) -> None:
    make(tmp_path, "real/1.png", "real/s/2.png")
    (tmp_path / "fog").symlink_to("real")
    (tmp_path / "real/back").symlink_to(".")
    (tmp_path / "real/s/top").symlink_to(tmp_path)
    found = {found.path: found.folder for found in find_files(tmp_path, "**/*.png", repeat=True)}
    assert found == {"fog/1.png": "fog", "fog/s/2.png": "fog/s", "real/1.png": "real", "real/s/2.png": "real/s"}
    (tmp_path / "real/back").unlink()
    (tmp_path / "real/b").symlink_to("s")
    assert [f.path for f in find_files(tmp_path, "real/**/s/*.png", repeat=True)] == ["real/s/2.png"]


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.png", "closed/2.png")
    honest = os.listdir

    def refuse(folder: str) -> list[str]:
        if folder.rstrip("/").endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return honest(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        list(find_files(tmp_path, "**/*.png"))


@pytest.mark.parametrize(
    ("text", "root", "rest"),
    [
        ("a/b/*/c.png", "a/b", "*/c.png"),
        ("*.png", ".", "*.png"),
        ("/a/**/*.png", "/a", "**/*.png"),
        ("../a[1]/b", "..", "a[1]/b"),
    ],
)
def test_the_folder_before_the_first_wildcard(text: str, root: str, rest: str) -> None:
    assert split_root(text) == (Path(root), rest)


@pytest.mark.parametrize(
    ("pattern", "path", "folder", "key"),
    [
        ("**/*.png", "01.png", "", "01"),
        ("**/x/**/*.png", "x/a/x/b/01.png", "x/a/b", "01"),
        ("s*/[!a]?/*.png", "s1/b2/01.png", "1/b2", "01"),
        ("*-*.*", "a-b-c.tar.png", "", "a-b_c.tar"),
        ("[]]_*.png", "]_01.png", "", "]_01"),
        ("a[_*.png", "a[_01.png", "", "01"),
        ("*.png", "a(1)+[2].png", "", "a(1)+[2]"),
    ],
)
def test_what_wildcards_stand_for(tmp_path: Path, pattern: str, path: str, folder: str, key: str) -> None:
    make(tmp_path, path)
    (found,) = find_files(tmp_path, pattern)
    assert (found.path, found.folder, found.key) == (path, folder, key)


def test_globs_heed_case_but_for_the_suffix(tmp_path: Path) -> None:
    make(tmp_path, "a.PNG", "b_L.Png", "c_l.png", "D/e.png")
    assert [found.path for found in find_files(tmp_path, "*.png")] == ["a.PNG", "b_L.Png", "c_l.png"]
    assert [found.path for found in find_files(tmp_path, "*_L.png")] == ["b_L.Png"]
    assert [found.path for found in find_files(tmp_path, "b_L.png")] == ["b_L.Png"]
    assert not list(find_files(tmp_path, "d/*.png"))


@pytest.mark.parametrize(
    "pattern", ["[\\]]*.png", "[[]*.png", "[!a&&b]*.png", "[^a]*.png", "[]-]*.png", "[z-z]*.png", "[+--]*.png"]
)
def test_what_stands_in_brackets_is_taken_literally(tmp_path: Path, pattern: str) -> None:
    names = ["]1.png", "[1.png", "&1.png", "-1.png", "a1.png", "z1.png", "\\]1.png"]
    make(tmp_path, *names)
    expected = [name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern.replace("[^", "[!"))]
    assert [found.path for found in find_files(tmp_path, pattern)] == expected and expected


def test_a_range_without_characters_is_no_pattern() -> None:
    with pytest.raises(ValueError, match=r'"\[z-a\]\*.png" is no pattern: bad character range z-a'):
        check_glob("images/[z-a]*.png")
