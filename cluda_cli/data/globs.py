"""Find files by globs below a folder, following links, and say what the wildcards of a glob stand for."""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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


def find_files(root: Path, pattern: str, again: dict[str, str] | None = None, repeat: bool = False) -> Iterator[Found]:
    """Files below `root` that match a glob, sorted by path.

    Wildcards are `*`, `?`, `[...]` and, for whole folders, `**`. They do not match hidden files (macOS leaves some
    behind). Upper and lower case differ, but for the suffix of the file: `*.jpg` matches `a.JPG`. Links to folders are
    followed, and each folder is searched once, under a path without links if there is one. Other paths to it are added
    to `again`, with the one that was searched. With `repeat`, its files are found below those paths, too, but not below
    one that leads back to a folder on itself. A link to nothing is found; it is reported when it is read.

    Raises OSError if a folder may not be read.
    """
    folder_glob, name_glob = split_name(pattern)
    suffix_is_wild = _WILD_SUFFIX.search(name_glob)
    if not root.is_dir():
        return
    first_paths = dict[str, str]()
    paths = set(_walk(str(root), pattern, first_paths))
    if repeat:
        paths |= set(_repeat(paths, first_paths))
    if again is not None:
        again |= first_paths
    for path in sorted(paths):
        folder, name = split_name(path)
        of_folder, of_name = _compile(folder_glob).fullmatch(folder), _compile_name(name_glob).fullmatch(name)
        if not of_folder or not of_name:  # a repeated path that is none of the glob
            continue
        name_parts = of_name.groups()
        if suffix_is_wild and len(name_parts) > 1:
            key = "_".join(name_parts[:-1])
        else:
            key = "_".join(name_parts)
            if key and name_glob[-1] in "*?]":  # the last wildcard stands for the suffix as well
                key = str(PurePosixPath(key).with_suffix(""))
        yield Found(path, "/".join(part.strip("/") for part in of_folder.groups() if part.strip("/")), key)


def _walk(root: str, pattern: str, again: dict[str, str]) -> Iterator[str]:
    """Paths of files that match a glob. A folder is searched once for each rest of the glob, links after all others."""
    waiting, linked = [("", tuple(pattern.split("/")))], list[tuple[str, tuple[str, ...]]]()
    searched = dict[tuple[str, tuple[str, ...]], str]()
    while waiting or linked:
        below, parts = (waiting or linked).pop(0)
        folder = os.path.join(root, below)
        mark = os.path.realpath(folder), parts
        if mark in searched:
            if searched[mark] != below:
                again[below[:-1]] = searched[mark][:-1]
            continue
        searched[mark] = below
        part, rest = parts[0], parts[1:]
        if part == "**":
            waiting.append((below, rest))
        regex = _compile("*" if part == "**" else part) if rest else _compile_name(part)
        for name in sorted(os.listdir(folder)):
            if not regex.fullmatch(name) or (name.startswith(".") and not part.startswith(".")):
                continue
            path = os.path.join(folder, name)
            is_folder = os.path.isdir(path)
            if not rest and not is_folder:
                yield below + name
            elif rest and is_folder:
                deeper = parts if part == "**" else rest
                (linked if os.path.islink(path) else waiting).append((f"{below}{name}/", deeper))


def _repeat(paths: Iterable[str], again: Mapping[str, str]) -> Iterator[str]:
    """The paths in folders that were searched under another path, below each further path that is no loop."""
    for further, first in again.items():
        if not f"{further}/".startswith(f"{first}/"):
            yield from (further + path[len(first) :] for path in paths if path.startswith(f"{first}/"))


def has_wildcard(text: str) -> bool:
    return bool(_RUN.search(text))


def split_root(text: str) -> tuple[Path, str]:
    """The folder before the first wildcard, and the rest: `a/b/*/c.png` -> `a/b`, `*/c.png`."""
    parts = Path(text).parts
    first = next((i for i, part in enumerate(parts) if has_wildcard(part)), len(parts) - 1)
    return Path(*parts[:first]), "/".join(parts[first:])


def describe_beside(root: Path, pattern: str) -> str:
    """What lies where a glob that finds nothing looks: `there is no folder val in data, only train, valid`."""
    folder = root
    for part in pattern.split("/")[:-1]:
        if has_wildcard(part):
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
    # Characters stand for themselves, while Python reserves some for sets of sets.
    characters = re.sub(r"([\[&~|^\\])", r"\\\1", wildcard[1 + negated : -1]).replace("--", r"-\-")
    return f"[{'^' * negated}{characters}]"
