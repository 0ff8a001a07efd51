"""`cluda prepare`: raw dataset -> checked index, train-id labels, class statistics.

    <data root>/prepared/<name>/index.json      the result, written last
                                journal.jsonl   the outcome of every pair, so that an interrupted run can go on
                                manifest.json   what the index was made from, so that a second run can skip all work

The train-id maps lie beside them, in the folder `labels`, and stored training images in the folder `cache`.
"""

import os
import re
import shlex
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from cluda_cli import console
from cluda_cli.data.globs import escape, is_text
from cluda_cli.data.index import PHOTOGRAPHED, RENDERED, Index, Item, read_stamp, seen_classes
from cluda_cli.data.stored import ManifestFile, read_stored
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import locked, write_json
from cluda_cli.preparation.archives import find_archives, find_missing, unpack
from cluda_cli.preparation.conversion import Outcome, Scan, check_all, convert_missing, scan_files
from cluda_cli.preparation.described import read_description
from cluda_cli.preparation.problems import Kind, Problem, format_report
from cluda_cli.preparation.published import PUBLISHED, Dataset, Published, locate_demo


def prepare(
    dataset: str,
    data_root: Path,
    *,
    check: bool = False,
    skip_bad: bool = False,
    cache: str | None = None,
    workers: int | None = None,
) -> list[Index]:
    """Index a dataset: a published one by name, "demo", or the TOML file that describes a user's own.

    Prints every problem. `check` decodes every pixel and writes nothing; `skip_bad` leaves out pairs with an error.
    `cache` also stores the training images uncompressed, resized to fit a box ("760x1280", height x width, or
    "original"). `workers` processes share the work (default: one per CPU). A second call does nothing unless a file has
    changed, and continues an interrupted call.

    Raises DataError if files are missing or wrong (and `skip_bad` is off), SettingsError for an unknown name, a
    description with mistakes or a `cache` that is no size, EnvironmentProblem if the disk has no room for the cache.
    """
    box = _parse_box(cache) if cache is not None else None
    datasets = _locate(dataset, data_root, check)
    indexes = []
    for found in datasets:
        with _hold(data_root / "prepared" / found.name, check):
            indexes.append(_prepare_one(found, data_root, check, skip_bad, workers))
    if cache is not None:
        _make_caches(datasets, indexes, box, workers)
    if not check:
        command = _suggest_command(dataset, indexes[0], data_root)
        talk = "prepare the other domain too, and train with --source and --target"
        console.result(f"next: {command}" if command else talk)
    return indexes


def _hold(folder: Path, check: bool = False) -> AbstractContextManager[None]:
    """Keep other processes from writing into a folder, unless nothing is written."""
    return nullcontext() if check else locked(folder, "take another --data-root")


def _parse_box(text: str) -> tuple[int, int] | None:
    """Height and width from HxW; None from "original"."""
    if text == "original":
        return None
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not found:
        remedy = "height x width of the run's data.source_box or data.target_box, as 760x1280, or original"
        raise SettingsError(f'"{text}" is not a size', "--cache", remedy)
    return int(found[1]), int(found[2])


def _make_caches(
    datasets: Sequence[Dataset], indexes: Sequence[Index], box: tuple[int, int] | None, workers: int | None
) -> None:
    """Store the training images of each dataset that has some."""
    from cluda_cli.preparation.caching import write_cache

    for dataset, index in zip(datasets, indexes, strict=True):
        if index.splits.get("train"):
            scan = scan_files(dataset, index.folder)
            # The key changes with the files.
            names = {pair.image: f"{pair.stem}-{key}" for key, pair in scan.keys.items()}
            with _hold(index.folder):
                cache, items = write_cache(index, names, scan.inputs, box, workers), index.split("train")
            size = sum(map(cache.num_bytes, items)) / 1e9
            console.result(f"{index.name}: {len(items)} training images cached in {cache.folder} ({size:.1f} GB)")


def _locate(name: str, data_root: Path, check: bool) -> Sequence[Dataset]:
    """The raw datasets of a name or a description. Unpacks archives and draws the demo if needed."""
    known = {published.name: published for published in PUBLISHED}
    if name in known:
        _unpack(known[name], data_root, check)
        return (known[name].locate(data_root),)
    if name == "demo":
        folder = data_root / "demo"
        if not check:
            from cluda_cli.demo.dataset import make_demo

            with _hold(folder):
                make_demo(folder)
        elif not (folder / "demo.json").is_file():
            raise DataError("the demonstration has not been made yet", folder, "run without --check")
        return locate_demo(folder)
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return (read_description(path),)
        raise SettingsError("no such description", path)
    raise SettingsError(
        f'no dataset "{name}"', "prepare", f"known: {', '.join(known)}, demo, or a .toml file that describes your own"
    )


