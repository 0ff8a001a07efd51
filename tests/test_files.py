"""Files appear complete or not at all, and no two have one name."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cluda_cli.errors import SettingsError
from cluda_cli.files import (
    atomic,
    is_vacant,
    locked,
    make_unique,
    read_text,
    remove_temporaries,
    sha256,
    write_json,
    write_text,
)

REPOSITORY = Path(__file__).parent.parent


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


def in_process(code: str, folder: Path, **options: Any) -> None:
    """Run code in a process of its own, in a folder."""
    head = "import os\nfrom pathlib import Path\nfrom cluda_cli.files import atomic, locked, write_text\n"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", head + code], cwd=folder, env=environment, check=True, **options)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    code = "held = locked(Path(), ''), atomic(Path('below/state.pt'))\nfor one in held: one.__enter__()\nos._exit(0)"
    in_process(code, tmp_path)
    names = {".x-settings.json", ".state-abcd1234.pt", "state.pt", ".gitignore", ".cluda-notes"}
    for name in names:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(names) + 2 and len(list((tmp_path / "below").iterdir())) == 1
    with locked(tmp_path, ""):
        assert not list((tmp_path / "below").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == names | {"below"}


def test_folders_of_the_user_are_not_searched_for_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for folder in (tmp_path, tmp_path / "below"):
        (folder / ".cluda-abcd1234.tmp.json").touch()
    remove_temporaries(tmp_path, below=False)
    assert [p.name for p in tmp_path.iterdir()] == ["below"] and len(list((tmp_path / "below").iterdir())) == 1


def test_the_temporary_of_a_living_writer_is_kept(tmp_path: Path) -> None:
    with atomic(tmp_path / "x.txt") as temporary:
        temporary.write_text("whole")
        remove_temporaries(tmp_path)
    assert (tmp_path / "x.txt").read_text() == "whole"


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder, "name another"):
        (folder / "x").touch()
        with pytest.raises(SettingsError, match="another process .* wait, or name another") as refused:
            locked(folder, "name another").__enter__()
        assert refused.value.where == str(folder)
        with locked(tmp_path / "other", ""):
            pass
    with locked(folder, ""):
        pass
    assert [p.name for p in folder.iterdir()] == ["x"]


def test_the_lock_of_a_process_ends_with_it(tmp_path: Path) -> None:
    in_process("held = locked(Path('run'), '')\nheld.__enter__()\nos._exit(0)", tmp_path)
    assert (tmp_path / "run" / ".cluda-lock").exists() and is_vacant(tmp_path / "run")
    with locked(tmp_path / "run", ""):
        pass


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), locked(tmp_path / "runs" / "x", ""):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is a file"):
        locked(tmp_path / "file", "").__enter__()


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to("there/x.txt")
    for text in ("first", "second"):
        write_text(tmp_path / "link.txt", text)
        assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "there" / "x.txt").read_text() == text
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["x.txt"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_through(tmp_path: Path, linked: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if linked else pipe
    if linked:
        path.symlink_to(pipe)
    with ThreadPoolExecutor() as pool:
        received = pool.submit(pipe.read_text)
        write_text(path, "whole")
        assert received.result() == "whole"
    assert pipe.is_fifo() and path.is_symlink() == linked


def test_the_file_that_takes_the_output_is_not_replaced(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("wb") as out:
        code = "print('before')\nwrite_text(Path('out.txt'), 'through\\n')\nprint('after')"
        in_process(code, tmp_path, stdout=out)
    assert (tmp_path / "out.txt").read_text() == "before\nthrough\nafter\n"


def test_a_full_disk_names_the_file(tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large") as full:
        write_text(tmp_path / "x.txt", "x" * 200_000)
    assert full.value.filename == str(tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".txt", "x." + "y" * 253):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


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


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_text(tmp_path / "manifest.json")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none.json")


def test_repeated_long_names_are_those_of_files(tmp_path: Path) -> None:
    for name in ("x" * 251, "ä" * 125, "below/" + "x" * 251, "\udce9" * 251):
        unique = list(make_unique([name, name, name]))
        assert len(set(unique)) == 3 and unique[0] == name
        assert all(os.path.dirname(one) == os.path.dirname(name) for one in unique)
        for one in unique:
            write_text(tmp_path / f"{one}.png", "whole")


def test_repeated_names_get_numbers_whatever_their_case() -> None:
    assert list(make_unique(["a", "b", "A", "a", "A-2"])) == ["a", "b", "A-2", "a-3", "A-2-2"]
