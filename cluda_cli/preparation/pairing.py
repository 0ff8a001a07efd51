"""Find images and labels by globs, and pair them."""

import functools
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cluda_cli.preparation.problems import Kind, Problem

BESIDE = 6  # folders or suffixes that are named where a glob finds nothing
LONGEST_STEM = 180  # bytes


@dataclass(frozen=True)
class Split:
    """Where one split keeps its files, as globs relative to the dataset."""

    name: str
    images: str
    labels: str | None = None
    keep: Callable[[str], bool] | None = None
    """If given, a file belongs to the split if this is true of one of its names (`Found.names`)."""
    listed: frozenset[str] = frozenset()
    """Names in the list file of the split. A name without an image is reported."""
    required: bool = False
    """Whether it is an error if no image is found: a user names the split, while a publisher's may be left out."""


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


@dataclass(frozen=True)
class Pair:
    """An image, with its label if it has one."""

    split: str
    stem: str
    """Unique among the labelled pairs of the split; may contain folders."""
    image: str
    label: str | None


@dataclass
class Pairs:
    """All pairs of a dataset, and problems with names and places of files."""

    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_pairs(root: Path, splits: Sequence[Split]) -> Pairs:
    """Find the files of every split below `root` and pair them, sorted by path.

    A file that the labels of a split match is never an image, in no split.
    """
    result, loops, strange = Pairs(), set[str](), set[str]()

    def find(pattern: str | None) -> list[Found]:
        found = list(find_files(root, pattern, loops)) if pattern else []
        strange.update(file.path for file in found if not _is_text(file.path))
        return [file for file in found if _is_text(file.path)]

    labels = {split.name: find(split.labels) for split in splits}
    masks = {label.path for found in labels.values() for label in found}
    for split in splits:
        matching = find(split.images)
        images = [image for image in matching if image.path not in masks and _belongs(image, split)]
        images, again = _take_once(root, images)
        result.problems += [Problem(Kind.LINKED, path, f"in split {split.name}") for path in again]
        if not images:
            result.problems.append(_explain_empty(root, split, len(matching), masks))
        _pair(root, split, images, labels[split.name], result)
    result.problems += _find_shared(result.pairs)
    result.problems += [Problem(Kind.NAME, _escape(path)) for path in sorted(strange)]
    result.problems += [Problem(Kind.LOOP, _escape(path)) for path in sorted(loops)]
    return result


def _pair(root: Path, split: Split, images: Sequence[Found], labels: Sequence[Found], result: Pairs) -> None:
    """Add the pairs of one split, and what is wrong with them."""
    matched, ambiguous = match_labels(images, labels)
    clear = [image for image in images if image.path not in ambiguous]
    stems = _name_outputs(clear, matched)
    result.pairs += [Pair(split.name, stems[i.path], i.path, matched.get(i.path)) for i in clear]
    result.problems += [Problem(Kind.DUPLICATE, path, f"in split {split.name}") for path in sorted(ambiguous)]
    if split.labels and images and not matched and not ambiguous:
        detail = f"images are named like {images[0].key}, labels like {labels[0].key}" if labels else ""
        result.problems.append(Problem(Kind.UNPAIRED, split.name, detail or describe_beside(root, split.labels)))
    elif split.labels:
        result.problems += [Problem(Kind.NO_LABEL, i.path) for i in clear if i.path not in matched]
    used = ambiguous | set(matched.values())
    unused = [label for label in labels if label.path not in used and _belongs(label, split)]
    result.problems += [Problem(Kind.NO_IMAGE, label.path) for label in unused]
    present = {name for image in images for name in image.names}
    absent = sorted(split.listed - present)
    result.problems += [Problem(Kind.LISTED, name, f"in the list of split {split.name}") for name in absent]


def find_files(root: Path, pattern: str, loops: set[str] | None = None) -> Iterator[Found]:
    """Files below `root` that match a glob, sorted by path.

    Wildcards are `*`, `?`, `[...]` and, for whole folders, `**`. They do not match hidden files (macOS leaves some
    behind). Upper and lower case differ, but for the suffix of the file: `*.jpg` matches `a.JPG`. Links to folders are
    followed; one that leads back to a folder on its own path is not, and is added to `loops`. A link to nothing is
    found; it is reported when it is read.
    """
    folder_glob, name_glob = _split_name(pattern)
    suffix_is_wild = _WILD_SUFFIX.search(name_glob)
    loops = set() if loops is None else loops
    if not root.is_dir():
        return
    for path in sorted(set(_walk(str(root), "", pattern.split("/"), (_identify(str(root)),), loops))):
        folder, name = _split_name(path)
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
            return _escape(f"there is no folder {part} in {folder}, {only}")
        folder /= part
    kinds = ("folders" if (folder / name).is_dir() else PurePosixPath(name).suffix for name in _list(folder))
    counts = Counter(kind or "without suffix" for kind in kinds)
    held = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(BESIDE)) or "nothing"
    return _escape(f"nothing matches {pattern}; {folder} holds {held}")


