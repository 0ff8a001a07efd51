"""Unpack the zip archives of publishers: only missing files, each whole or not at all, none outside the folder."""

import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluda_cli.console import Progress, info
from cluda_cli.data.index import IMAGE_SUFFIXES
from cluda_cli.errors import DataError
from cluda_cli.files import atomic

SUFFIXES = IMAGE_SUFFIXES | {".json", ".txt"}
"""Files that are unpacked."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Limits:
    """An archive beyond these sizes is refused as a zip bomb. Images hardly compress."""

    ratio: int = 50
    """Unpacked bytes per byte of the archive."""
    total: int = 400 * 2**30
    """Unpacked bytes."""
    members: int = 2_000_000


@dataclass(frozen=True)
class Archive:
    """An archive as its publisher names it."""

    files: str
    """Glob of the file names."""
    folders: tuple[str, ...]
    """Top folders of the dataset. Folders above them are dropped; members below none of them are skipped."""
    into: str = ""
    """Folder for the members of an archive that has none of them."""


def find_archives(archives: Sequence[Archive], places: Sequence[Path]) -> list[tuple[Path, Archive]]:
    """The archive files in some folders; of files with equal names, the first."""
    found: dict[str, tuple[Path, Archive]] = {}
    for archive in archives:
        for place in places:
            for path in sorted(place.glob(archive.files)) if place.is_dir() else ():
                found.setdefault(path.name, (path, archive))
    return list(found.values())


def unpack(path: Path, archive: Archive, folder: Path, limits: Limits = Limits()) -> int:  # noqa: B008  frozen
    """Unpack the files that `folder` lacks. Returns the number of files written.

    A file that exists in its full size is kept, so that an interrupted run can go on. Raises DataError, before
    anything is written, if the archive would write elsewhere or is far too large; also if it is damaged.
    """
    missing = find_missing(path, archive, folder, limits)
    if not missing:
        return 0
    needed, free = sum(member.file_size for member in missing.values()), _measure_free_space(folder)
    if needed > free:
        raise DataError(f"unpacking needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free", path, "make room")
    info(f"unpacking {len(missing)} files from {path}")
    budget = _limit_size(path, limits)
    with zipfile.ZipFile(path) as file, Progress(f"unpacking {path.name}", len(missing)) as progress:
        for target, member in missing.items():
            budget -= _write_member(file, member, folder / target, budget, path)
            progress.advance()
    return len(missing)


def find_missing(
    path: Path,
    archive: Archive,
    folder: Path,
    limits: Limits = Limits(),  # noqa: B008  frozen
) -> dict[str, zipfile.ZipInfo]:
    """Path below `folder` -> member, for members without a file of full size. Raises DataError as `unpack`."""
    if path.suffix.lower() != ".zip":
        if folder.is_dir() and any(child.is_dir() for child in folder.iterdir()):
            return {}  # probably unpacked by hand
        raise DataError("only zip archives can be unpacked here", path, f"unpack it by hand into {folder}")
    if not path.is_file():
        raise DataError("is not a regular file", path, "put the publisher's archive there")
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    for member in members:
        _refuse_dangerous(path, member)
    if len(members) > limits.members or sum(m.file_size for m in members) > _limit_size(path, limits):
        raise _too_large(path)
    targets = _select_members(members, archive)
    return {name: m for name, m in targets.items() if not _is_complete(folder / name, m.file_size)}


def _refuse_dangerous(path: Path, member: zipfile.ZipInfo) -> None:
    """Raise DataError if a member could be written outside the folder, or is not a plain file."""
    name = member.orig_filename.replace("\\", "/")
    kind = stat.S_IFMT(member.external_attr >> 16)
    reason = ""
    if name.startswith("/") or ":" in name or "\0" in name:
        reason = "has an absolute path"
    elif ".." in name.split("/"):
        reason = "leads out of its folder"
    elif kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        reason = "is a link" if kind == stat.S_IFLNK else "is a special file"
    elif member.flag_bits & 1:
        reason = "is encrypted"
    if reason:
        raise DataError(f'member "{name}" {reason}; nothing was unpacked', path, "download it from the publisher again")


def _select_members(members: Sequence[zipfile.ZipInfo], archive: Archive) -> dict[str, zipfile.ZipInfo]:
    """Path below the dataset's folder -> member, for members that belong to the dataset."""
    wanted = []
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        # macOS adds a second, hidden tree of resource forks.
        if member.is_dir() or "__MACOSX" in parts or parts[-1].startswith("."):
            continue
        if PurePosixPath(parts[-1]).suffix.lower() in SUFFIXES:
            wanted.append((parts, member))
    starts = [next((i for i, part in enumerate(parts[:-1]) if part in archive.folders), None) for parts, _ in wanted]
    if archive.into and all(start is None for start in starts):
        return {f"{archive.into}/{parts[-1]}": member for parts, member in wanted}
    return {
        "/".join(parts[start:]): member
        for (parts, member), start in zip(wanted, starts, strict=True)
        if start is not None
    }


def _write_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, budget: int, path: Path) -> int:
    """Write one member atomically. Returns its size, by the bytes that were really unpacked."""
    written = 0
    try:
        with atomic(target) as temporary, file.open(member) as source, temporary.open("wb") as out:
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > min(member.file_size, budget):
                    raise _too_large(path)
                out.write(chunk)
            if written != member.file_size:
                raise EOFError(f"{member.filename} is cut short")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return written


def _limit_size(path: Path, limits: Limits) -> int:
    return min(limits.total, limits.ratio * path.stat().st_size)


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _measure_free_space(folder: Path) -> int:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(existing).free


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"the archive is damaged ({error})", path, "download it again; what is unpacked already is kept")


def _too_large(path: Path) -> DataError:
    return DataError("it unpacks to far more than such a dataset holds", path, "download it from the publisher again")
