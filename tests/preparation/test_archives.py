"""Unpacking archives: nothing outside, nothing too large, nothing twice."""

import stat
import zipfile
from pathlib import Path

import pytest

from cluda_cli.errors import DataError
from cluda_cli.preparation import archives
from cluda_cli.preparation.archives import Archive, Limits, find_archives, find_missing, unpack

IMAGES = Archive("*.zip", ("images",))


def make_zip(path: Path, members: dict[str, bytes], modes: dict[str, int] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = (modes or {}).get(name, stat.S_IFREG | 0o644) << 16
            file.writestr(member, content)
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_unpacks_what_belongs_to_the_dataset(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {
        "GTA5/images/01.png": b"one", "GTA5/images/deep/02.PNG": b"two", "GTA5/readme.md": b"-",
        "GTA5/images/run.sh": b"-", "__MACOSX/images/._01.png": b"-", "other/03.png": b"-",
    })  # fmt: skip
    assert unpack(path, IMAGES, tmp_path / "gta") == 2
    assert files_in(tmp_path / "gta") == ["images/01.png", "images/deep/02.PNG"]
    assert (tmp_path / "gta" / "images" / "01.png").read_bytes() == b"one"


def test_a_flat_archive_gets_a_folder(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"01_L.png": b"one"})
    unpack(path, Archive("a.zip", ("Labeled",), into="Labeled"), tmp_path / "camvid")
    assert files_in(tmp_path / "camvid") == ["Labeled/01_L.png"]


@pytest.mark.parametrize(
    "name",
    ["/images/a.png", "../images/a.png", "images/../../a.png", "C:/images/a.png", "images\\..\\..\\a.png",
     "\\images\\a.png", "images/c:a.png"],
)  # fmt: skip
def test_a_member_that_leads_elsewhere_refuses_the_whole_archive(tmp_path: Path, name: str) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/good.png": b"good", name: b"evil"})
    with pytest.raises(DataError, match="nothing was unpacked"):
        unpack(path, IMAGES, tmp_path / "in" / "gta")
    assert files_in(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    ("mode", "words"), [(stat.S_IFLNK | 0o777, "is a link"), (stat.S_IFIFO | 0o644, "is a special file")]
)
def test_links_and_special_files_refuse_the_whole_archive(tmp_path: Path, mode: int, words: str) -> None:
    path = make_zip(
        tmp_path / "a.zip", {"images/good.png": b"good", "images/link.png": b"/etc/passwd"}, {"images/link.png": mode}
    )
    with pytest.raises(DataError, match=words):
        unpack(path, IMAGES, tmp_path / "gta")
    assert not (tmp_path / "gta").exists()


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": bytes(10_000_000)})
    with pytest.raises(DataError, match="far more than"):
        unpack(path, IMAGES, tmp_path / "gta")
    with pytest.raises(DataError, match="far more than"):
        unpack(path, IMAGES, tmp_path / "gta", Limits(ratio=10**6, total=9_999_999))
    assert not (tmp_path / "gta").exists()


def test_a_header_that_lies_does_not_get_more_bytes_out(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": bytes(1_000_000)})
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (100).to_bytes(4, "little")  # the size that the directory claims
    path.write_bytes(content)
    with pytest.raises(DataError):
        unpack(path, IMAGES, tmp_path / "gta")
    assert files_in(tmp_path / "gta") == []


def test_bytes_are_counted_as_they_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": bytes(50_000), "images/b.png": bytes(50_000)})
    monkeypatch.setattr(archives, "find_missing", lambda *_: dict.fromkeys(
        ["images/a.png", "images/b.png"], zipfile.ZipFile(path).infolist()[0]
    ))  # fmt: skip
    with pytest.raises(DataError, match="far more than"):
        unpack(path, IMAGES, tmp_path / "gta", Limits(ratio=10**6, total=60_000))
    assert files_in(tmp_path / "gta") == ["images/a.png"]


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {f"images/{i}.png": b"" for i in range(5)})
    with pytest.raises(DataError, match="far more than"):
        unpack(path, IMAGES, tmp_path / "gta", Limits(members=4))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": b"whole", "images/b.png": b"cut short", "images/c.png": b"c"})
    folder = tmp_path / "gta" / "images"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"there")  # same size: kept as it is
    (folder / "b.png").write_bytes(b"cut")
    assert unpack(path, IMAGES, tmp_path / "gta") == 2
    assert [(folder / name).read_bytes() for name in ("a.png", "b.png", "c.png")] == [b"there", b"cut short", b"c"]
    assert unpack(path, IMAGES, tmp_path / "gta") == 0


def test_a_damaged_member_leaves_the_others_and_no_fragment(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": b"good", "images/b.png": bytes(range(256)) * 20})
    content = bytearray(path.read_bytes())
    start = content.index(b"images/b.png") + len("images/b.png")
    content[start + 5 : start + 25] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged.*download it again"):
        unpack(path, IMAGES, tmp_path / "gta")
    assert files_in(tmp_path / "gta") == ["images/a.png"]


def test_a_download_cut_short_is_reported_as_such(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": b"good"})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged"):
        find_missing(path, IMAGES, tmp_path / "gta")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": b"good"})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        unpack(path, IMAGES, tmp_path / "gta")


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "a.zip", {"images/a.png": b"good"})
    monkeypatch.setattr(archives, "_measure_free_space", lambda folder: 3)
    with pytest.raises(DataError, match="make room"):
        unpack(path, IMAGES, tmp_path / "gta")
    assert not (tmp_path / "gta").exists()


def test_rar_must_be_unpacked_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "SYNTHIA_RAND_CITYSCAPES.rar"
    path.touch()
    with pytest.raises(DataError, match="by hand"):
        find_missing(path, Archive("*.rar", ()), tmp_path / "synthia")
    (tmp_path / "synthia" / "RGB").mkdir(parents=True)
    assert find_missing(path, Archive("*.rar", ()), tmp_path / "synthia") == {}


def test_archives_are_looked_for_in_every_place(tmp_path: Path) -> None:
    (tmp_path / "gta").mkdir()
    for name in ("02_images.zip", "01_images.zip", "notes.zip", "gta/03_images.zip", "gta/01_images.zip"):
        (tmp_path / name).touch()
    found = find_archives([Archive("[0-9][0-9]_images.zip", ())], [tmp_path, tmp_path / "gta", tmp_path / "none"])
    assert [path.relative_to(tmp_path).as_posix() for path, _ in found] == [
        "01_images.zip", "02_images.zip", "gta/03_images.zip"
    ]  # fmt: skip
