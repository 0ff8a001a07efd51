"""Batches: what is in them, that they can be resumed, and what users see when something is wrong."""

import importlib.util
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.data.batch import Batch, to_device
from cluda_cli.data.draws import LabelledImages, TargetImages
from cluda_cli.data.index import Index, Item, joint_classes, seen_classes
from cluda_cli.data.labels import CITYSCAPES, ClassTable, LabelClass
from cluda_cli.data.streams import LOOKAHEAD, batches
from cluda_cli.errors import DataError, EnvironmentProblem, SettingsError
from cluda_cli.settings import Data, RareClass

BENCH = Path(__file__).parent.parent / "benchmarks" / "bench_stream.py"


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red is the row and whose green is the column, and a label computed from both."""
    row, column = np.mgrid[:height, :width]
    return np.stack([row, column, np.full_like(row, 100)], 2).astype(np.uint8), code(row, column).astype(np.uint8)


def code(row, column):
    return (3 * row + 5 * column) % 19


def make_index(folder: Path, sizes: list[tuple[int, int]], *, labels: bool = True, name: str = "made") -> Index:
    """A dataset of coordinate images; blue tells the number of the image."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i, size in enumerate(sizes):
        image, label = coordinates(*size)
        image[:, :, 2] = i
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(label).save(folder / f"{i}_label.png")
        pixels = {k: int((label == k).sum()) for k in range(19) if (label == k).any()} if labels else {}
        items.append(Item(f"{i}.png", f"{i}_label.png" if labels else None, size, pixels))
    return Index(name, folder, folder, ClassTable(CITYSCAPES), {"train": tuple(items)})


def settings(**changes) -> Data:
    plain = {"crop": (24, 32), "source_box": None, "target_box": None, "workers": 0, "rare_class": None}
    return Data(**(plain | changes))


