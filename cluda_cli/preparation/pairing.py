"""Find images and labels by globs, and pair them."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

from wcmatch import glob

from cluda_cli.errors import DataError
from cluda_cli.preparation.problems import Kind, Problem


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
    """Find the files of every split below `root` and pair them, sorted by path."""
    result = Pairs()
    for split in splits:
        images = [found for found in find_files(root, split.images) if _belongs(found, split)]
        labels = [found for found in find_files(root, split.labels) if _belongs(found, split)] if split.labels else []
        matched, ambiguous = match_labels(images, labels)
        clear = [image for image in images if image.path not in ambiguous]
        stems = _name_outputs(clear, matched)
        result.pairs += [Pair(split.name, stems[i.path], i.path, matched.get(i.path)) for i in clear]
        result.problems += [Problem(Kind.DUPLICATE, path, f"in split {split.name}") for path in sorted(ambiguous)]
        if split.labels:
            result.problems += [Problem(Kind.NO_LABEL, i.path) for i in clear if i.path not in matched]
            used = ambiguous | set(matched.values())
            result.problems += [Problem(Kind.NO_IMAGE, label.path) for label in labels if label.path not in used]
            if images and not matched and not ambiguous:
                names = f"images are named like {images[0].key}, labels like {labels[0].key if labels else '(none)'}"
                result.problems.append(Problem(Kind.UNPAIRED, split.name, names))
        present = {name for image in images for name in image.names}
        absent = sorted(split.listed - present)
        result.problems += [Problem(Kind.LISTED, name, f"in the list of split {split.name}") for name in absent]
    result.problems += _find_shared(result.pairs)
    return result


def find_files(root: Path, pattern: str) -> Iterator[Found]:
    """Files below `root` that match a glob, sorted by path.

    Wildcards do not match hidden files (macOS leaves some behind), and `**` does not follow links to folders.
    Raises DataError if the glob uses a wildcard other than `*`, `?`, `[...]` and `**`.
    """
    folder_glob, name_glob = _split_name(pattern)
    suffix_is_wild = _WILD_SUFFIX.search(name_glob)
    for path in sorted(glob.glob(pattern, root_dir=root, flags=glob.GLOBSTAR | glob.CASE)):
        if not (root / path).is_file():
            continue  # a folder, or a link to nothing
        path = PurePath(path).as_posix()
        folder, name = _split_name(path)
        folder_parts = _capture(folder_glob, folder, root)
        name_parts = _capture(name_glob, name, root)
        if suffix_is_wild and len(name_parts) > 1:
            key = "_".join(name_parts[:-1])
        else:
            key = "_".join(name_parts)
            if key and name_glob[-1] in "*?]":  # the last wildcard stands for the suffix as well
                key = str(PurePosixPath(key).with_suffix(""))
        yield Found(path, "/".join(part.strip("/") for part in folder_parts if part.strip("/")), key)


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


def _name_outputs(images: Sequence[Found], matched: dict[str, str]) -> dict[str, str]:
    """Image path -> name of its train-id map: the stem of the image, below its folder where stems clash.

    Stems that differ only in case clash, because some file systems ignore case.
    """
    count: dict[str, int] = defaultdict(int)
    for image in images:
        if image.path in matched:
            count[image.stem.casefold()] += 1
    return {
        image.path: f"{image.folder}/{image.stem}" if image.folder and count[image.stem.casefold()] > 1 else image.stem
        for image in images
    }


def _find_shared(pairs: Sequence[Pair]) -> list[Problem]:
    splits: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        splits[pair.image].append(pair.split)
    return [Problem(Kind.SHARED, image, ", ".join(of)) for image, of in splits.items() if len(of) > 1]


_WILDCARD = r"(?:[*?]|\[[!^]?+(?:\][^]]*|[^]]+)\])"
_RUN = re.compile(rf"((?<![^/])\*\*/|{_WILDCARD}+)")
_WILD_SUFFIX = re.compile(rf"\.{_WILDCARD}+$")


def _split_name(path: str) -> tuple[str, str]:
    """`a/b/c` -> `a/b/`, `c`."""
    start = path.rfind("/") + 1
    return path[:start], path[start:]


def _capture(pattern: str, text: str, root: Path) -> tuple[str, ...]:
    """What each run of wildcards in a glob stands for in a text that matches the glob."""
    found = _compile(pattern).fullmatch(text)
    if not found:
        raise DataError(
            f'it is unclear what the wildcards of "{pattern}" stand for in {text}', root, "simplify the glob"
        )
    return found.groups()


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression with one group for each run of wildcards; wildcards take what they can."""
    pieces = _RUN.split(pattern)  # literal text and runs of wildcards in turn
    pieces[::2], pieces[1::2] = map(re.escape, pieces[::2]), map(_translate, pieces[1::2])
    return re.compile("".join(pieces))


def _translate(run: str) -> str:
    if run == "**/":
        return "((?:[^/]+/)*)"
    single = {"*": "[^/]*", "?": "[^/]"}
    return f"({re.sub(_WILDCARD, lambda found: single.get(found[0], found[0].replace('[!', '[^', 1)), run)})"