def _list(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []


def match_labels(images: Sequence[Found], labels: Sequence[Found]) -> tuple[dict[str, str], set[str]]:
    """Pair labels with images: (image path -> label path, paths that share a name and are not paired).

    Rules are tried in turn: equal folder and file name, equal folder and key; then, if all images or all labels lie in
    one folder, equal file name, equal key. If a name fits several images or several labels, none of them is paired.
    """
    matched: dict[str, str] = {}
    ambiguous: set[str] = set()
    rules: list[Callable[[Found], object]] = [lambda f: (f.folder, f.stem), lambda f: (f.folder, f.key)]
    if not any(f.folder for f in images) or not any(f.folder for f in labels):
        rules += [lambda f: f.stem, lambda f: f.key]
    for rule in rules:
        groups: dict[object, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for side, files in enumerate((images, labels)):
            for file in files:
                if file.path not in matched and file.path not in ambiguous:
                    groups[rule(file)][side].append(file.path)
        taken = set()
        for of_images, of_labels in groups.values():
            if len(of_images) == 1 and len(of_labels) == 1:
                matched[of_images[0]] = of_labels[0]
                taken.add(of_labels[0])
            elif of_images and of_labels:
                ambiguous.update(of_images, of_labels)
        labels = [label for label in labels if label.path not in taken]
    return matched, ambiguous


def _belongs(found: Found, split: Split) -> bool:
    return split.keep is None or any(split.keep(name) for name in found.names)


def _take_once(root: Path, images: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Images without those found again through a link to a folder, and the paths of the latter."""
    top, first = os.path.realpath(root), dict[tuple[str, str], str]()
    folders = {_split_name(image.path)[0] for image in images}
    real = {folder: os.path.realpath(os.path.join(root, folder)) for folder in folders}
    linked = {folder: real[folder] != os.path.normpath(os.path.join(top, folder)) for folder in folders}
    for image in sorted(images, key=lambda image: linked[_split_name(image.path)[0]]):
        folder, name = _split_name(image.path)
        first.setdefault((real[folder], name), image.path)
    kept = set(first.values())
    return [image for image in images if image.path in kept], [i.path for i in images if i.path not in kept]


def _explain_empty(root: Path, split: Split, num_matching: int, masks: set[str]) -> Problem:
    """Why a split has no image."""
    if not num_matching:
        detail = describe_beside(root, split.images)
    elif all(found.path in masks for found in find_files(root, split.images)):
        detail = f"all {num_matching} files that match {split.images} are also matched as labels"
    else:
        detail = f"none of the {num_matching} files that match {split.images} is in its list"
    return Problem(Kind.EMPTY if split.required else Kind.NOT_THERE, split.name, detail)


def _is_text(path: str) -> bool:
    """Whether a path can be stored: names are bytes on disk, and some are not UTF-8."""
    return _escape(path) == path


def _escape(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def _name_outputs(images: Sequence[Found], matched: dict[str, str]) -> dict[str, str]:
    """Image path -> name of its train-id map: the stem of the image, below its folder where stems clash.

    Stems that differ only in case clash, because some file systems ignore case. A long stem is shortened, since names
    of files have at most 255 bytes and others are made from it.
    """
    count: dict[str, int] = defaultdict(int)
    for image in images:
        if image.path in matched:
            count[image.stem.casefold()] += 1
    return {
        image.path: (f"{image.folder}/" if image.folder and count[image.stem.casefold()] > 1 else "") + _shorten(image)
        for image in images
    }


def _shorten(image: Found) -> str:
    stem = image.stem.encode()
    if len(stem) <= LONGEST_STEM:
        return image.stem
    return stem[: LONGEST_STEM - 9].decode(errors="ignore") + "-" + hashlib.sha256(image.path.encode()).hexdigest()[:8]


def _find_shared(pairs: Sequence[Pair]) -> list[Problem]:
    splits: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        splits[pair.image].append(pair.split)
    return [Problem(Kind.SHARED, image, ", ".join(of)) for image, of in splits.items() if len(of) > 1]


_WILDCARD = r"(?:[*?]|\[[!^]?+(?:\][^]/]*|[^]/]+)\])"
_RUN = re.compile(rf"((?<![^/])\*\*/|{_WILDCARD}+)")
_WILD_SUFFIX = re.compile(rf"\.{_WILDCARD}+$")


def check_glob(pattern: str) -> None:
    """Raise ValueError if a glob has a range without characters, such as [z-a]."""
    for part in pattern.split("/"):
        try:
            _compile(part)
        except re.error as error:
            raise ValueError(f'"{part}" is no pattern: {error.msg}') from error


def _split_name(path: str) -> tuple[str, str]:
    """`a/b/c` -> `a/b/`, `c`."""
    start = path.rfind("/") + 1
    return path[:start], path[start:]


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
