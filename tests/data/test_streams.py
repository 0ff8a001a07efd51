"""Batches: what is in them, that they can be resumed, and what users see when something is wrong."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from cluda_cli.data.batch import Batch, to_device
from cluda_cli.data.index import Index, Item
from cluda_cli.data.streams import LOOKAHEAD, batches, count_workers
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.settings import Data, RareClass


def settings(**changes) -> Data:
    plain = {"crop": (24, 32), "source_box": None, "target_box": None, "workers": 0, "rare_class": None}
    return Data(**(plain | changes))


def equal(first: Batch, second: Batch) -> bool:
    values = [[value for crops in batch.values() for value in vars(crops).values()] for batch in (first, second)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_shapes_and_types(index):
    batch = next(batches([index], index, settings(batch_size=3), 0, 0, 1))
    assert batch["source"].image.shape == batch["target"].image.shape == (3, 3, 24, 32)
    source, target = batch["source"], batch["target"]
    for maps in (source.label, source.inside, target.inside, target.valid):
        assert maps.shape == (3, 24, 32) and maps.is_contiguous()
    assert source.valid is None and target.label is None
    assert batch["source"].image.dtype == batch["source"].label.dtype == batch["target"].image.dtype == torch.uint8
    assert batch["source"].inside.dtype == batch["target"].inside.dtype == batch["target"].valid.dtype == torch.bool
    assert equal(to_device(batch, torch.device("cpu")), batch)


def test_any_step_can_be_resumed(index):
    data = settings(rare_class=RareClass(min_pixels=20))
    whole = list(batches([index], index, data, 3, 0, 6))
    assert len(whole) == 6
    resumed = list(batches([index], index, data, 3, 4, 6))
    assert len(resumed) == 2 and all(map(equal, resumed, whole[4:]))
    assert not equal(whole[0], whole[1]) and not equal(whole[0], next(batches([index], index, data, 4, 0, 1)))
    assert list(batches([index], index, data, 3, 6, 6)) == []


def test_an_image_does_not_depend_on_the_batch_size(index):
    single, double = (next(batches([index], index, settings(batch_size=size), 0, 5, 6)) for size in (1, 2))
    assert torch.equal(single["source"].image[0], double["source"].image[0])
    assert torch.equal(single["target"].image[0], double["target"].image[0])


def test_loader_processes_make_the_same_batches(fork_server, index):
    state = torch.get_rng_state()
    alone = list(batches([index], index, settings(), 0, 2, 7))
    shared = list(batches([index], index, settings(workers=2), 0, 2, 7))
    assert len(alone) == len(shared) == 5 and all(map(equal, alone, shared))
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_processes_outlive_signals_to_the_whole_group(fork_server, index):
    """Ctrl-C and a scheduler's SIGTERM: the training process finishes its step and saves before it stops."""
    expected = list(batches([index], index, settings(), 0, 0, 12))
    stream = batches([index], index, settings(workers=1), 0, 0, 12)
    received = [next(stream)]
    (loader,) = multiprocessing.active_children()
    os.kill(loader.pid, signal.SIGINT)
    os.kill(loader.pid, signal.SIGTERM)
    received += list(stream)
    assert len(received) == 12 and all(map(equal, received, expected))


def test_loader_processes_end_with_the_stream(fork_server, index):
    stream = batches([index], index, settings(workers=1), 0, 0, 1000)
    next(stream)
    assert multiprocessing.active_children()
    stream.close()
    deadline = time.monotonic() + 600  # for machines with much else to do
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_killed_loader_is_an_environment_problem(fork_server, index):
    stream = batches([index], index, settings(workers=1), 0, 0, 1000)
    next(stream)
    (loader,) = multiprocessing.active_children()
    os.kill(loader.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentProblem, match=r"data\.workers"):
        list(stream)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_the_other_loaders_end_when_one_is_killed(fork_server, index, monkeypatch):
    """Otherwise this process could never exit: they ignore the one SIGTERM with which it waits for them."""
    monkeypatch.setattr("cluda_cli.data.streams.usable_cores", lambda: 2)
    stream = batches([index], index, settings(workers=2), 0, 0, 1000)
    next(stream)
    first, other = multiprocessing.active_children()
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentProblem, match="a loader process ended unexpectedly"):
        list(stream)
    other.join(600)
    assert other.exitcode == -signal.SIGKILL


def test_a_temporary_folder_with_a_long_path_is_named(index, monkeypatch):
    def fail(*_):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("cluda_cli.data.streams.DataLoader.__iter__", fail)
    monkeypatch.setattr("cluda_cli.data.streams.tempfile.gettempdir", lambda: "/long")
    with pytest.raises(EnvironmentProblem, match="/long: is too long .* set TMPDIR"):
        next(batches([index], index, settings(workers=1), 0, 0, 9))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["0.png", "0_label.png"])
def test_unreadable_file_is_one_clear_line(fork_server, tmp_path, workers, name, make_index):
    source, target = make_index(tmp_path / "source", [(40, 60)]), make_index(tmp_path / "target", [(40, 60)])
    (source.folder / name).write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        list(batches([source], target, settings(workers=workers), 0, 0, 2))
    assert caught.value.where == str(source.folder / name)
    expected = "not an image, or not one of PNG, JPEG, BMP, GIF, TIFF, WEBP, PPM"
    assert str(caught.value) == f"{source.folder / name}: {expected}"


def test_sources_whose_labels_hold_one_class_are_refused(tmp_path, index):
    lone = Index("lone", tmp_path, tmp_path, index.classes, {"train": (Item("a.png", "b.png", (40, 60), {1: 9}),)})
    with pytest.raises(DataError, match="the labels hold one class only: sidewalk"):
        batches([lone], index, settings(), 0, 0, 1)
    other = Index("other", tmp_path, tmp_path, index.classes, {"train": (Item("a.png", "b.png", (40, 60), {2: 9}),)})
    batches([lone, other], index, settings(), 0, 0, 1).close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_are_the_same(index, workers):
    expected = next(batches([index], index, settings(), 0, 0, 1))
    pinned = next(batches([index], index, settings(workers=workers), 0, 0, 1, pin_memory=True))
    assert all(crops.image.is_pinned() for crops in pinned.values())
    assert equal(to_device(to_device(pinned, torch.device("cuda")), torch.device("cpu")), expected)


def test_a_law_is_asked_shortly_before_its_step(fork_server, index):
    data = settings(rare_class=RareClass(min_pixels=0), batch_size=4, workers=2)
    asked = []

    def law(step):
        asked.append(step)
        return tuple(float(i == step % 2) for i in range(19))

    for step, batch in enumerate(batches([index], index, data, 0, 0, 60, source_law=law)):
        assert len(batch["source"].label) == 4
        assert max(asked) <= step + LOOKAHEAD
    assert asked == list(range(60))


@pytest.mark.parametrize("workers, cores, count", [(0, 4, 0), (3, 4, 3), (8, 4, 4), (64, 64, LOOKAHEAD)])
def test_loaders_are_bounded_by_cores_and_batches_ahead(monkeypatch, workers, cores, count):
    monkeypatch.setattr("cluda_cli.data.streams.usable_cores", lambda: cores)
    assert count_workers(settings(workers=workers)) == count


def test_there_are_no_more_loaders_than_usable_cores(fork_server, index, monkeypatch):
    monkeypatch.setattr("cluda_cli.data.streams.usable_cores", lambda: 1)
    stream = batches([index], index, settings(workers=3), 0, 0, 1000)
    next(stream)
    assert len(multiprocessing.active_children()) == 1
    stream.close()
