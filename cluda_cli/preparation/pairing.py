"""Pair images with labels by what the wildcards of their globs stand for."""

import functools
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluda_cli.data.globs import Found, describe_beside, escape, find_files, is_text
from cluda_cli.preparation.problems import Kind, Problem
from cluda_cli.preparation.references import match_lists, read_lists

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
    references: str | None = None
    """Glob of paired pictures: what an image shows, under other conditions."""
    pairs: str | None = None
    """Glob of lists of an image and its paired picture; without it, names pair them as they pair labels."""
    required: bool = False
    """Whether it is an error if no image is found: a user names the split, while a publisher's may be left out."""


@dataclass(frozen=True)
class Pair:
    """An image, with its label if it has one."""

    split: str
    stem: str
    """Unique among the labelled pairs of the split; may contain folders."""
    image: str
    label: str | None
    reference: str | None = None
    """The paired picture, if there is one."""


@dataclass
class Pairs:
    """All pairs of a dataset, and problems with names and places of files."""

    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_pairs(root: Path, splits: Sequence[Split]) -> Pairs:
    """Find the files of every split below `root` and pair them, sorted by path.

    A file that the labels of a split match is never an image, in no split. Files are compared where links lead.
    """

    resolve_folder = functools.cache(os.path.realpath)

    @functools.cache
    def resolve(path: str) -> str:
        folder, name = os.path.split(os.path.join(root, path))
        real = os.path.join(resolve_folder(folder), name)
        return os.path.realpath(real) if os.path.islink(real) else real

    result, again, strange = Pairs(), dict[str, str](), set[str]()

    def keep_text(found: Iterable[Found]) -> list[Found]:
        files = list(found)
        strange.update(file.path for file in files if not is_text(file.path))
        return [file for file in files if is_text(file.path)]

    labels = {
        # Through a link, labels may serve several images.
        split.name: keep_text(find_files(root, split.labels, repeat=True)) if split.labels else []
        for split in splits
    }
    references = {
        split.name: keep_text(find_files(root, split.references, repeat=True)) if split.references else []
        for split in splits
    }
    masks = {resolve(file.path) for found in (*labels.values(), *references.values()) for file in found}
    for split in splits:
        matching = keep_text(find_files(root, split.images, again))
        images = [image for image in matching if resolve(image.path) not in masks and _belongs(image, split)]
        if not images:
            only_masks = all(resolve(file.path) in masks for file in matching)
            result.problems.append(_explain_empty(root, split, len(matching), only_masks))
        _pair(root, split, images, labels[split.name], result)
        if split.references:
            add_references(root, split, images, references[split.name], result)
    result.problems += _find_shared(result.pairs, resolve)
    result.problems += [Problem(Kind.NAME, escape(path)) for path in sorted(strange)]
    result.problems += [
        Problem(Kind.LINKED, escape(path), f"leads to {escape(first) or 'the dataset itself'}")
        for path, first in sorted(again.items())
    ]
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


def add_references(
    root: Path, split: Split, images: Sequence[Found], references: Sequence[Found], result: Pairs
) -> None:
    """Give the pairs of a split their paired pictures, and report what has none. Raises DataError for a bad list."""
    if split.pairs:
        matched = match_lists(images, references, read_lists(root, split.pairs))
    else:
        matched, _ = match_labels(images, references)
    result.pairs = [
        replace(pair, reference=matched.get(pair.image)) if pair.split == split.name else pair for pair in result.pairs
    ]
    if images and split.required and not matched:
        named = f"images are named like {images[0].key}, pictures like {references[0].key}" if references else ""
        detail = named or describe_beside(root, split.references or "")
        result.problems.append(Problem(Kind.NO_PAIR, split.name, detail))
    elif references:
        result.problems += [Problem(Kind.NO_REFERENCE, i.path) for i in images if i.path not in matched]


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


def _explain_empty(root: Path, split: Split, num_matching: int, only_masks: bool) -> Problem:
    """Why a split has no image."""
    if not num_matching:
        detail = describe_beside(root, split.images)
    elif only_masks:
        detail = f"all {num_matching} files that match {split.images} are also matched as labels or paired pictures"
    else:
        detail = f"none of the {num_matching} files that match {split.images} is in its list"
    return Problem(Kind.EMPTY if split.required else Kind.NOT_THERE, split.name, detail)


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


def _find_shared(pairs: Sequence[Pair], resolve: Callable[[str], str]) -> list[Problem]:
    """A problem for each image that several splits hold, under the same name or through links."""
    places: dict[str, dict[str, str]] = defaultdict(dict)  # real path -> split -> path
    for pair in pairs:
        places[resolve(pair.image)].setdefault(pair.split, pair.image)
    problems = []
    for of in places.values():
        image = next(iter(of.values()))
        names = [split if path == image else f"{split} as {path}" for split, path in of.items()]
        if len(of) > 1:
            problems.append(Problem(Kind.SHARED, image, ", ".join(names)))
    return problems
