"""Check image-label pairs and write their train-id maps.

A line of `journal.jsonl`, beside the index, keeps the outcome of each pair, so that a second run skips the pair. The
line is written after the train-id map is on disk. A line cut short by a crash is skipped and its pair is checked again.
"""

import hashlib
import json
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, TypeVar

from PIL import Image
from pydantic import AfterValidator, TypeAdapter, ValidationError

from cluda_cli.console import Progress
from cluda_cli.data.counting import count_pixels
from cluda_cli.data.image_files import Header
from cluda_cli.data.index import read_stamp
from cluda_cli.data.stored import Count, TrainId
from cluda_cli.distributed.children import end_with_parent
from cluda_cli.distributed.place import usable_cores
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import atomic, naming, write_text
from cluda_cli.preparation.label_files import Label, LabelReader, check_image
from cluda_cli.preparation.pairing import Pair, find_pairs
from cluda_cli.preparation.problems import BadFile, Kind, Problem
from cluda_cli.preparation.published import Dataset

Task = TypeVar("Task")
Result = TypeVar("Result")
VERSION = 2  # raise it when equal files give another outcome
TASKS_PER_WORKER = 16  # a process takes about a second to start; fewer files are faster without it
_TURNED = {
    1: "upright", 2: "mirrored", 3: "upside down", 4: "mirrored and upside down", 5: "mirrored and on its side",
    6: "on its side", 7: "mirrored and on its side", 8: "on its side",
}  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """The files of a raw dataset, found and paired but not opened."""

    dataset: Dataset
    folder: Path
    """The prepared folder."""
    keys: dict[str, Pair]
    """Journal key -> pair."""
    problems: tuple[Problem, ...]
    """What is wrong with names and places of the files."""

    @property
    def inputs(self) -> str:
        """Hash of everything that the index is made from. The index is up to date while it is equal."""
        dataset = self.dataset
        root = os.path.relpath(os.path.realpath(dataset.root), os.path.realpath(self.folder))
        problems = [problem.to_json() for problem in self.problems]
        content = [dataset.name, root, dataset.classes.to_json(), dataset.margins, list(self.keys), problems]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def label_path(self, pair: Pair) -> Path:
        """Where the train-id map of a pair goes."""
        return self.folder / "labels" / pair.split / f"{pair.stem}.png"


@dataclass(frozen=True)
class Outcome:
    """What the check of one pair found."""

    size: tuple[int, int]
    """Height and width of the image."""
    pixels: dict[int, int]
    """Train id -> pixels of the label."""
    problems: tuple[Problem, ...]

    @property
    def is_bad(self) -> bool:
        return any(problem.kind.is_error for problem in self.problems)


@dataclass(frozen=True)
class Conversion:
    """One pair to check and convert. It is sent to a worker process."""

    root: Path
    reader: LabelReader | None
    pair: Pair
    output: Path | None
    """Where the train-id map goes. None only checks, and decodes the whole image."""
    labels_upright: bool = False
    """`Dataset.labels_upright`."""


def scan_files(dataset: Dataset, folder: Path) -> Scan:
    """Find and pair the files. Raises DataError if there are none."""
    found = find_pairs(dataset.root, dataset.splits)
    if not found.pairs and all(problem.kind is Kind.EMPTY for problem in found.problems):
        what = "; ".join(f"split {problem.file}: {problem.detail}" for problem in found.problems)
        raise DataError(f"no images: {what}", dataset.root, "correct the patterns or the folder")
    return Scan(dataset, folder, {hash_pair(dataset, pair): pair for pair in found.pairs}, tuple(found.problems))


def check_all(scan: Scan, workers: int | None) -> dict[str, Outcome]:
    """Decode the whole of every file and write nothing."""
    conversions = [_plan(scan, pair, None) for pair in scan.keys.values()]
    outcomes: dict[str, Outcome] = {}
    with Progress(f"checking {scan.dataset.name}", len(conversions)) as progress:
        for key, outcome in zip(scan.keys, run_all(convert, conversions, workers), strict=True):
            outcomes[key] = outcome
            progress.advance()
    return outcomes