def equal(first: Batch, second: Batch) -> bool:
    values = [[value for crops in batch.values() for value in vars(crops).values()] for batch in (first, second)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.fixture
def index(tmp_path) -> Index:
    return make_index(tmp_path / "made", [(40, 60), (40, 60), (30, 50)])


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


@pytest.mark.parametrize("rare", [None, RareClass(min_pixels=20)])
def test_image_and_label_stay_aligned(index, rare):
    flips = set()
    for batch in batches([index], index, settings(rare_class=rare), 0, 0, 20):
        row, column = batch["source"].image[:, 0].long(), batch["source"].image[:, 1].long()
        assert torch.equal(batch["source"].label.long(), code(row, column))
        step = column[:, 0, 1] - column[:, 0, 0]
        flips |= set(step.tolist())
        assert torch.equal(column.diff(dim=2), step[:, None, None].expand(2, 24, 31))
        assert (row.diff(dim=1) == 1).all()
    assert flips == {-1, 1}


def test_image_and_label_stay_aligned_when_resized(tmp_path):
    index = make_index(tmp_path, [(80, 120)])
    for batch in batches([index], index, settings(source_box=(40, 60)), 0, 0, 10):
        # Halving: a pixel lies between 2n and 2n + 1 and is rounded up, the nearest label is that of 2n.
        row, column = batch["source"].image[:, 0].long() - 1, batch["source"].image[:, 1].long() - 1
        assert torch.equal(batch["source"].label.long(), code(row, column))


def test_every_image_and_both_flips_of_the_target_occur(index):
    seen, flips, tops = set(), [], set()
    for batch in batches([index], index, settings(), 0, 0, 60):
        seen |= set(batch["target"].image[:, 2, 0, 0].tolist())
        tops |= set(batch["target"].image[:, 0, 0, 0].tolist())
        flips += (batch["target"].image[:, 1, 0, 0] > batch["target"].image[:, 1, 0, 1]).tolist()
    assert seen == {0, 1, 2} and tops >= set(range(17))
    assert 40 <= sum(flips) <= 80  # of 120


def test_small_images_are_padded_at_the_bottom_and_the_right(tmp_path):
    index = make_index(tmp_path, [(20, 28)])
    for batch in batches([index], index, settings(target_margins=(2, 3, 4, 5)), 0, 0, 5):
        inside = torch.zeros(2, 24, 32, dtype=torch.bool)
        inside[:, :20, :28] = True
        assert torch.equal(batch["source"].inside, inside) and torch.equal(batch["target"].inside, inside)
        assert not any(crops.image.mul(~inside[:, None]).any() for crops in batch.values())
        assert (batch["source"].label[~inside] == 255).all() and (batch["source"].label[inside] < 255).all()
        assert not batch["target"].valid[~inside].any()
        assert torch.equal(batch["source"].image[:, 0, :20, 0].long(), torch.arange(20).expand(2, 20))


def test_margins_follow_the_frame(index):
    for batch in batches([index], index, settings(target_margins=(5, 3, 0, 7)), 0, 0, 10):
        row, column, image = batch["target"].image.long().unbind(1)
        height, width = torch.where(image == 2, 30, 40), torch.where(image == 2, 50, 60)
        assert torch.equal(batch["target"].valid, (row >= 5) & (row < height - 3) & (column < width - 7))
        assert batch["target"].inside.all()


def test_margins_of_the_dataset_hold_unless_set(index):
    marked = Index(index.name, index.folder, index.root, index.classes, index.splits, margins=(40 - 24, 0, 0, 0))
    whole = {"crop": (40, 60)}
    batch = next(batches([index], marked, settings(**whole), 0, 0, 1))
    assert torch.equal(batch["target"].valid, batch["target"].inside & (torch.arange(40) >= 16)[None, :, None])
    batch = next(batches([index], marked, settings(**whole, target_margins=(0, 0, 0, 0)), 0, 0, 1))
    assert torch.equal(batch["target"].valid, batch["target"].inside)


@pytest.mark.reference
def test_margins_match_the_reference(tmp_path, golden):
    description = golden("09_pseudo_ema/pseudo_margins")[1]
    size, example = tuple(description["full_image"]), description["example"]
    Image.new("RGB", size[::-1]).save(tmp_path / "0.png")
    target = Index("big", tmp_path, tmp_path, ClassTable(CITYSCAPES), {"train": (Item("0.png", None, size),)})
    data = settings(target_margins=example["margins"], crop=size, batch_size=1)
    crops = TargetImages(target, data)(np.random.default_rng(0))
    inside, valid = crops.inside, crops.valid
    rows, columns = valid.any(1).nonzero().flatten(), valid.any(0).nonzero().flatten()
    assert [rows[0], rows[-1] + 1] == example["valid_rows"]
    assert [columns[0], columns[-1] + 1] == example["valid_columns"]
    assert valid.sum() == len(rows) * len(columns) and inside.all()


def test_margins_that_leave_nothing_are_refused(index):
    with pytest.raises(SettingsError, match=r"data\.target_margins.*30 x 50"):
        batches([index], index, settings(target_margins=(20, 10, 0, 0)), 0, 0, 1)


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


def test_loader_processes_make_the_same_batches(index):
    state = torch.get_rng_state()
    alone = list(batches([index], index, settings(), 0, 2, 7))
    shared = list(batches([index], index, settings(workers=2), 0, 2, 7))
    assert len(alone) == len(shared) == 5 and all(map(equal, alone, shared))
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_processes_outlive_signals_to_the_whole_group(index):
    """Ctrl-C and a scheduler's SIGTERM: the training process finishes its step and saves before it stops."""
    expected = list(batches([index], index, settings(), 0, 0, 12))
    stream = batches([index], index, settings(workers=1), 0, 0, 12)
    received = [next(stream)]
    (loader,) = multiprocessing.active_children()
    os.kill(loader.pid, signal.SIGINT)
    os.kill(loader.pid, signal.SIGTERM)
    received += list(stream)
    assert len(received) == 12 and all(map(equal, received, expected))


def test_loader_processes_end_with_the_stream(index):
    stream = batches([index], index, settings(workers=1), 0, 0, 1000)
    next(stream)
    assert multiprocessing.active_children()
    stream.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_killed_loader_is_an_environment_problem(index):
    stream = batches([index], index, settings(workers=1), 0, 0, 1000)
    next(stream)
    (loader,) = multiprocessing.active_children()
    os.kill(loader.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentProblem, match=r"data\.workers"):
        list(stream)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["0.png", "0_label.png"])
