"""Checking and converting pairs, and what the journal keeps of it."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cluda_cli.data.image_files import Header
from cluda_cli.data.labels import CITYSCAPES, ClassTable, build_id_table
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.preparation import conversion
from cluda_cli.preparation.conversion import (
    Conversion,
    Outcome,
    _check,
    convert,
    convert_missing,
    format_line,
    hash_pair,
    read_journal,
    refuse_misfit,
    run_all,
    scan_files,
)
from cluda_cli.preparation.label_files import IdLabels, Label
from cluda_cli.preparation.pairing import Pair, Split
from cluda_cli.preparation.problems import BadFile, Kind, Problem
from cluda_cli.preparation.published import Dataset

PAIR = Pair("train", "a", "a.png", "a_label.png")
READER = IdLabels(tuple(build_id_table([(5, 0), (6, 1)])), (5, 6))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """One image, 2 x 3, with label ids 5 and 6."""
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    Image.fromarray(np.array([[5, 5, 6], [6, 6, 6]], dtype=np.uint8)).save(tmp_path / "a_label.png")
    return Dataset("town", tmp_path, ClassTable(CITYSCAPES[:2]), READER, (Split("train", "?.png", "?_label.png"),))


def test_a_good_pair_gives_a_train_id_map_and_its_statistics(dataset: Dataset) -> None:
    output = dataset.root / "out" / "a.png"
    assert convert(Conversion(dataset.root, READER, PAIR, output)) == Outcome((2, 3), {0: 2, 1: 4}, ())
    with Image.open(output) as image:
        assert np.asarray(image).tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_bad_pair_gives_its_problem_and_no_map(dataset: Dataset) -> None:
    output = dataset.root / "out" / "a.png"
    Image.new("RGB", (4, 2)).save(dataset.root / "a.png")
    outcome = convert(Conversion(dataset.root, READER, PAIR, output))
    assert outcome.is_bad and not output.exists()
    assert outcome.problems == (Problem(Kind.SIZE, "a_label.png", "3 x 2, image 4 x 2"),)


def test_both_files_of_a_pair_are_checked(dataset: Dataset) -> None:
    for name in ("a.png", "a_label.png"):
        (dataset.root / name).write_bytes(b"")
    outcome = convert(Conversion(dataset.root, READER, PAIR, None))
    assert [(p.kind, p.file) for p in outcome.problems] == [
        (Kind.UNREADABLE, "a.png"), (Kind.UNREADABLE, "a_label.png")
    ]  # fmt: skip


def test_the_key_changes_with_the_files_and_the_reader(dataset: Dataset) -> None:
    keys = [hash_pair(dataset, PAIR)]
    assert hash_pair(dataset, PAIR) == keys[0]
    os.utime(dataset.root / "a_label.png", (1, 1))
    keys.append(hash_pair(dataset, PAIR))
    keys.append(hash_pair(dataset, dataclasses.replace(PAIR, stem="b")))
    keys.append(hash_pair(dataclasses.replace(dataset, reader=dataclasses.replace(READER, known=(5,))), PAIR))
    (dataset.root / "a.png").unlink()
    keys.append(hash_pair(dataset, PAIR))
    assert len(set(keys)) == 5


def test_the_journal_keeps_whole_lines_only(tmp_path: Path) -> None:
    good = Outcome((2, 3), {0: 2, 18: 4}, ())
    bad = Outcome((0, 0), {}, (Problem(Kind.UNREADABLE, "b.png", "cut"),))
    lines = [format_line("a", good), "[]\n", "null\n", format_line("b", bad), format_line("c", good)[:-9]]
    (tmp_path / "journal.jsonl").write_text("".join(lines))
    assert read_journal(tmp_path / "journal.jsonl") == {"a": good, "b": bad}
    assert read_journal(tmp_path / "none.jsonl") == {}


def test_a_journal_of_an_earlier_version_is_not_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its outcomes, nor the train-id maps that it vouches for, nor the index that was made from them."""
    folder = dataset.root / "prepared"
    scan = scan_files(dataset, folder)
    made = convert_missing(scan, 1)
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "VERSION", conversion.VERSION - 1)
        earlier = scan_files(dataset, folder)
    wrong = Outcome((2, 3), {0: 6}, ())
    (folder / "journal.jsonl").write_text("".join(format_line(key, wrong) for key in earlier.keys))
    Image.new("L", (3, 2), 1).save(scan.label_path(PAIR))
    assert earlier.inputs != scan.inputs
    assert convert_missing(scan, 1) == made
    assert np.array_equal(np.asarray(Image.open(scan.label_path(PAIR))), [[0, 0, 1], [1, 1, 1]])
    assert read_journal(folder / "journal.jsonl") == made


def test_a_scan_names_files_and_changes_with_them(dataset: Dataset) -> None:
    folder = dataset.root / "prepared"
    scan = conversion.scan_files(dataset, folder)
    assert list(scan.keys.values()) == [PAIR]
    assert scan.label_path(PAIR) == folder / "labels" / "train" / "a.png"
    os.utime(dataset.root / "a.png", (1, 1))
    assert conversion.scan_files(dataset, folder).inputs != scan.inputs
    with pytest.raises(DataError, match=r"no images: split train: nothing matches \*\.jpg; .* holds 2 \.png"):
        conversion.scan_files(dataclasses.replace(dataset, splits=(Split("train", "*.jpg", required=True),)), folder)


