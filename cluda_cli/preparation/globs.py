"""Find files by globs below a folder, following links, and say what the wildcards of a glob stand for."""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

BESIDE = 6  # folders or suffixes that are named where a glob finds nothing
_WILDCARD = r"(?:[*?]|\[[!^]?+(?:\][^]/]*|[^]/]+)\])"
_RUN = re.compile(rf"((?<![^/])\*\*/|{_WILDCARD}+)")
_WILD_SUFFIX = re.compile(rf"\.{_WILDCARD}+$")


@dataclass(frozen=True)
class Found:
    """One file that a glob found."""

    path: str
    """Relative to the dataset, with forward slashes."""
    folder: str
    """What the wildcards in the folders of the glob stand for."""
    key: str
    """What the wildcards in the file name stand for: in `*_rgb.png` and `*_label.png`, the common part."""

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a list file may give this file."""
        without_suffix = str(PurePosixPath(self.path).with_suffix(""))
        below = f"{self.folder}/" if self.folder else ""
        return self.stem, self.key, below + self.stem, below + self.key, without_suffix


def find_files(root: Path, pattern: str, loops: set[str] | None = None) -> Iterator[Found]:
    """Files below `root` that match a glob, sorted by path.

    Wildcards are `*`, `?`, `[...]` and, for whole folders, `**`. They do not match hidden files (macOS leaves some
    behind). Upper and lower case differ, but for the suffix of the file: `*.jpg` matches `a.JPG`. Links to folders are
    followed; one that leads back to a folder on its own path is not, and is added to `loops`. A link to nothing is
    found; it is reported when it is read.
    """
    folder_glob, name_glob = split_name(pattern)
    suffix_is_wild = _WILD_SUFFIX.search(name_glob)
    loops = set() if loops is None else loops
    if not root.is_dir():
        return
    for path in sorted(set(_walk(str(root), "", pattern.split("/"), (_identify(str(root)),), loops))):
        folder, name = split_name(path)
        folder_parts, name_parts = _capture(_compile(folder_glob), folder), _capture(_compile_name(name_glob), name)
        if suffix_is_wild and len(name_parts) > 1:
            key = "_".join(name_parts[:-1])
        else:
            key = "_".join(name_parts)
            if key and name_glob[-1] in "*?]":  # the last wildcard stands for the suffix as well
                key = str(PurePosixPath(key).with_suffix(""))
        yield Found(path, "/".join(part.strip("/") for part in folder_parts if part.strip("/")), key)


def _walk(
    root: str, below: str, parts: Sequence[str], above: tuple[tuple[int, int], ...], loops: set[str]
) -> Iterator[str]:
    """Paths of files in the folder `below` that match the parts of a glob. `above` identifies it and those it is in."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _walk(root, below, rest, above, loops)
    pattern = _compile("*" if part == "**" else part) if rest else _compile_name(part)
    try:
        names = sorted(os.listdir(os.path.join(root, below)))
    except (OSError, ValueError):  # no such folder, or one that may not be read
        return
    for name in names:
        if not pattern.fullmatch(name) or (name.startswith(".") and not part.startswith(".")):
            continue
        path = os.path.join(root, below + name)
        is_folder = os.path.isdir(path)
        if not rest and not is_folder:
            yield below + name
        elif rest and is_folder:
            identity = _identify(path)
            if identity in above:
                loops.add(below + name)
            else:
                deeper = parts if part == "**" else rest
                yield from _walk(root, f"{below}{name}/", deeper, (*above, identity), loops)


def _identify(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def describe_beside(root: Path, pattern: str) -> str:
    """What lies where a glob that finds nothing looks: `there is no folder val in data, only train, valid`."""
    folder = root
    for part in pattern.split("/")[:-1]:
        if _RUN.search(part) or part == "**":
            break
        if not (folder / part).is_dir():
            have = sorted(name for name in _list(folder) if (folder / name).is_dir())
            only = f"only {', '.join(have[:BESIDE])}{', ...' * (len(have) > BESIDE)}" if have else "nor any other"
            return escape(f"there is no folder {part} in {folder}, {only}")
        folder /= part
    kinds = ("folders" if (folder / name).is_dir() else PurePosixPath(name).suffix for name in _list(folder))
    counts = Counter(kind or "without suffix" for kind in kinds)
    held = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(BESIDE)) or "nothing"
    return escape(f"nothing matches {pattern}; {folder} holds {held}")


def _list(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []


def split_name(path: str) -> tuple[str, str]:
    """`a/b/c` -> `a/b/`, `c`."""
    start = path.rfind("/") + 1
    return path[:start], path[start:]


def is_text(path: str) -> bool:
    """Whether a path can be stored: names are bytes on disk, and some are not UTF-8."""
    return escape(path) == path


def escape(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def check_glob(pattern: str) -> None:
    """Raise ValueError if a glob has a range without characters, such as [z-a]."""
    for part in pattern.split("/"):
        try:
            _compile(part)
        except re.error as error:
            raise ValueError(f'"{part}" is no pattern: {error.msg}') from error


def _capture(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """What each run of wildcards stands for in a text that the walk has found to match."""
    found = pattern.fullmatch(text)
    assert found
    return found.groups()


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression with one group for each run of wildcards; wildcards take what they can."""
    return re.compile("".join(_translate_all(pattern)), re.DOTALL)


@functools.cache
def _compile_name(pattern: str) -> re.Pattern[str]:
    """`_compile` for the name of a file, whose suffix may be in upper or lower case."""
    *before, last = _RUN.split(pattern)
    stem, dot, suffix = last.rpartition(".")
    literal = f"{re.escape(stem)}(?i:{re.escape(dot + suffix)})" if dot else re.escape(last)
    return re.compile("".join(_translate_all("".join(before))) + literal, re.DOTALL)


def _translate_all(pattern: str) -> list[str]:
    pieces = _RUN.split(pattern)  # literal text and runs of wildcards in turn
    pieces[::2], pieces[1::2] = map(re.escape, pieces[::2]), map(_translate, pieces[1::2])
    return pieces


def _translate(run: str) -> str:
    if run == "**/":
        return "((?:[^/]+/)*)"
    return f"({re.sub(_WILDCARD, lambda found: _translate_one(found[0]), run)})"


def _translate_one(wildcard: str) -> str:
    if wildcard in "*?":
        return {"*": "[^/]*", "?": "[^/]"}[wildcard]
    negated = wildcard[1] in "!^"
    characters = re.sub(r"([\[&~|^\\])", r"\\\1", wildcard[1 + negated : -1])  # as they are; Python has sets in sets
    return f"[{'^' * negated}{characters}]"