def convert_missing(scan: Scan, workers: int | None) -> dict[str, Outcome]:
    """Convert the pairs that no earlier run converted. Returns journal key -> outcome of all pairs."""
    path = scan.folder / "journal.jsonl"
    earlier = read_journal(path)
    known = {k: earlier[k] for k, pair in scan.keys.items() if k in earlier and _is_done(scan, pair, earlier[k])}
    todo = {key: pair for key, pair in scan.keys.items() if key not in known}
    if not todo:
        return known
    # The journal drops a pair before its train-id map is overwritten. Otherwise, if this run stopped and the user
    # restored the files, the journal would vouch for the wrong map.
    write_text(path, "".join(format_line(key, outcome) for key, outcome in known.items()))
    conversions = [_plan(scan, pair, scan.label_path(pair)) for pair in todo.values()]
    outcomes = dict(known)
    with (
        naming(path),
        Progress(f"preparing {scan.dataset.name}", len(scan.keys), len(known)) as progress,
        path.open("a", encoding="utf-8") as journal,
    ):
        for key, outcome in zip(todo, run_all(convert, conversions, workers), strict=True):
            outcomes[key] = outcome
            journal.write(format_line(key, outcome))
            journal.flush()
            progress.advance()
    return {key: outcomes[key] for key in scan.keys}


def _plan(scan: Scan, pair: Pair, output: Path | None) -> Conversion:
    dataset = scan.dataset
    return Conversion(dataset.root, dataset.reader, pair, output, dataset.labels_upright)


def _is_done(scan: Scan, pair: Pair, outcome: Outcome) -> bool:
    """Whether an earlier outcome still holds: its train-id map, if it has one, must exist."""
    return pair.label is None or outcome.is_bad or scan.label_path(pair).is_file()


def convert(conversion: Conversion) -> Outcome:
    """Check one pair and write its train-id map, unless the pair has an error.

    Raises OSError or EnvironmentProblem that names the file if the system cannot read it or memory runs out. That says
    nothing about the file, and a later run tries again.
    """
    problems: list[Problem] = []
    header: Header | None = None
    label: Label | None = None
    root, pair = conversion.root, conversion.pair
    try:
        with reading(root / pair.image):
            header = check_image(root / pair.image, decode=conversion.output is None)
    except BadFile as bad:
        problems.append(bad.to_problem(pair.image))
    if pair.label is not None:
        assert conversion.reader
        try:
            with reading(root / pair.label):
                label = conversion.reader.read(root / pair.label)
            if label.note:
                problems.append(Problem(label.note[0], pair.label, label.note[1]))
            if header is not None:
                refuse_misfit(header, label, conversion.labels_upright)
        except BadFile as bad:
            problems.append(bad.to_problem(pair.label))
    if pair.reference is not None and header is not None:
        problems += _check_reference(root / pair.reference, pair.reference, header, decode=conversion.output is None)
    outcome = Outcome(
        (0, 0) if header is None else header.size,
        {} if label is None else count_pixels(label.train_ids),
        tuple(problems),
    )
    if label is not None and conversion.output and not outcome.is_bad:
        with atomic(conversion.output) as temporary:
            Image.fromarray(label.train_ids).save(temporary, format="PNG")
    return outcome