@pytest.mark.parametrize("file", ["a.png", "a_label.png"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_what_says_nothing_about_a_file_is_raised_and_tried_again(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, file: str, error: Exception
) -> None:
    folder, honest = dataset.root / "prepared", PngImagePlugin.PngImageFile.load_prepare

    def fail(image: PngImagePlugin.PngImageFile) -> None:
        if Path(str(image.filename)).name == file:
            raise error
        honest(image)

    (dataset.root / "a.png").write_bytes((dataset.root / "a.png").read_bytes()[:-12])  # so that it is decoded
    scan = scan_files(dataset, folder)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    with pytest.raises((EnvironmentProblem, OSError), match=f"{file}.*: memory ran out|Input/output error.*{file}"):
        convert_missing(scan, 1)
    monkeypatch.undo()
    assert [outcome.is_bad for outcome in convert_missing(scan, 1).values()] == [False]


@pytest.mark.parametrize("error", [OSError("broken data stream"), OSError(errno.EINVAL, "Invalid argument")])
def test_what_a_broken_file_causes_is_kept_as_its_problem(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: PngImagePlugin.PngImageFile) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    (problem,) = convert(Conversion(dataset.root, READER, PAIR, dataset.root / "out" / "a.png")).problems
    assert (problem.kind, problem.file) == (Kind.UNREADABLE, "a_label.png")


def test_few_tasks_or_one_worker_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "ProcessPoolExecutor", None)
    assert list(run_all(abs, [-1, 2, -3], workers=8)) == [1, 2, 3]
    assert list(run_all(abs, list(range(-99, 0)), workers=1)) == list(range(99, 0, -1))


def test_there_is_a_process_for_each_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """One usable core: all tasks run in this process."""
    monkeypatch.setattr(conversion, "usable_cores", lambda: 1)
    monkeypatch.setattr(conversion, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("started processes"))
    assert list(run_all(abs, list(range(-99, 0)), workers=None)) == list(range(99, 0, -1))


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\nfrom cluda_cli.preparation.conversion import run_all\n"
        "if __name__ == '__main__':\n"
        "    for _ in run_all(time.sleep, [0] + [1e-3] * 10_000, workers=2):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # The pipe ends when no process holds it any more.
    done = subprocess.run(
        [sys.executable, "parent.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, timeout=600
    )
    assert done.returncode == -signal.SIGKILL


def test_random_damage_to_the_journal_loses_its_line_only(tmp_path: Path) -> None:
    outcomes = {key: Outcome((2, 3), {0: 2, 18: 4}, (Problem(Kind.IDS, "b.png", "", {"9": 1}),)) for key in "abc"}
    whole = "".join(format_line(key, outcome) for key, outcome in outcomes.items()).encode()
    path, draw = tmp_path / "journal.jsonl", random.Random(0)
    for _ in range(300):
        content, where = bytearray(whole), draw.randrange(len(whole))
        content[where : where + draw.choice([0, 1, 9])] = draw.randbytes(draw.choice([1, 5]))
        path.write_bytes(content)
        found = read_journal(path)
        assert found.items() <= outcomes.items() and len(found) >= 1
    for content in (
        "[" * 99_999,
        "null",
        '["a",[1,1],{"0":' + "9" * 5000 + "},[]]",
        '["a",[1,1],{},[["NONE","","",{}]]]',
    ):
        path.write_text(f"{_check(content.encode()).decode()} {content}\n" + format_line("a", outcomes["a"]))
        assert read_journal(path) == {"a": outcomes["a"]}


@pytest.mark.parametrize(
    ("image", "label", "size", "upright", "expected"),
    [
        (6, 1, (2, 3), False, None),
        (6, 6, (2, 3), False, None),
        (3, 3, (2, 3), False, None),
        (3, 1, (2, 3), True, None),
        (3, 1, (2, 3), False, Kind.ORIENTATION),
        (1, 2, (2, 3), False, Kind.ORIENTATION),
        (6, 1, (3, 2), False, Kind.ORIENTATION),
        (6, 1, (3, 2), True, Kind.ORIENTATION),
        (6, 1, (4, 4), False, Kind.SIZE),
        (1, 1, (3, 2), True, Kind.SIZE),
    ],
)
def test_a_label_lies_on_the_upright_image_for_certain_or_is_refused(
    image: int, label: int, size: tuple[int, int], upright: bool, expected: Kind | None
) -> None:
    header = Header("JPEG", "RGB", 8, (2, 3), image, False)
    kinds = []
    try:
        refuse_misfit(header, Label(np.zeros(size, np.uint8), label), upright)
    except BadFile as bad:
        kinds.append(bad.kind)
        assert image == label or f"EXIF orientation {image}" in bad.detail
    assert kinds == ([expected] if expected else [])
