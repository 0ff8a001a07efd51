"""Writing the cache: whole files only, what changed only, and never more than the disk holds."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluda_cli.data.cache import Cache, choose_cache, read_cache
from cluda_cli.data.index import Index
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.preparation import caching

Store = Callable[..., Cache]


def state(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.p[gp]m")}


def test_stored_files_are_plain_images(noise_index: Index, store_noise: Store) -> None:
    cache, item = store_noise((40, 50)), noise_index.split("train")[0]
    path = cache.folder / "train" / "town" / "0-k0-1.ppm"
    with Image.open(path) as image, Image.open(path.with_suffix(".pgm")) as label:
        assert image.size == label.size == (50, 33) and (image.mode, label.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(image), cache.image(item).permute(1, 2, 0))
        assert np.array_equal(np.asarray(label), cache.label(item))
    assert cache.num_bytes(item) == 50 * 33 * 4
    assert abs(path.stat().st_size - 50 * 33 * 3) < 20
    assert read_cache(cache.folder) == cache


def test_an_interrupted_cache_is_not_used_and_goes_on(
    noise_index: Index, store_noise: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = caching.store

    def stop_at_2(task: caching.CacheTask) -> None:
        if task.image.name == "2.png":
            raise KeyboardInterrupt
        store(task)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(caching, "store", stop_at_2)
        store_noise((40, 50))
    assert choose_cache(noise_index, (40, 50)) is None
    done = state(noise_index.folder / "cache")
    assert len(done) == 4
    store_noise((40, 50))
    assert {name: time for name, time in state(noise_index.folder / "cache").items() if name in done} == done
    assert choose_cache(noise_index, (40, 50)).files.keys() == {"0.png", "1.png", "2.png"}


def test_only_what_changed_is_stored_again_and_the_old_is_removed(store_noise: Store) -> None:
    folder = store_noise(None).folder
    before = state(folder)
    (folder / "train" / ".1-k1-abcdefgh.ppm").write_text("left by a killed process")
    store_noise(None, "made again", second="1-new")
    after = state(folder)
    assert set(before) - set(after) == {"train/1-k1-1.ppm", "train/1-k1-1.pgm"}
    assert set(after) - set(before) == {"train/1-new-1.ppm", "train/1-new-1.pgm"}
    assert all(after[name] == before[name] for name in set(before) & set(after))


@pytest.mark.parametrize("suffix", [".ppm", ".pgm"])
def test_a_damaged_file_is_stored_again(store_noise: Store, suffix: str) -> None:
    path = store_noise((40, 50)).folder / f"train/1-k1-1{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    store_noise((40, 50))
    assert path.read_bytes() == whole


def test_a_full_disk_is_reported_before_anything_is_written(
    noise_index: Index, store_noise: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 60 * 90 * 4))
    with pytest.raises(EnvironmentProblem, match="GB more"):
        store_noise(None)
    assert not state(noise_index.folder)


def test_an_unreadable_image_is_named(noise_index: Index, store_noise: Store) -> None:
    (noise_index.folder / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        store_noise(None)
    assert caught.value.where == str(noise_index.folder / "1.png")
    assert not (noise_index.folder / "cache" / "original" / "cache.json").exists()
