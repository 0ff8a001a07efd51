"""Check image-label pairs and write their train-id maps.

A line of `journal.jsonl`, beside the index, keeps the outcome of each pair, so that a second run skips the pair. The
line is written after the train-id map is on disk. A line cut short by a crash is skipped and its pair is checked again.
"""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from PIL import Image

from cluda_cli.console import Progress
from cluda_cli.distributed.children import end_with_parent
from cluda_cli.distributed.place import usable_cores
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import atomic, naming, write_text
from cluda_cli.preparation.label_files import LabelReader, count_pixels, read_size
from cluda_cli.preparation.pairing import Pair, find_pairs
from cluda_cli.preparation.problems import BadFile, Kind, Problem
from cluda_cli.preparation.published import Dataset

Task = TypeVar("Task")
Result = TypeVar("Result")
VERSION = 1  # raise it when equal files give another outcome
TASKS_PER_WORKER = 16  # a process takes about a second to start; fewer files are faster without it


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
        root = os.path.relpath(dataset.root, self.folder)
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


def scan_files(dataset: Dataset, folder: Path) -> Scan:
    """Find and pair the files. Raises DataError if there are none."""
    found = find_pairs(dataset.root, dataset.splits)
    if not found.pairs and not found.problems:
        patterns = ", ".join(split.images for split in dataset.splits)
        raise DataError(f"no images match {patterns}", dataset.root, "correct the patterns or the folder")
    return Scan(dataset, folder, {hash_pair(dataset, pair): pair for pair in found.pairs}, tuple(found.problems))


def check_all(scan: Scan, workers: int | None) -> dict[str, Outcome]:
    """Decode the whole of every file and write nothing."""
    conversions = [Conversion(scan.dataset.root, scan.dataset.reader, pair, None) for pair in scan.keys.values()]
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
    root, reader = scan.dataset.root, scan.dataset.reader
    conversions = [Conversion(root, reader, pair, scan.label_path(pair)) for pair in todo.values()]
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


def _is_done(scan: Scan, pair: Pair, outcome: Outcome) -> bool:
    """Whether an earlier outcome still holds: its train-id map, if it has one, must exist."""
    return pair.label is None or outcome.is_bad or scan.label_path(pair).is_file()


def convert(conversion: Conversion) -> Outcome:
    """Check one pair and write its train-id map, unless the pair has a problem."""
    size, problems, train_ids = (0, 0), [], None
    root, pair = conversion.root, conversion.pair
    try:
        size = read_size(root / pair.image, decode=conversion.output is None)
    except BadFile as bad:
        problems.append(bad.to_problem(pair.image))
    if pair.label is not None:
        assert conversion.reader
        try:
            train_ids = conversion.reader.read(root / pair.label)  # H W
        except BadFile as bad:
            problems.append(bad.to_problem(pair.label))
    if train_ids is not None and size != (0, 0) and train_ids.shape != size:
        (height, width), (label_height, label_width) = size, train_ids.shape
        detail = f"{label_width} x {label_height}, image {width} x {height}"
        problems.append(Problem(Kind.SIZE, pair.label or "", detail))
    if train_ids is not None and conversion.output and not problems:
        with atomic(conversion.output) as temporary:
            Image.fromarray(train_ids).save(temporary, format="PNG")
    return Outcome(size, {} if train_ids is None else count_pixels(train_ids), tuple(problems))


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
    stamps = [_read_stamp(dataset.root / path) for path in (pair.image, pair.label) if path]
    content = [VERSION, pair.split, pair.stem, pair.image, pair.label, stamps, _hash_reader(dataset)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def read_journal(path: Path) -> dict[str, Outcome]:
    """Journal key -> outcome, from every whole line; empty if there is no journal."""
    outcomes: dict[str, Outcome] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            key, size, pixels, problems = json.loads(line)
            counts = {int(train_id): count for train_id, count in pixels.items()}
            outcomes[key] = Outcome((size[0], size[1]), counts, tuple(map(Problem.from_json, problems)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue
    return outcomes


def format_line(key: str, outcome: Outcome) -> str:
    problems = [problem.to_json() for problem in outcome.problems]
    return json.dumps([key, outcome.size, outcome.pixels, problems]) + "\n"


def _read_stamp(path: Path) -> tuple[int, int]:
    """Size, bytes, and time of change, ns, of a file; zeros for a missing file, which is reported when it is read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _hash_reader(dataset: Dataset) -> str:
    return hashlib.sha256(repr(dataset.reader).encode()).hexdigest()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which then ends the workers; end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
