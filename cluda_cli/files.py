"""Files that appear complete or not at all, names for them, and folders that one process at a time writes into."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from cluda_cli.errors import SettingsError

_UMASK = os.umask(0)  # reading it means setting it, which is not safe in threads: done once
os.umask(_UMASK)
_LOCK = ".cluda-lock"
_LONGEST_NAME = 240  # bytes, before a number and a suffix; file systems take 255
_TEMPORARY = re.compile(r"\.cluda-[a-z0-9_]{8}\.tmp(\..*)?")  # the letters are those of tempfile


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. At the end of the block, flush it to disk and rename it to `path`.

    If the block raises, or the process is killed, `path` is as it was before. A missing folder is made. The temporary
    name keeps the suffix, because some writers choose the format by suffix. A symbolic link stays, and the file that
    it leads to is written. A pipe, a device, or the file that this process prints to gets the content at the end of the
    block. An OSError of the block names `path`.
    """
    with naming(path):
        if _is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                yield (temporary := Path(folder) / f"content{_short_suffix(path)}")
                _write_through(temporary, path)
            return
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _make_temporary(path)
        try:
            yield temporary
            os.fsync(handle)
            temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes private files; this is the usual mode
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give `path` to an OSError of the block that names no file, as on a full disk, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno and (not error.filename or _TEMPORARY.fullmatch(Path(os.fsdecode(error.filename)).name)):
            raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def locked(folder: Path, remedy: str) -> Iterator[None]:
    """Keep other processes from writing into a folder. A missing one is made, and removed again if it stays empty.

    The kernel releases the lock when this process ends, in whatever way. What killed processes left half-written in the
    folder is removed. Raises SettingsError with `remedy` if another process holds the folder, or if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError("is a file; a folder is needed", folder, remedy)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    try:
        handle = _open_lock(path)
        if handle is None:
            raise SettingsError("another process of cluda is writing into this folder", folder, f"wait, or {remedy}")
        try:
            remove_temporaries(folder)
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held, so that nobody takes a lock that is about to vanish
            os.close(handle)
    finally:
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def remove_temporaries(folder: Path, below: bool = True) -> None:
    """Remove what killed processes left half-written in a folder, and `below` it; a living writer keeps its own."""
    for place, _, names in os.walk(folder) if below else islice(os.walk(folder), 1):
        for name in filter(_TEMPORARY.fullmatch, names):
            path = Path(place) / name
            with suppress(OSError):  # gone meanwhile, or another user's
                handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _lock(handle) is True:
                        path.unlink(missing_ok=True)
                finally:
                    os.close(handle)


def is_vacant(folder: Path) -> bool:
    """Whether a folder is missing, or holds nothing but what this program left half-written."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(p.name == _LOCK or _TEMPORARY.fullmatch(p.name) for p in folder.iterdir())


def _lock(handle: int) -> bool | None:
    """Take the lock of an open file; False if another process has it, None if the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _open_lock(path: Path) -> int | None:
    """Open and lock a file; None if another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _lock(handle) is False:
            os.close(handle)
            return None
        if _is_same(handle, path):
            return handle
        os.close(handle)  # its last holder removed it in the meantime


def _make_temporary(path: Path) -> tuple[int, Path]:
    """An open, locked temporary file beside `path`."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".cluda-", suffix=f".tmp{_short_suffix(path)}")
        _lock(handle)
        if _is_same(handle, Path(name)):
            return handle, Path(name)
        os.close(handle)  # between the two lines, another process took it for a leftover


def _short_suffix(path: Path) -> str:
    """The suffix, unless it is no format but part of a long name."""
    return path.suffix if len(path.suffix) < 16 else ""


def _is_same(handle: int, path: Path) -> bool:
    """Whether a path leads to an open file."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _is_special(path: Path) -> bool:
    """Whether a path leads to a pipe, a device, or the file that this process prints to: it must not be replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return not stat.S_ISREG(mode) or any(_is_same(number, path) for number in (1, 2))


def _write_through(content: Path, path: Path) -> None:
    """Copy a file into what lies at a path, at the present position if this process prints to it."""
    sys.stdout.flush()
    number = next((number for number in (1, 2) if _is_same(number, path)), None)
    with content.open("rb") as source, open(path if number is None else os.dup(number), "wb") as out:
        shutil.copyfileobj(source, out)


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """UTF-8 text of a regular file. Raises OSError, also for a pipe or a device, which would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.read_text(encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON atomically. Raises ValueError for NaN, which other readers refuse."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def make_unique(names: Iterable[str]) -> Iterator[str]:
    """Yield the names, and add a number to a name that repeats an earlier one. Upper and lower case are the same.

    A long name is cut before its number, so that it can be that of a file with a suffix.
    """
    taken: set[str] = set()
    for name in names:
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            folder, slash, last = name.rpartition("/")
            unique = f"{folder}{slash}{os.fsencode(last)[:_LONGEST_NAME].decode('utf-8', 'ignore')}-{number}"
        taken.add(unique.casefold())
        yield unique
