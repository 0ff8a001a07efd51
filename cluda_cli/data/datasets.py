"""The datasets of a run, and which training images of the target come with their labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluda_cli import settings
from cluda_cli.data.cache import SPLIT
from cluda_cli.data.index import Index, Item, find
from cluda_cli.errors import DataError, SettingsError, first_line, nearest
from cluda_cli.seeds import derive_seed


@dataclass(frozen=True)
class Datasets:
    """What a run learns from and is validated on."""

    sources: tuple[Index, ...]
    target: Index
    """As it was prepared, for validation and for the manifest."""
    unlabelled: Index
    """The target with the training images that are used without labels."""
    labelled: Index | None
    """The target with the training images whose labels are learned from. None if there are none; without a source it is
    there nevertheless, for its classes."""

    def __str__(self) -> str:
        return f"{' + '.join(source.name for source in self.sources) or 'no source'} -> {self.target.name}"

    @property
    def labelled_images(self) -> list[str]:
        """The names of the labelled training images of the target."""
        return [item.image for item in self.labelled.splits[SPLIT]] if self.labelled else []


def open_datasets(data: settings.Data, seed: int) -> Datasets:
    """Find the datasets of the settings, compare their files with the index, and choose the labelled target images.

    Raises DataError for a dataset that is not prepared, and what `choose_labelled` raises.
    """
    sources = tuple(find(name, data.root) for name in data.source)
    target = find(data.target, data.root)
    for index in (*sources, target):
        index.check_files()
    if data.labelled is None:
        return Datasets(sources, target, target, None if sources else _with_training(target, ()))
    chosen = choose_labelled(target, data.labelled, seed)
    names = {item.image for item in chosen}
    others = [item for item in target.split(SPLIT) if item.image not in names]
    # Where all are labelled, they are the only unlabelled images there are.
    return Datasets(sources, target, _with_training(target, others or chosen), _with_training(target, chosen))


def choose_labelled(target: Index, wanted: int | float | str, seed: int) -> list[Item]:
    """The training images whose labels are learned from: a number, a share of those with labels, or those of a file.

    The seed decides. A larger number or share contains a smaller one of the same seed.

    Raises SettingsError if more images are wanted than have labels, DataError for a list that names others.
    """
    items = target.labelled(SPLIT)
    if isinstance(wanted, str):
        return _read_list(Path(wanted), target, items)
    count = wanted if isinstance(wanted, int) else max(1, round(wanted * len(items)))
    if count > len(items):
        what = f"{count} labelled images are wanted, {target.name} has {len(items)} in split {SPLIT}"
        remedy = "lower it" if items else "label some of them, and run `cluda prepare` again"
        raise SettingsError(what, "data.labelled", remedy)
    order = np.random.default_rng(derive_seed(seed, "labelled images")).permutation(len(items))
    return [items[i] for i in sorted(order[:count])]


def _read_list(path: Path, target: Index, items: Sequence[Item]) -> list[Item]:
    """The items that a file lists, by their paths below the raw dataset or by file names that only one of them has."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:
        what = f"the list of labelled images cannot be read ({first_line(error)})"
        raise DataError(what, path, "correct data.labelled") from error
    by_name: dict[str, list[Item]] = {}
    for item in items:
        for name in {item.image, Path(item.image).name}:
            by_name.setdefault(name, []).append(item)
    chosen = set()
    for number, line in enumerate(lines, 1):
        found = by_name.get(line, []) if line else []
        if line and len(found) != 1:
            what = f'"{line}" is {len(found) or "none"} of the {len(items)} labelled training images of {target.name}'
            close = nearest(line, list(by_name))
            raise DataError(what, f"{path}:{number}", f"did you mean {close}?" if close else "give its path")
        chosen |= {item.image for item in found}
    if not chosen:
        raise DataError("the list of labelled images is empty", path, "one image a line")
    return [item for item in items if item.image in chosen]


def _with_training(target: Index, items: Sequence[Item]) -> Index:
    return replace(target, splits={**target.splits, SPLIT: tuple(items)})
