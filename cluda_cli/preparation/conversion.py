"""Check pairs, write their train-id maps, and remember the outcome of each, so that a second run need not look again.

The outcomes are lines of `journal.jsonl` beside the index. A line is written after its train-id map is on disk; a line
cut short by a crash is skipped, and its pair looked at again.
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
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import atomic, write_text
from cluda_cli.preparation.label_files import LabelReader, count_pixels, image_size
from cluda_cli.preparation.pairing import Pair, find_pairs
from cluda_cli.preparation.problems import BadFile, Kind, Problem
from cluda_cli.preparation.published import Dataset

Task = TypeVar("Task")
Result = TypeVar("Result")
VERSION = 1  # raise it when the outcome for equal files changes
TASKS_PER_WORKER = 16  # a process takes about a second to start, which fewer files do not repay


@dataclass(frozen=True)
class Scan:
    """A raw dataset as it lies on disk, before its files are opened."""

    dataset: Dataset
    folder: Path
    """The prepared folder."""
    keys: dict[str, Pair]
    """Journal key -> pair."""
    problems: tuple[Problem, ...]
    """What is wrong with the way the files are stored."""

    @property
    def inputs(self) -> str:
        """Hash of everything that decides the index; what does not change it is up to date."""
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
    """What is known about one pair after it was looked at."""

    size: tuple[int, int]
    """Height and width of the image."""
    pixels: dict[int, int]
    """Train id -> pixels of the label."""
    problems: tuple[Problem, ...]

    @property
    def is_bad(self) -> bool:
        return any(problem.kind.is_error for problem in self.problems)


@dataclass(frozen=True)
class Job:
    """One pair to look at; sent to a worker process."""

    root: Path
    reader: LabelReader | None
    pair: Pair
    output: Path | None
    """Where the train-id map goes; None only checks, and decodes the image in full."""


def scan_files(dataset: Dataset, folder: Path) -> Scan:
    """Find and pair the files. Raises DataError if there are none."""
    found = find_pairs(dataset.root, dataset.splits)
    if not found.pairs and not found.problems:
        patterns = ", ".join(split.images for split in dataset.splits)
        raise DataError(f"no images match {patterns}", dataset.root, "correct the patterns or the folder")
    return Scan(dataset, folder, {job_key(dataset, pair): pair for pair in found.pairs}, tuple(found.problems))


def check_all(scan: Scan, workers: int | None) -> dict[str, Outcome]:
    """Decode every file in full and write nothing."""
    jobs = [Job(scan.dataset.root, scan.dataset.reader, pair, None) for pair in scan.keys.values()]
    outcomes: dict[str, Outcome] = {}
    with Progress(f"checking {scan.dataset.name}", len(jobs)) as progress:
        for key, outcome in zip(scan.keys, convert_all(jobs, workers), strict=True):
            outcomes[key] = outcome
            progress.advance()
    return outcomes


def convert_missing(scan: Scan, workers: int | None) -> dict[str, Outcome]:
    """Convert the pairs whose outcome is not known from an earlier run."""
    path = scan.folder / "journal.jsonl"
    earlier = read_journal(path)
    known = {k: earlier[k] for k, pair in scan.keys.items() if k in earlier and _is_done(scan, pair, earlier[k])}
    todo = {key: pair for key, pair in scan.keys.items() if key not in known}
    if not todo:
        return known
    # What is not known any more must be forgotten before its train-id map is overwritten: should this run be stopped
    # and the files restored, the journal would otherwise vouch for the wrong map.
    write_text(path, "".join(journal_line(key, outcome) for key, outcome in known.items()))
    jobs = [Job(scan.dataset.root, scan.dataset.reader, pair, scan.label_path(pair)) for pair in todo.values()]
    outcomes = dict(known)
    with (
        Progress(f"preparing {scan.dataset.name}", len(scan.keys), len(known)) as progress,
        path.open("a", encoding="utf-8") as journal,
    ):
        for key, outcome in zip(todo, convert_all(jobs, workers), strict=True):
            outcomes[key] = outcome
            journal.write(journal_line(key, outcome))
            journal.flush()
            progress.advance()
    return {key: outcomes[key] for key in scan.keys}


def _is_done(scan: Scan, pair: Pair, outcome: Outcome) -> bool:
    """Whether an earlier outcome still stands: its train-id map, if it has one, must still be there."""
    return pair.label is None or outcome.is_bad or scan.label_path(pair).is_file()


def convert(job: Job) -> Outcome:
    """Check one pair and write its train-id map unless something is wrong with it."""
    size, problems, train_ids = (0, 0), [], None
    root, pair = job.root, job.pair
    try:
        size = image_size(root / pair.image, decode=job.output is None)
    except BadFile as bad:
        problems.append(bad.problem(pair.image))
    if pair.label is not None:
        assert job.reader
        try:
            train_ids = job.reader.read(root / pair.label)  # H W
        except BadFile as bad:
            problems.append(bad.problem(pair.label))
    if train_ids is not None and size != (0, 0) and train_ids.shape != size:
        (height, width), (label_height, label_width) = size, train_ids.shape
        detail = f"{label_width} x {label_height}, image {width} x {height}"
        problems.append(Problem(Kind.SIZE, pair.label or "", detail))
    if train_ids is not None and job.output and not problems:
        with atomic(job.output) as temporary:
            Image.fromarray(train_ids).save(temporary, format="PNG")
    return Outcome(size, {} if train_ids is None else count_pixels(train_ids), tuple(problems))


def convert_all(jobs: Sequence[Job], workers: int | None) -> Iterator[Outcome]:
    """Outcomes in the order of the jobs."""
    return run_all(convert, jobs, workers)


def run_all(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None) -> Iterator[Result]:
    """Results in the order of the tasks, from so many processes as pay off; one worker means this process.

    Raises EnvironmentProblem if a worker is killed, usually for want of memory.
    """
    count = min(workers or os.cpu_count() or 1, -(-len(tasks) // TASKS_PER_WORKER))
    if count <= 1:
        yield from map(function, tasks)
        return
    # Spawned rather than forked: the parent may hold threads, and every platform then behaves alike.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_ignore_interrupt)
    try:
        yield from pool.map(function, tasks, chunksize=4)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a worker process was killed, probably for want of memory", "prepare",
            "run the command again with fewer --workers; it goes on where it stopped",
        ) from error  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def job_key(dataset: Dataset, pair: Pair) -> str:
    """Hash of all that decides the outcome of a pair: names, sizes and times of its files, and how labels are read."""
    stamps = [_stamp(dataset.root / path) for path in (pair.image, pair.label) if path]
    content = [VERSION, pair.split, pair.stem, pair.image, pair.label, stamps, _reader_digest(dataset)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def read_journal(path: Path) -> dict[str, Outcome]:
    """Job key -> outcome, of every whole line; empty if there is no journal."""
    outcomes: dict[str, Outcome] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            key, size, pixels, problems = json.loads(line)
            counts = {int(train_id): count for train_id, count in pixels.items()}
            outcomes[key] = Outcome((size[0], size[1]), counts, tuple(map(Problem.from_json, problems)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue
    return outcomes


def journal_line(key: str, outcome: Outcome) -> str:
    problems = [problem.to_json() for problem in outcome.problems]
    return json.dumps([key, outcome.size, outcome.pixels, problems]) + "\n"


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; zeros for one that has gone, which is reported when it is read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _reader_digest(dataset: Dataset) -> str:
    return hashlib.sha256(repr(dataset.reader).encode()).hexdigest()


def _ignore_interrupt() -> None:
    """Ctrl-C is handled by the parent, which then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
