"""Find images and labels by glob patterns, and decide which belong together."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cluda_cli.preparation.problems import Kind, Problem


@dataclass(frozen=True)
class Split:
    """Where one split keeps its files, as glob patterns relative to the dataset."""

    name: str
    images: str
    labels: str | None = None
    keep: Callable[[str], bool] | None = None
    """If given, a file belongs to the split only if this holds for one of its names (see Found.names)."""
    listed: frozenset[str] = frozenset()
    """Names that the split's own list file promises; those without an image are reported."""


@dataclass(frozen=True)
class Found:
    """One file that matches a pattern."""

    path: str
    """Relative to the dataset, with forward slashes."""
    folder: str
    """What the wildcards among the folders of the pattern stand for."""
    key: str
    """What the wildcards in the file name stand for: of `*_rgb.png` and `*_label.png`, the part that is common."""

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which a list file may mean this file."""
        without_suffix = str(PurePosixPath(self.path).with_suffix(""))
        below = f"{self.folder}/" if self.folder else ""
        return self.stem, self.key, below + self.stem, below + self.key, without_suffix


@dataclass(frozen=True)
class Pair:
    """An image, with its label if it has one."""

    split: str
    stem: str
    """Unique in the split among pairs with a label; may contain folders."""
    image: str
    label: str | None


@dataclass
class Pairs:
    """All pairs of a dataset and what is wrong with the way they are stored."""

    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_pairs(root: Path, splits: Sequence[Split]) -> Pairs:
    """Look for the files of every split below `root`, sorted by path, and pair them."""
    result = Pairs()
    for split in splits:
        images = [found for found in find_files(root, split.images) if _kept(found, split)]
        labels = [found for found in find_files(root, split.labels) if _kept(found, split)] if split.labels else []
        matched, ambiguous = match(images, labels)
        clear = [image for image in images if image.path not in ambiguous]
        stems = _output_stems(clear, matched)
        result.pairs += [Pair(split.name, stems[i.path], i.path, matched.get(i.path)) for i in clear]
        result.problems += [Problem(Kind.DUPLICATE, path, "in split " + split.name) for path in sorted(ambiguous)]
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
    result.problems += _shared(result.pairs)
    return result


def find_files(root: Path, pattern: str) -> Iterator[Found]:
    """Files below `root` that match a glob pattern, by path; hidden files (as macOS leaves behind) do not count."""
    regex = _capturing_regex(pattern)
    depth = pattern.count("/") + 1
    names = (path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
    for name in sorted(n for n in names if not any(part.startswith(".") for part in n.split("/"))):
        found = regex.fullmatch(name)
        assert found, f"{name} was found by {pattern} but does not match it"
        # Groups of the folders come first; those of the file name are numbered from `folders + 1`.
        folders = sum(_count_groups(part) for part in pattern.split("/")[: depth - 1])
        folder = "/".join(part.strip("/") for part in found.groups()[:folders] if part.strip("/"))
        parts = found.groups()[folders:]
        suffix_alone = len(parts) > 1 and _ANY_SUFFIX.search(pattern)  # what the last wildcard stands for
        key = "_".join(parts[:-1] if suffix_alone else parts)
        if key and pattern[-1] in "*?]" and not suffix_alone:  # the last wildcard swallowed the suffix
            key = str(PurePosixPath(key).with_suffix(""))
        yield Found(name, folder, key)


def match(images: Sequence[Found], labels: Sequence[Found]) -> tuple[dict[str, str], set[str]]:
    """Which label belongs to which image: (image path -> label path, paths that share a name).

    In turn by equal folder and file name, by equal folder and key, and, if the images or the labels all lie in one
    folder, by file name and by key alone. Where a name stands for several files on either side, none is paired.
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


def _kept(found: Found, split: Split) -> bool:
    return split.keep is None or any(split.keep(name) for name in found.names)


def _output_stems(images: Sequence[Found], matched: dict[str, str]) -> dict[str, str]:
    """Image path -> name of its train-id map: the file name, below its folder where names clash.

    Names that differ in case only clash as well, for file systems that do not tell them apart.
    """
    count: dict[str, int] = defaultdict(int)
    for image in images:
        if image.path in matched:
            count[image.stem.casefold()] += 1
    return {
        image.path: f"{image.folder}/{image.stem}" if image.folder and count[image.stem.casefold()] > 1 else image.stem
        for image in images
    }


def _shared(pairs: Sequence[Pair]) -> list[Problem]:
    splits: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        splits[pair.image].append(pair.split)
    return [Problem(Kind.SHARED, image, ", ".join(of)) for image, of in splits.items() if len(of) > 1]


_WILDCARD = re.compile(r"\*|\?|\[[^\]]+\]")
_WILDCARDS = re.compile(rf"(?:{_WILDCARD.pattern})+")
_ANY_SUFFIX = re.compile(rf"\.(?:{_WILDCARD.pattern})+$")


def _count_groups(part: str) -> int:
    return len(_WILDCARDS.findall(part))


def _capturing_regex(pattern: str) -> re.Pattern[str]:
    """The glob as a regular expression with one group per run of wildcards."""
    *folders, name = pattern.split("/")
    text = ""
    for part in folders:
        text += "((?:[^/]+/)*)" if part == "**" else _capture(part) + "/"
    return re.compile(text + _capture(name))


def _capture(part: str) -> str:
    """One component of a pattern; as in glob, `[!...]` negates."""
    text, last = "", 0
    for run in _WILDCARDS.finditer(part):
        inner = _WILDCARD.sub(lambda wildcard: _translate(wildcard.group()), run.group())
        text += re.escape(part[last : run.start()]) + f"({inner})"
        last = run.end()
    return text + re.escape(part[last:])


def _translate(wildcard: str) -> str:
    return {"*": "[^/]*", "?": "[^/]"}.get(wildcard, wildcard.replace("[!", "[^", 1))
