"""The embedded dataset: deterministic, complete, correctly labelled, and with a gap between its domains."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.demo import dataset as demo
from cluda_cli.demo.canvas import HEIGHT, WIDTH, Camera, Canvas, Light, Look
from cluda_cli.demo.domains import DOMAINS
from cluda_cli.demo.shading import make_noise, shade
from cluda_cli.errors import DataError

COUNTS = {"render": {"train": 2, "val": 1}, "camera": {"train": 1, "val": 2}}
LABEL = {row.name: row.label_id for row in CITYSCAPES}
LIGHT = Light(
    sun=(0.0, 1.0, 0.0), sun_color=(0.0, 0.0, 0.0), ambient=(1.0, 1.0, 1.0), shadow=0.5,
    zenith=(90.0, 150.0, 220.0), skyline=(200.0, 220.0, 240.0), fog=0.0, grain=0.0, lit=0.0,
)  # fmt: skip
CAMERA = Camera(height=1.5, horizon=0.5, focal=0.8, yaw=0.0)
NOISE = make_noise(np.random.default_rng(0))


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


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]]:
    return {domain: [demo.draw(domain, seed, NOISE) for seed in range(16)] for domain in DOMAINS}


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


@pytest.mark.parametrize("domain", ["render", "camera"])
def test_big_classes_are_common_and_most_rare_ones_occur(domain: str, scenes: dict) -> None:
    labels = np.stack([label for _, label in scenes[domain]])
    for name in ("road", "sidewalk", "building", "vegetation", "sky", "car"):
        assert (labels == LABEL[name]).any(axis=(1, 2)).mean() > 0.8, name
    rare = set(LABEL) - {"road", "sidewalk", "building", "vegetation", "sky", "car", "train"}
    assert len([name for name in rare if (labels == LABEL[name]).sum() > 100]) >= 10
    assert (labels == 0).mean() < 0.02


def test_domains_differ_in_color_but_not_in_classes(scenes: dict) -> None:
    def saturation(domain: str) -> float:
        images = np.stack([image for image, _ in scenes[domain]]).astype(float)
        return float((images.max(-1) - images.min(-1)).mean())

    def brightness(domain: str) -> float:
        return float(np.mean([image.mean() for image, _ in scenes[domain]]))

    def shares(domain: str) -> NDArray[np.float64]:
        labels = np.stack([label for _, label in scenes[domain]])
        return np.array([(labels == row.label_id).mean() for row in CITYSCAPES])

    assert saturation("render") > 1.3 * saturation("camera")
    assert brightness("render") > brightness("camera") + 10
    assert np.abs(shares("render") - shares("camera")).sum() < 0.4


def test_labels_follow_the_outlines_of_the_image() -> None:
    canvas = Canvas(CAMERA, LIGHT, LABEL["sky"])
    canvas.paint([(-1, 0.5, 5), (1, 0.5, 5), (1, 2.5, 5), (-1, 2.5, 5)], LABEL["car"], Look((255.0, 0.0, 0.0)))
    scene = canvas.finish()
    red = shade(scene, CAMERA, LIGHT, NOISE, {LABEL["road"]})
    car = scene.make_labels() == LABEL["car"]
    inside = (red[..., 0] > 250) & (red[..., 1] < 5)
    assert car.sum() == pytest.approx((2 / 5 * 0.8 * WIDTH) ** 2, rel=0.05)
    assert (inside & ~car).sum() == 0
    assert (car & ~inside).sum() <= 4 * np.sqrt(car.sum())  # only the smoothed rim


def test_nearer_things_hide_farther_ones_and_what_is_behind_the_camera_is_cut() -> None:
    canvas = Canvas(CAMERA, LIGHT, LABEL["sky"])
    canvas.paint([(-3, 0, -5), (3, 0, -5), (3, 0, 50), (-3, 0, 50)], LABEL["road"], Look((90.0, 90.0, 90.0)))
    canvas.paint([(-1, 0, -9), (1, 0, -9), (1, 3, -9), (-1, 3, -9)], LABEL["bus"], Look((0.0, 0.0, 0.0)))
    canvas.paint([(-1, 0, 6), (1, 0, 6), (1, 1, 6), (-1, 1, 6)], LABEL["car"], Look((0.0, 0.0, 0.0)))
    labels = canvas.finish().make_labels()
    assert not (labels == LABEL["bus"]).any()
    assert (labels[-1] == LABEL["road"]).all()
    assert (labels[0] == LABEL["sky"]).all()
    assert labels[HEIGHT // 2 + 30, WIDTH // 2] == LABEL["car"]


def street(light: Light) -> Canvas:
    """A grey road with a wall in the middle of the view."""
    canvas = Canvas(CAMERA, light, LABEL["sky"])
    canvas.paint([(-9, 0, 1), (9, 0, 1), (9, 0, 90), (-9, 0, 90)], LABEL["road"], Look((90.0, 90.0, 90.0)))
    canvas.paint([(0, 0, 5), (1, 0, 5), (1, 4, 5), (0, 4, 5)], LABEL["building"], Look((50.0, 50.0, 50.0)))
    return canvas


def test_fog_hides_distance() -> None:
    foggy = dataclasses.replace(LIGHT, fog=0.05)
    clear, fog = (
        shade(street(light).finish(), CAMERA, light, NOISE, set())[:, WIDTH // 2 - 9, 0] for light in (LIGHT, foggy)
    )
    far, near = HEIGHT // 2 + 8, HEIGHT - 1  # 41 and 3.6 metres away
    assert (clear[far], clear[near]) == pytest.approx((90, 90), abs=1)
    assert fog[far] > 180
    assert 95 < fog[near] < 120


def test_shadows_fall_on_the_ground_only() -> None:
    sunny = dataclasses.replace(LIGHT, sun=(0.6, 0.8, 0.0))
    canvas = street(sunny)
    before = shade(canvas.finish(), CAMERA, sunny, NOISE, {LABEL["road"]})
    canvas.cast_shadow([(0, 0, 5), (1, 0, 5), (1, 0, 6), (0, 0, 6)], 4.0)
    scene = canvas.finish()
    changed = np.abs(shade(scene, CAMERA, sunny, NOISE, {LABEL["road"]}) - before).max(-1) > 1
    assert changed.sum() > 100
    assert (scene.make_labels()[changed] == LABEL["road"]).all()
    assert np.nonzero(changed)[1].mean() < WIDTH / 2  # away from a sun in the right


def test_pattern_of_windows_is_on_the_wall_only_and_blurs_to_its_mean_in_the_distance() -> None:
    def wall(distance: float) -> NDArray[np.float32]:
        canvas = Canvas(CAMERA, LIGHT, LABEL["sky"])
        side = distance / 2
        corners = [(-side, -side, distance), (side, -side, distance), (side, side, distance), (-side, side, distance)]
        canvas.paint(corners, LABEL["building"], Look((200.0,) * 3, (100.0,) * 3, (1.0, 1.0), (0.5, 1.0)))
        image = shade(canvas.finish(), CAMERA, LIGHT, NOISE, set())
        return image[HEIGHT // 2, WIDTH // 2 - 60 : WIDTH // 2 + 60, 0]

    assert (wall(8).min(), wall(8).max()) == pytest.approx((100, 200), abs=5)
    assert np.abs(wall(800) - 150).max() < 5