def _check_reference(path: Path, name: str, image: Header, decode: bool) -> list[Problem]:
    """What is wrong with a paired picture."""
    try:
        with reading(path):
            found = check_image(path, decode=decode)
        if found.size != image.size:
            sizes = f"{found.size[1]} x {found.size[0]}, image {image.size[1]} x {image.size[0]}"
            raise BadFile(Kind.REFERENCE, sizes)
    except BadFile as bad:
        return [bad.to_problem(name)]
    return []


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file when the system fails or memory runs out. Raises OSError or EnvironmentProblem."""
    try:
        with naming(path):
            yield
    except MemoryError as error:
        remedy = "close other programs or take fewer --workers, and run the command again; it goes on where it stopped"
        raise EnvironmentProblem("memory ran out", path, remedy) from error


def refuse_misfit(image: Header, label: Label, labels_upright: bool) -> None:
    """Raise BadFile unless it is certain that the label lies on the upright image.

    Where the files have different EXIF orientations, sizes decide: the label must fit the image only when both are
    upright. If it also fits as stored (180 degrees, mirrored, squares), `labels_upright` must say so.
    """
    height, width = label.train_ids.shape
    stored = (width, height) if label.orientation >= 5 else (height, width)
    fits, fits_stored = (height, width) == image.size, stored == image.stored_size
    tagged = ""
    if image.orientation != label.orientation:
        of_label = f", the label {label.orientation}" if label.orientation > 1 else ""
        tagged = f" (EXIF orientation {image.orientation}, {_TURNED[image.orientation]}{of_label})"
        if fits and fits_stored and not labels_upright:
            raise BadFile(Kind.ORIENTATION, f"fits the image as stored and turned upright{tagged}")
        if fits_stored and not fits:
            raise BadFile(Kind.ORIENTATION, f"fits the image only as stored, not turned upright{tagged}")
    if not fits:
        raise BadFile(Kind.SIZE, f"{width} x {height}, image {image.size[1]} x {image.size[0]}{tagged}")


def run_all(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None) -> Iterator[Result]:
    """Run a function on each task in up to `workers` processes, None for one per usable core. Yields results in order.

    Few tasks run in this process. Raises EnvironmentProblem if a worker is killed, usually for want of memory.
    """
    count = min(workers or usable_cores(), -(-len(tasks) // TASKS_PER_WORKER))
    if count <= 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the parent may hold threads, and all platforms behave alike.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield from pool.map(function, tasks, chunksize=4)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a worker process was killed, probably for want of memory", "prepare",
            "run the command again with fewer --workers; it goes on where it stopped",
        ) from error  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def hash_pair(dataset: Dataset, pair: Pair) -> str:
    """Journal key: hash of names, sizes and times of the files of a pair, and of how its label is read."""
    stamps = [read_stamp(dataset.root / path) for path in (pair.image, pair.label) if path]
    how = [_hash_reader(dataset), dataset.labels_upright]
    content = [VERSION, pair.split, pair.stem, pair.image, pair.label, stamps, how]
    if pair.reference:
        content += [pair.reference, read_stamp(dataset.root / pair.reference)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _find_kind(name: str) -> Kind:
    if name not in Kind.__members__:
        raise ValueError("no such kind of problem")
    return Kind[name]


_ProblemRow = tuple[Annotated[str, AfterValidator(_find_kind)], str, str, dict[str, Count]]
_LINE = TypeAdapter(tuple[str, tuple[Count, Count], dict[TrainId, Count], list[_ProblemRow]])


def read_journal(path: Path) -> dict[str, Outcome]:
    """Journal key -> outcome, from every whole line; empty if there is no journal."""
    outcomes: dict[str, Outcome] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        check, _, content = line.partition(b" ")
        if check != _check(content):
            continue
        try:
            key, size, pixels, problems = _LINE.validate_json(content, strict=True)
        except ValidationError:
            continue
        # What a validator makes of a str is a Kind.
        outcomes[key] = Outcome(size, pixels, tuple(Problem(*row) for row in problems))  # type: ignore[arg-type]
    return outcomes


def format_line(key: str, outcome: Outcome) -> str:
    """A checksum of the rest, and the rest as JSON."""
    problems = [problem.to_json() for problem in outcome.problems]
    content = json.dumps([key, outcome.size, outcome.pixels, problems])
    return f"{_check(content.encode()).decode()} {content}\n"


def _check(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)


def _hash_reader(dataset: Dataset) -> str:
    return hashlib.sha256(repr(dataset.reader).encode()).hexdigest()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which then ends the workers; end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