def _unpack(published: Published, data_root: Path, check: bool) -> None:
    """Unpack missing files from the publisher's archives, unless the folder has another layout than they."""
    folder = published.find_folder(data_root)
    layout = published.find_layout(data_root)
    if layout and not layout.as_published:
        return
    archives = find_archives(published.archives, (data_root, folder))
    with _hold(folder, check or not archives):
        for path, archive in archives:
            if not check:
                unpack(path, archive, folder)
            elif missing := find_missing(path, archive, folder):
                console.result(f"{path}: {len(missing)} files are not unpacked yet")


def _prepare_one(dataset: Dataset, data_root: Path, check: bool, skip_bad: bool, workers: int | None) -> Index:
    """Scan, check and convert one dataset, report, and write its index."""
    _refuse_names(dataset.root, data_root)
    _refuse_other(dataset, data_root / "prepared" / dataset.name)
    scan = scan_files(dataset, data_root / "prepared" / dataset.name)
    if not check and (index := _load_current(scan, skip_bad)):
        counts = [f"{len(items)} {name}" for name, items in index.splits.items()]
        if (manifest := _read_manifest(scan.folder)) and manifest.bad:
            counts.append(f"without {manifest.bad} bad files")
        console.result(f"{dataset.name}: up to date ({', '.join(counts)})")
        return index
    console.info(f"{dataset.name}: {len(scan.keys)} images below {dataset.root}")
    manifest = _read_manifest(scan.folder)
    if not check and (manifest is None or manifest.inputs != scan.inputs):
        (scan.folder / "index.json").unlink(missing_ok=True)  # it describes files that have changed
    outcomes = check_all(scan, workers) if check else convert_missing(scan, workers)
    index = _build_index(scan, outcomes)
    problems = [
        *scan.problems,
        *(p for outcome in outcomes.values() for p in outcome.problems),
        *_find_absent_classes(index),
        *_find_lone_classes(index),
    ]
    for line in format_report(problems):
        console.result(line)
    num_errors = len({problem.file for problem in problems if problem.kind.is_error})
    num_left_out = len({problem.file for problem in problems if problem.kind.leaves_out})
    if num_errors and not skip_bad:
        number = f"{num_errors} files" if num_errors > 1 else "1 file"
        remedy = "correct them, or leave out the pairs concerned with --skip-bad"
        raise DataError(f"{number} would spoil training, as listed above", dataset.name, remedy)
    if not any(index.splits.values()):
        raise DataError("no usable image is left", dataset.root, "see the problems above")
    index = _drop_labels(index, [problem.file for problem in problems if problem.kind is Kind.BLANK])
    if num_left_out and not check:
        console.result(f"left out, because of the errors above: {num_left_out} files")
    if not check:
        index.save()
        content = {"inputs": scan.inputs, "bad": num_left_out, "accepted": num_errors}
        write_json(scan.folder / "manifest.json", content)
    _summarise(index)
    return index


def _refuse_names(*folders: Path) -> None:
    """Raises DataError for a path that cannot be stored."""
    for folder in folders:
        text = os.path.realpath(folder)
        if not is_text(text):
            raise DataError("the name of this folder is not UTF-8", escape(text), "rename it")


def _refuse_other(dataset: Dataset, folder: Path) -> None:
    """Raises DataError if another dataset was prepared under this name: its labels would be replaced."""
    if (folder / "index.json").is_file():
        try:
            root = Index.load(folder).root
        except DataError:
            return  # a broken index may be replaced
        if root.resolve() != Path(dataset.root).resolve() and root.exists():
            remedy = "give the description another name, or remove that folder"
            raise DataError(f'"{dataset.name}" is prepared from {root}', folder, remedy)


def _load_current(scan: Scan, skip_bad: bool) -> Index | None:
    """The index on disk, if it was made from the present files and its train-id maps are as they were written."""
    manifest = _read_manifest(scan.folder)
    if manifest is None or manifest.inputs != scan.inputs or (manifest.accepted and not skip_bad):
        return None
    try:
        index = Index.load(scan.folder)
    except DataError:
        return None
    labelled = [item for name in index.splits for item in index.labelled(name)]
    changed = [item for item in labelled if not item.stamp or read_stamp(index.label_path(item)) != item.stamp[2:]]
    for item in changed:  # not as we wrote it: it is made again
        index.label_path(item).unlink(missing_ok=True)
    return None if changed else index


