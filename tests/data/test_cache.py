"""Which cache is chosen, and that it never gives pixels of files that have changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluda_cli.data.cache import Cache, choose_cache, fit_stored, name_box, read_cache
from cluda_cli.data.index import Index
from cluda_cli.errors import DataError
from cluda_cli.files import write_json

Store = Callable[..., Cache]


def test_images_are_never_enlarged() -> None:
    assert fit_stored((1052, 1914), (720, 1280)) == (704, 1280)
    assert fit_stored((1052, 1914), (1440, 2560)) == (1052, 1914)
    assert fit_stored((1052, 1914), None) == (1052, 1914)


def test_boxes_are_named_as_on_the_command_line() -> None:
    assert (name_box((760, 1280)), name_box(None)) == ("760x1280", "original")


@pytest.mark.parametrize("what", ["inputs", "format", "manifest", "broken"])
def test_a_stale_cache_is_reported_and_ignored(
    noise_index: Index, store_noise: Store, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_noise((40, 50)).folder / "cache.json"
    if what == "manifest":  # what `prepare` does when a file has changed
        write_json(noise_index.folder / "manifest.json", {"inputs": "others"})
    elif what == "broken":
        path.write_text("[]")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {what: "another"}))
    assert choose_cache(noise_index, (40, 50)) is None
    error = capsys.readouterr().err
    assert error.startswith("warning") and "out of date" in error and "--cache 40x50" in error


def test_a_cache_of_another_size_is_reported_and_ignored(
    noise_index: Index, store_noise: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store_noise((40, 50))
    assert choose_cache(noise_index, (50, 60)) is None
    assert "the cache 40x50 is not of the size of this run, 50x60" in capsys.readouterr().err


def test_of_several_caches_the_one_that_spares_most_is_used(
    noise_index: Index, store_noise: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store_noise(None), store_noise((40, 50)), store_noise((45, 67))
    capsys.readouterr()
    assert choose_cache(noise_index, (45, 67)).name == "45x67"
    assert "noise: all training images are read from the cache 45x67" in capsys.readouterr().err
    assert choose_cache(noise_index, (30, 40)).name == "original"
    # A box of another shape that comes to the same size for two of the images: all images are better.
    assert choose_cache(noise_index, (44, 50)).name == "original"
    shutil.rmtree(noise_index.folder / "cache" / "original")
    assert choose_cache(noise_index, (44, 50)).name == "40x50"
    assert "noise: 2 of 3 training images" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
@pytest.mark.parametrize("suffix", [".ppm", ".pgm"])
def test_damage_is_one_clear_line(noise_index: Index, store_noise: Store, damage: str, suffix: str) -> None:
    cache, item = store_noise((40, 50)), noise_index.split("train")[1]
    path = cache.folder / f"train/1-k1-1{suffix}"
    spoil(path, damage)
    with pytest.raises(DataError, match="--cache 40x50") as caught:
        _ = cache.image(item), cache.label(item)
    assert caught.value.where == str(path) and "\n" not in str(caught.value)


def spoil(path: Path, damage: str) -> None:
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": whole[:-1], "empty": b"", "other": b"P6\n33 50" + whole[8:]}[damage])


def test_reading_maps_the_file_and_changes_nothing(noise_index: Index, store_noise: Store) -> None:
    cache, item = store_noise(None), noise_index.split("train")[0]
    before = (cache.folder / "train/town/0-k0-1.ppm").read_bytes()
    cache.image(item).zero_()  # copy-on-write
    assert (cache.folder / "train/town/0-k0-1.ppm").read_bytes() == before


@pytest.mark.parametrize("name", ["cache.json", "../../manifest.json"])
def test_a_cache_whose_files_hold_nonsense_is_none(store_noise: Store, name: str) -> None:
    path = (folder := store_noise((40, 50)).folder) / name
    whole = json.loads(path.read_text())
    assert read_cache(folder)
    wrong = ["[" * 9999, "7", "\0", *(json.dumps(whole | {key: 1.5}) for key in whole)]
    wrong += [json.dumps(whole | {"box": box}) for box in ([0, 1], ["a", 2], [10**400, 1])] if "box" in whole else []
    for content in wrong:
        path.write_text(content)
        assert read_cache(folder) is None, content


def test_a_pipe_in_the_cache_is_an_error_not_a_wait(noise_index: Index, store_noise: Store) -> None:
    cache, item = store_noise((40, 50)), noise_index.split("train")[1]
    (cache.folder / "train/1-k1-1.ppm").unlink()
    os.mkfifo(cache.folder / "train/1-k1-1.ppm")
    with pytest.raises(DataError, match="missing"):
        cache.image(item)


def test_a_folder_without_a_cache_is_none(tmp_path: Path) -> None:
    assert read_cache(tmp_path) is None
