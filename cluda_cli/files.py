"""Files that appear complete or not at all, and names for them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)  # reading it means setting it, which is not safe in threads: done once
os.umask(_UMASK)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. At the end of the block, flush it to disk and rename it to `path`.

    If the block raises, or the process is killed, `path` is as it was before. A missing folder is made. The temporary
    name starts with a dot and keeps the suffix, because some writers choose the format by suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes private files; this is the usual mode
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of a killed process. No other process may be writing in the folder."""
    for path in folder.glob(".*-????????.*"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON atomically. Raises ValueError for NaN, which other readers refuse."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def make_unique(names: Iterable[str]) -> Iterator[str]:
    """Yield the names, and add a number to a name that repeats an earlier one. Upper and lower case are the same."""
    taken: set[str] = set()
    for name in names:
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        yield unique
