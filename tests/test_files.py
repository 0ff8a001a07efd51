"""Files appear complete or not at all, and no two have one name."""

import hashlib
import json
import stat
from pathlib import Path

import pytest

from cluda_cli.files import atomic, make_unique, remove_temporaries, sha256, write_json, write_text


def test_a_file_appears_with_its_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt" and not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_a_file_is_as_readable_as_one_that_is_opened_for_writing(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("x")
    write_text(tmp_path / "ours", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_temporaries_of_a_killed_process_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    killed = atomic(tmp_path / "state.pt")
    temporary = killed.__enter__()  # and never left
    for name in (".hidden", "state.pt", ".gitignore"):
        (tmp_path / name).touch()
    assert temporary.exists()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".gitignore", ".hidden", "state.pt"]


def test_text_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", "Zürich → Köln")
    assert (tmp_path / "x.txt").read_bytes() == "Zürich → Köln".encode()


def test_json_round_trips_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]} and path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"cluda")
    assert sha256(tmp_path / "x") == hashlib.sha256(b"cluda").hexdigest()


def test_repeated_names_get_numbers_whatever_their_case() -> None:
    assert list(make_unique(["a", "b", "A", "a", "A-2"])) == ["a", "b", "A-2", "a-3", "A-2-2"]