def test_unreadable_file_is_one_clear_line(tmp_path, workers, name):
    source, target = make_index(tmp_path / "source", [(40, 60)]), make_index(tmp_path / "target", [(40, 60)])
    (source.folder / name).write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        list(batches([source], target, settings(workers=workers), 0, 0, 2))
    assert caught.value.where == str(source.folder / name)
    expected = "not an image, or not one of PNG, JPEG, BMP, GIF, TIFF, WEBP, PPM"
    assert str(caught.value) == f"{source.folder / name}: {expected}"


def test_unlabelled_source_is_refused_at_once(tmp_path, index):
    unlabelled = make_index(tmp_path / "none", [(40, 60)], labels=False)
    with pytest.raises(DataError, match="has a label"):
        batches([unlabelled], index, settings(), 0, 0, 1)
    empty = Index("empty", tmp_path, tmp_path, index.classes, {"val": index.splits["train"]})
    for source, target in [(empty, index), (index, empty)]:
        with pytest.raises(DataError, match='no images in split "train"'):
            batches([source], target, settings(), 0, 0, 1)


def test_labels_without_classes_are_refused(tmp_path, index):
    blank = Index("blank", tmp_path, tmp_path, index.classes, {"train": (Item("a.png", "b.png", (40, 60)),)})
    with pytest.raises(DataError, match="no pixel of any class"):
        batches([blank], index, settings(), 0, 0, 1)


def test_sources_whose_labels_hold_one_class_are_refused(tmp_path, index):
    lone = Index("lone", tmp_path, tmp_path, index.classes, {"train": (Item("a.png", "b.png", (40, 60), {1: 9}),)})
    with pytest.raises(DataError, match="source labels hold one class only: sidewalk"):
        batches([lone], index, settings(), 0, 0, 1)
    other = Index("other", tmp_path, tmp_path, index.classes, {"train": (Item("a.png", "b.png", (40, 60), {2: 9}),)})
    batches([lone, other], index, settings(), 0, 0, 1).close()


def test_image_of_another_size_than_its_label_is_refused(tmp_path, index):
    source = make_index(tmp_path / "source", [(40, 60)])
    Image.new("RGB", (60, 41)).save(source.folder / "0.png")
    with pytest.raises(DataError, match="41 x 60.*40 x 60"):
        next(batches([source], index, settings(), 0, 0, 1))


