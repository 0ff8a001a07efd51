"""The embedded dataset on disk: deterministic, complete, and whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluda_cli.demo import dataset as demo
from cluda_cli.demo.canvas import HEIGHT, WIDTH
from cluda_cli.demo.objects import LABEL
from cluda_cli.errors import DataError

COUNTS = {"render": {"train": 2, "val": 1}, "camera": {"train": 1, "val": 2}}


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): pixels(p).tobytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.make_demo(folder, seed=3, counts=COUNTS)
    return folder


def test_layout_and_counts(made: Path) -> None:
    for domain, splits in COUNTS.items():
        for split, count in splits.items():
            for kind in ("images", "labels"):
                names = sorted(p.name for p in (made / domain / split / kind).iterdir())
                assert names == [f"{i:04d}.png" for i in range(count)]
    assert json.loads((made / "demo.json").read_text()) == {"version": demo.VERSION, "seed": 3, "counts": COUNTS}


def test_images_and_labels_fit_and_ids_are_legal(made: Path) -> None:
    legal = {0, *LABEL.values()}
    for path in made.glob("*/*/images/*.png"):
        with Image.open(path) as image, Image.open(path.parents[1] / "labels" / path.name) as label:
            assert (image.mode, label.mode) == ("RGB", "L")
            assert image.size == label.size == (WIDTH, HEIGHT)
            assert set(np.unique(np.asarray(label)).tolist()) <= legal


def test_same_seed_same_pixels_other_seed_other_pixels(made: Path, tmp_path: Path) -> None:
    demo.make_demo(tmp_path / "same", seed=3, counts=COUNTS)
    demo.make_demo(tmp_path / "other", seed=4, counts=COUNTS)
    assert contents(tmp_path / "same") == contents(made)
    other = contents(tmp_path / "other")
    assert all(other[name] != value for name, value in contents(made).items())


def test_no_image_occurs_twice(made: Path) -> None:
    images = [value for name, value in contents(made).items() if "/images/" in name]
    assert len(set(images)) == len(images)


def test_a_finished_dataset_is_left_alone_and_another_one_replaces_it(tmp_path: Path) -> None:
    demo.make_demo(tmp_path, counts=COUNTS)
    image = tmp_path / "render/train/images/0000.png"
    image.write_bytes(b"kept")
    demo.make_demo(tmp_path, counts=COUNTS)
    assert image.read_bytes() == b"kept"
    demo.make_demo(tmp_path, counts={**COUNTS, "render": {"train": 1, "val": 1}})
    assert [p.name for p in image.parent.iterdir()] == ["0000.png"]
    assert pixels(image).shape == (HEIGHT, WIDTH, 3)


def test_an_interruption_leaves_no_marker_and_the_next_call_completes(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = demo.draw, []

    def interrupted(*arguments: object) -> object:
        drawn.append(arguments)
        if len(drawn) > 2:
            raise KeyboardInterrupt
        return draw(*arguments)  # type: ignore[arg-type]

    demo.make_demo(tmp_path, seed=9, counts={"render": {"train": 1}})  # an older dataset, whose marker must go too
    monkeypatch.setattr(demo, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.make_demo(tmp_path, seed=3, counts=COUNTS)
    assert not (tmp_path / "demo.json").exists()
    monkeypatch.undo()
    demo.make_demo(tmp_path, seed=3, counts=COUNTS)
    assert contents(tmp_path) == contents(made)
    assert (tmp_path / "demo.json").is_file()


def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        demo.make_demo(tmp_path / "file" / "demo", counts=COUNTS)


def test_a_broken_marker_is_no_marker(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{")
    demo.make_demo(tmp_path, counts={"render": {"val": 1}})
    assert json.loads((tmp_path / "demo.json").read_text())["counts"] == {"render": {"val": 1}}