def _read_manifest(folder: Path) -> ManifestFile | None:
    """What the index on disk was made from; None if unknown."""
    try:
        return read_stored(folder / "manifest.json", ManifestFile)
    except (OSError, ValueError):
        return None


def _build_index(scan: Scan, outcomes: dict[str, Outcome]) -> Index:
    """The index of all pairs without an error."""
    splits: dict[str, list[Item]] = {split.name: [] for split in scan.dataset.splits}
    for key, pair in scan.keys.items():
        if not outcomes[key].is_bad:
            path = scan.label_path(pair) if pair.label else None
            label = path.relative_to(scan.folder).as_posix() if path else None
            stamp = (*read_stamp(scan.dataset.root / pair.image), *(read_stamp(path) if path else (0, 0)))
            splits[pair.split].append(Item(pair.image, label, outcomes[key].size, outcomes[key].pixels, stamp))
    return Index(
        name=scan.dataset.name,
        folder=scan.folder,
        root=scan.dataset.root,
        classes=scan.dataset.classes,
        splits={name: tuple(items) for name, items in splits.items() if items},
        margins=scan.dataset.margins,
        references={
            pair.image: pair.reference for key, pair in scan.keys.items() if pair.reference and not outcomes[key].is_bad
        },
    )


def _find_absent_classes(index: Index) -> list[Problem]:
    """A problem for each class without a pixel in a labelled split."""
    return [
        Problem(Kind.ABSENT, name, f"in the labels of split {split}")
        for split in index.splits
        if index.labelled(split)
        for name, count in zip(index.classes.names, index.class_pixels(split), strict=True)
        if not count
    ]


def _find_lone_classes(index: Index) -> list[Problem]:
    """A problem for each labelled split whose labels hold no class, or one only: nothing can be learnt or scored."""
    found = []
    for split in index.splits:
        names = seen_classes([index], split)
        if index.labelled(split) and len(names) < 2:
            found.append(Problem(Kind.LONE, split, names[0]) if names else Problem(Kind.BLANK, split))
    return found


def _drop_labels(index: Index, names: Collection[str]) -> Index:
    """The index with the images of some splits as unlabelled ones."""
    splits = dict(index.splits)
    for name in names:
        splits[name] = tuple(
            replace(item, label=None, pixels={}, stamp=item.stamp and (*item.stamp[:2], 0, 0)) for item in splits[name]
        )
    return replace(index, splits=splits)


def _summarise(index: Index) -> None:
    """Print the images of each split, and the share of the labelled pixels of each class."""
    rows = [(name, str(len(items)), str(len(index.labelled(name)))) for name, items in index.splits.items()]
    console.result_table(index.name, ("split", "images", "labelled"), rows)
    labelled = [split for split in index.splits if index.labelled(split)]
    if not labelled:
        return
    pixels = [index.class_pixels(split) for split in labelled]
    shares = [
        (name, *(f"{100 * of[i] / sum(of):.2f}" if of[i] else "-" for of in pixels))
        for i, name in enumerate(index.classes.names)
    ]
    console.result_table("", ("class", *(f"{split} %" for split in labelled)), shares)


def _suggest_command(dataset: str, index: Index, data_root: Path) -> str:
    """The command that trains with the prepared dataset, empty while there is no other domain."""
    root = [] if data_root == Path("data") else ["--data-root", str(data_root)]
    if dataset == "demo":
        return shlex.join(["cluda", "train", "--preset", "demo", *root])
    is_source = bool(index.labelled("train")) and dataset not in PHOTOGRAPHED
    others = _find_partners(index.name, data_root, labelled=not is_source)
    if not others:
        return ""
    source, target = (index.name, others[0]) if is_source else (others[0], index.name)
    return shlex.join(["cluda", "train", "--source", source, "--target", target, *root])


def _find_partners(name: str, data_root: Path, *, labelled: bool) -> list[str]:
    """Names of the other prepared datasets with training images, with labels if `labelled`; usual ones first."""
    found = []
    for path in (data_root / "prepared").glob("*/index.json"):
        with suppress(DataError):
            index = Index.load(path.parent)
            if path.parent.name != name and (index.labelled("train") if labelled else index.splits.get("train")):
                found.append(path.parent.name)
    return sorted(found, key=lambda other: (other not in (RENDERED if labelled else PHOTOGRAPHED), other))
