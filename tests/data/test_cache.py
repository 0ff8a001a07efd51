"""The cache changes nothing but the time: equal pixels, and never those of files that have changed."""

import dataclasses
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.data.cache import Box, Cache, choose_cache, fit_stored, read_cache
from cluda_cli.data.frames import Frames
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.data.sampling import Crop
from cluda_cli.data.streams import Steps, batches
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import write_json
from cluda_cli.preparation import caching as module
from cluda_cli.preparation.caching import write_cache
from cluda_cli.settings import Data, RareClass

SIZES = [(60, 90), (60, 90), (80, 70)]  # the last is a portrait
NAMES = {"0.png": "town/0-k0", "1.png": "1-k1", "2.png": "2-k2"}


def make_index(folder: Path, *, labels: bool = True) -> Index:
    """Noise, with labels of some size and a manifest as `prepare` writes it."""
    folder.mkdir(parents=True)
    rng, items = np.random.default_rng(0), []
    for i, size in enumerate(SIZES):
        label = rng.integers(0, 5, (size[0] // 10, size[1] // 10)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(label).save(folder / f"{i}_label.png")
        pixels = {k: int((label == k).sum()) for k in range(5)} if labels else {}
        items.append(Item(f"{i}.png", f"{i}_label.png" if labels else None, size, pixels))
    write_json(folder / "manifest.json", {"inputs": "made"})
    return Index("made", folder, folder, ClassTable(CITYSCAPES), {"train": tuple(items)})


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return make_index(tmp_path / "made")


def write(index: Index, box: Box, inputs: str = "made") -> Cache:
    return write_cache(index, NAMES, inputs, box, workers=1)


def state(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.p[gp]m")}


@pytest.mark.parametrize("box", [(40, 50), (45, 67), (120, 180), None], ids=["smaller", "odd", "larger", "original"])
@pytest.mark.parametrize("cached", ["as the run", "original"])
def test_batches_are_equal_to_the_last_bit(tmp_path: Path, index: Index, box: Box, cached: str) -> None:
    rare = RareClass(min_pixels=20, min_crop_share=0.25)
    data = Data(crop=(32, 36), source_box=box, target_box=box, workers=0, rare_class=rare)
    unlabelled = make_index(tmp_path / "other", labels=False)
    expected = list(batches(index, unlabelled, data, 0, 0, 12))
    for dataset in (index, unlabelled):
        write(dataset, box if cached == "as the run" else None)
        for path in dataset.folder.glob("*.png"):
            path.unlink()  # nothing else can be read any more
    for ours, theirs in zip(batches(index, unlabelled, data, 0, 0, 12), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))


def test_stored_files_are_plain_images(index: Index) -> None:
    cache = write(index, (40, 50))
    item = index.split("train")[0]
    path = cache.folder / "train" / "town" / "0-k0-1.ppm"
    with Image.open(path) as image, Image.open(path.with_suffix(".pgm")) as label:
        assert image.size == label.size == (50, 33) and (image.mode, label.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(image), cache.image(item).permute(1, 2, 0))
        assert np.array_equal(np.asarray(label), cache.label(item))
    assert cache.num_bytes(item) == 50 * 33 * 4
    assert abs(path.stat().st_size - 50 * 33 * 3) < 20
    assert read_cache(cache.folder) == cache


def test_images_are_never_enlarged() -> None:
    assert fit_stored((1052, 1914), (720, 1280)) == (704, 1280)
    assert fit_stored((1052, 1914), (1440, 2560)) == (1052, 1914)
    assert fit_stored((1052, 1914), None) == (1052, 1914)


def test_an_interrupted_cache_is_not_used_and_goes_on(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    store = module.store

    def stop_at_2(job: module.CacheTask) -> None:
        if job.image.name == "2.png":
            raise KeyboardInterrupt
        store(job)

    monkeypatch.setattr(module, "store", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        write(index, (40, 50))
    assert choose_cache(index, (40, 50)) is None
    done = state(index.folder / "cache")
    assert len(done) == 4
    monkeypatch.setattr(module, "store", store)
    write(index, (40, 50))
    assert {name: time for name, time in state(index.folder / "cache").items() if name in done} == done
    assert choose_cache(index, (40, 50)).files.keys() == NAMES.keys()


def test_only_what_changed_is_stored_again_and_the_old_is_removed(index: Index) -> None:
    cache = write(index, None)
    before = state(cache.folder)
    (cache.folder / "train" / ".1-k1-abcdefgh.ppm").write_text("left by a killed process")
    write_cache(index, NAMES | {"1.png": "1-new"}, "made again", None, workers=1)
    after = state(cache.folder)
    assert set(before) - set(after) == {"train/1-k1-1.ppm", "train/1-k1-1.pgm"}
    assert set(after) - set(before) == {"train/1-new-1.ppm", "train/1-new-1.pgm"}
    assert all(after[name] == before[name] for name in set(before) & set(after))


@pytest.mark.parametrize("what", ["inputs", "format", "manifest", "broken"])
def test_a_stale_cache_is_told_and_ignored(index: Index, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache = write(index, (40, 50))
    path = cache.folder / "cache.json"
    if what == "manifest":  # what `prepare` does when a file has changed
        write_json(index.folder / "manifest.json", {"inputs": "others"})
    elif what == "broken":
        path.write_text("[]")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {what: "another"}))
    frames = Frames(index, (40, 50))
    assert frames.cache is None and frames.image(index.split("train")[0], Crop(0, 0, 9, 9)).shape == (3, 9, 9)
    error = capsys.readouterr().err
    assert error.startswith("warning") and "out of date" in error and "--cache 40x50" in error


def test_a_cache_of_another_size_is_told_and_ignored(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    write(index, (40, 50))
    assert choose_cache(index, (50, 60)) is None
    assert "the cache 40x50 is not of the size of this run, 50x60" in capsys.readouterr().err


def test_of_several_caches_the_one_that_spares_most_is_used(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    write(index, None), write(index, (40, 50)), write(index, (45, 67))
    capsys.readouterr()
    assert choose_cache(index, (45, 67)).name == "45x67"
    assert "made: all training images are read from the cache 45x67" in capsys.readouterr().err
    assert choose_cache(index, (30, 40)).name == "original"
    # A box of another shape that comes to the same size for two of the images: all images are better.
    assert choose_cache(index, (44, 50)).name == "original"
    shutil.rmtree(index.folder / "cache" / "original")
    assert choose_cache(index, (44, 50)).name == "40x50"
    assert "made: 2 of 3 training images" in capsys.readouterr().err


def test_what_the_cache_lacks_is_decoded(index: Index) -> None:
    whole = [Frames(index, (40, 50)).image(item, Crop(0, 0, 9, 9)) for item in index.split("train")]
    cache = write(index, (40, 50))
    path = cache.folder / "cache.json"
    content = json.loads(path.read_text())
    del content["files"]["1.png"]
    path.write_text(json.dumps(content))
    frames = Frames(index, (40, 50))
    assert list(frames.cache.files) == ["0.png", "2.png"]
    for item, expected in zip(index.split("train"), whole, strict=True):
        assert torch.equal(frames.image(item, Crop(0, 0, 9, 9)), expected)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
@pytest.mark.parametrize("suffix", [".ppm", ".pgm"])
def test_damage_is_one_clear_line_and_is_repaired(index: Index, damage: str, suffix: str) -> None:
    cache = write(index, (40, 50))
    path = cache.folder / f"train/1-k1-1{suffix}"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-1], "empty": b"", "other": b"P6\n33 50" + whole[8:]}[damage])
    item = index.split("train")[1]
    with pytest.raises(DataError, match="--cache 40x50") as caught:
        _ = cache.image(item), cache.label(item)
    assert caught.value.where == str(path) and "\n" not in str(caught.value)
    write(index, (40, 50))
    assert path.read_bytes() == whole


def test_a_full_disk_is_told_before_anything_is_written(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 60 * 90 * 4))
    with pytest.raises(EnvironmentProblem, match="GB more"):
        write(index, None)
    assert not state(index.folder)


def test_an_unreadable_image_is_named(index: Index) -> None:
    (index.folder / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        write(index, None)
    assert caught.value.where == str(index.folder / "1.png")
    assert not (index.folder / "cache" / "original" / "cache.json").exists()


def test_reading_a_crop_maps_the_file_and_changes_nothing(index: Index) -> None:
    cache, item = write(index, None), index.split("train")[0]
    before = (cache.folder / "train/town/0-k0-1.ppm").read_bytes()
    cache.image(item).zero_()  # copy-on-write
    assert (cache.folder / "train/town/0-k0-1.ppm").read_bytes() == before


def test_size_that_differs_from_the_index_is_refused(index: Index) -> None:
    item = dataclasses.replace(index.split("train")[0], size=(61, 90))
    with pytest.raises(DataError, match=r"the image is 60 x 90, the index says 61 x 90 -> run `cluda prepare`"):
        Frames(index, None).image(item, Crop(0, 0, 9, 9))
    with pytest.raises(DataError, match=r"the label is 60 x 90, the index says 61 x 90"):
        Frames(index, None).label(item)


def test_loader_processes_read_the_cache(index: Index) -> None:
    data = Data(crop=(32, 36), source_box=None, target_box=None, workers=1, rare_class=None)
    write(index, None)
    expected = Steps(index, index, data, 0)[3]
    for path in index.folder.glob("*.png"):
        os.remove(path)
    (batch,) = batches(index, index, data, 0, 3, 4)
    assert torch.equal(batch.source_image, expected.source_image)