def test_unlabelled_images_are_source_of_nothing_and_labels_of_the_target_are_never_read(tmp_path):
    labelled, other = make_index(tmp_path / "a", [(40, 60)]), make_index(tmp_path / "b", [(40, 60)] * 2)
    items = (*labelled.splits["train"], Item("absent.png", None, (40, 60)))
    source = Index("mixed", labelled.folder, labelled.root, labelled.classes, {"train": items})
    for path in other.folder.glob("*_label.png"):
        path.unlink()
    assert len(list(batches([source], other, settings(), 0, 0, 8))) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_are_the_same(index, workers):
    expected = next(batches([index], index, settings(), 0, 0, 1))
    pinned = next(batches([index], index, settings(workers=workers), 0, 0, 1, pin_memory=True))
    assert all(crops.image.is_pinned() for crops in pinned.values())
    assert equal(to_device(to_device(pinned, torch.device("cuda")), torch.device("cpu")), expected)


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_stream", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stream_draws_as_a_loader_that_repeats_its_whole_pipeline(tmp_path):
    """Both samplers of the benchmark, compared by image, flip, and place of the crop."""
    bench = load_bench()
    index = bench.write_dataset(tmp_path, 3, (32, 48), seed=1)
    data = Data(crop=(16, 16), source_box=None, rare_class=RareClass(min_crop_share=12 / 256))
    stream = LabelledImages(index, index.classes, data)
    # Rows and columns in place of the pictures tell where a crop comes from.
    for i in range(3):
        image = coordinates(32, 48)[0]
        image[:, :, 2] = i
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    counts = np.zeros((2, 3, 2, 3, 3))
    for sampler, draw in enumerate([lambda rng: stream(rng).image, lambda rng: bench.plain_source(stream, rng)[0]]):
        for i in range(600):
            image = draw(np.random.default_rng(10_000 * sampler + i)).long()
            flip, left = int(image[1, 0, 0] > image[1, 0, 1]), int(image[1].min())
            counts[sampler, image[2, 0, 0], flip, image[0, 0, 0] // 6, left // 11] += 1
    first, second = counts.reshape(2, -1)
    used = first + second >= 10
    z = ((first - second)[used] ** 2 / (first + second)[used]).sum()
    assert used.sum() > 8 and (z - used.sum()) / np.sqrt(2 * used.sum()) < 4


def test_several_sources_are_drawn_by_their_shares_in_joint_train_ids(tmp_path):
    """The second source has two classes of the first in another order, and one of its own."""
    first = make_index(tmp_path / "first", [(40, 60)])
    names = ("car", "tram", "road")
    colors = {c.name: c for c in CITYSCAPES}
    own = ClassTable(tuple(colors.get(name, LabelClass(name, (1, 2, 3), i)) for i, name in enumerate(names)))
    folder = tmp_path / "second"
    folder.mkdir()
    label = np.repeat(np.arange(3, dtype=np.uint8), 20)[None].repeat(40, 0)
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(folder / "0.png")
    Image.fromarray(label).save(folder / "0_label.png")
    items = (Item("0.png", "0_label.png", (40, 60), {0: 800, 1: 800, 2: 800}),)
    second = Index("second", folder, folder, own, {"train": items})
    joint = joint_classes([first, second])
    assert joint.names == (*ClassTable(CITYSCAPES).names, "tram")
    assert seen_classes([first, second]) == joint.names
    data = settings(batch_size=100, source_shares=(1, 3), source=("first", "second"), crop=(40, 60))
    crops = next(batches([first, second], first, data, 0, 0, 1))["source"]
    of_second = crops.image[:, 0, 0, 0] == 200
    assert 60 <= of_second.sum() <= 90
    ids = {joint.names.index(name) for name in names}
    assert set(crops.label[of_second].unique().tolist()) == ids
    assert set(crops.label[~of_second].unique().tolist()) == set(range(19))


def test_a_law_chooses_the_classes_and_is_asked_shortly_before_its_step(index):
    data = settings(rare_class=RareClass(min_pixels=0), batch_size=4, workers=2)
    asked = []

    def law(step):
        asked.append(step)
        return tuple(float(i == step % 2) for i in range(19))

    for step, batch in enumerate(batches([index], index, data, 0, 0, 60, source_law=law)):
        assert len(batch["source"].label) == 4
        assert max(asked) <= step + LOOKAHEAD
    assert asked == list(range(60))
    rare = LabelledImages(index, index.classes, data).rare
    drawn = {rare.draw(np.random.default_rng(i), law(1))[0] for i in range(20)}
    assert drawn == {1}
    impossible = tuple(float(i == 400) for i in range(19))
    assert rare.draw(np.random.default_rng(0), impossible) == rare.draw(np.random.default_rng(0))


def test_there_are_no_more_loaders_than_usable_cores(index, monkeypatch):
    monkeypatch.setattr("cluda_cli.data.streams.usable_cores", lambda: 1)
    stream = batches([index], index, settings(workers=3), 0, 0, 1000)
    next(stream)
    assert len(multiprocessing.active_children()) == 1
    stream.close()
