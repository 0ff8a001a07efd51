"""The embedded dataset: drawn street scenes in two domains, so that everything can be tried without a download.

    <folder>/demo.json                                      written last: the dataset is whole
    <folder>/{render,camera}/{train,val}/images/NNNN.png    RGB
    <folder>/{render,camera}/{train,val}/labels/NNNN.png    Cityscapes label ids, 8-bit, one channel, 0 = unlabelled

"render" looks like a clean computer picture at noon: saturated flat colours, sharp edges. "camera" looks like
photographs of similar streets: other colours and textures, dusk, low sun, overcast, fog, a soft and noisy lens.
"""

import json
import math
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cluda_cli import console
from cluda_cli.demo.canvas import HEIGHT, WIDTH, Camera, Canvas, Floats, Light, Point, Rgb
from cluda_cli.demo.domains import DOMAINS, DomainStyle
from cluda_cli.demo.objects import LABEL, Brush
from cluda_cli.demo.scenes import draw_street
from cluda_cli.demo.shading import make_noise, shade
from cluda_cli.errors import DataError
from cluda_cli.files import read_text, write_json
from cluda_cli.seeds import derive_seed

VERSION = 3
"""Raise it when the pixels change, so that an older dataset is drawn again."""
COUNTS: Mapping[str, Mapping[str, int]] = {"render": {"train": 240, "val": 20}, "camera": {"train": 240, "val": 60}}
"""Images of each domain and split."""
_GROUND = {LABEL["road"], LABEL["sidewalk"], LABEL["terrain"]}
_THREADS = 2


def make_demo(folder: Path, seed: int = 0, counts: Mapping[str, Mapping[str, int]] = COUNTS) -> None:
    """Draw the dataset into `folder`, unless it already holds the same one.

    `counts` gives images by domain and split. The same seed gives the same pixels. `demo.json`, the marker, is removed
    first and written last; after an interruption the next call starts again. Raises DataError if the folder cannot be
    written.
    """
    marker = folder / "demo.json"
    content = {"version": VERSION, "seed": seed, "counts": {domain: dict(splits) for domain, splits in counts.items()}}
    if _read_marker(marker) == content:
        return
    tasks = [(domain, split, i) for domain in counts for split in counts[domain] for i in range(counts[domain][split])]
    noise = make_noise(np.random.default_rng(derive_seed(seed, "demo-noise")))

    def draw_file(task: tuple[str, str, int]) -> None:
        domain, split, i = task
        image, label = draw(domain, derive_seed(seed, f"demo-{domain}-{split}", i), noise)
        for kind, pixels in (("images", image), ("labels", label)):
            # Not flushed to disk one by one, which would take a minute; the marker vouches for all of them.
            Image.fromarray(pixels).save(folder / domain / split / kind / f"{i:04d}.png", compress_level=1)

    try:
        marker.unlink(missing_ok=True)
        _clear_folders(folder, counts)
        with console.Progress("drawing", len(tasks)) as progress, ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(draw_file, tasks):
                progress.advance()
        write_json(marker, content)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", folder, "choose another --data-root") from error


def _read_marker(marker: Path) -> object:
    """The content of the marker; None if it cannot be read."""
    try:
        return json.loads(read_text(marker))
    except (OSError, ValueError, RecursionError):
        return None


def _clear_folders(folder: Path, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Make the folders and remove the images of an earlier dataset."""
    for domain, splits in counts.items():
        for path in (folder / domain / split / kind for split in splits for kind in ("images", "labels")):
            path.mkdir(parents=True, exist_ok=True)
            for old in path.glob("[0-9][0-9][0-9][0-9].png"):
                old.unlink()


def draw(domain: str, seed: int, noise: Floats) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene: RGB image, H W 3, and Cityscapes label ids, H W, 0 = unlabelled."""
    style, pick, generator = DOMAINS[domain], random.Random(seed), np.random.default_rng(seed)
    streets = style.streets
    camera = Camera(
        pick.uniform(*streets.camera_height), pick.uniform(*streets.horizon), pick.uniform(*streets.focal),
        pick.uniform(-streets.yaw, streets.yaw),
    )  # fmt: skip
    light = _choose_light(style, pick)
    canvas = Canvas(camera, light, LABEL["sky"])
    draw_street(Brush(canvas, pick, style.palette), streets)
    painting = canvas.finish()
    image = shade(painting, camera, light, np.roll(noise, generator.integers(noise.size)), _GROUND)
    return _photograph(image, style, pick, generator), painting.make_labels()


def _choose_light(style: DomainStyle, pick: random.Random) -> Light:
    height, turn = math.radians(pick.uniform(*style.sun_height)), pick.uniform(0, 2 * math.pi)
    cloud = pick.uniform(*style.overcast)
    sun: Point = (math.cos(height) * math.sin(turn), math.sin(height), math.cos(height) * math.cos(turn))
    low = max(0.0, 1 - math.degrees(height) / 35)  # 1 at sunset, 0 at noon
    strength = 0.62 * (1 - cloud)
    ambient = 0.62 + 0.34 * cloud

    def blend(clear: Rgb, cloudy: Rgb) -> Rgb:
        red, green, blue = (a + cloud * (b - a) for a, b in zip(clear, cloudy, strict=True))
        return red, green, blue

    return Light(
        sun=sun,
        sun_color=(strength * (1 + 0.15 * low), strength * (1 - 0.1 * low), strength * (1 - 0.4 * low)),
        ambient=(ambient * (1 - 0.06 * low), ambient, ambient * (1 + 0.08 * low)),
        shadow=0.15 + 0.4 * (1 - cloud),
        zenith=blend((70 + 40 * low, 140 - 20 * low, 226 - 60 * low), (176, 182, 190)),
        skyline=blend((190 + 50 * low, 216 - 20 * low, 240 - 80 * low), (206, 208, 210)),
        fog=pick.uniform(*style.fog),
        grain=style.grain,
        lit=pick.uniform(*style.lit),
    )


def _photograph(
    scene: Floats, style: DomainStyle, pick: random.Random, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Apply lens and sensor to light, H W 3: blur, vignette, exposure, white balance, saturation, noise."""
    blur, warmth = pick.uniform(*style.blur), pick.gauss(0, style.warmth)
    if blur:
        soft = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
        scene = np.asarray(soft, np.float32)
    rows, columns = np.linspace(-1, 1, HEIGHT, dtype=np.float32), np.linspace(-1, 1, WIDTH, dtype=np.float32)
    corner = (rows[:, None] ** 2 + columns[None] ** 2) / 2  # H W
    gain = 2 ** pick.uniform(*style.exposure) * (1 - pick.uniform(*style.vignette) * corner)
    scene = scene * gain[..., None] * np.array((1 + warmth, 1, 1 - warmth), np.float32)
    grey = scene.mean(2, keepdims=True)
    scene = grey + (scene - grey) * np.float32(pick.uniform(*style.saturation))
    noise = pick.uniform(*style.noise)
    if noise:
        deviation = noise * np.sqrt(np.clip(scene, 16, 255) / 128)  # photon noise grows with the root of the light
        scene = scene + deviation * generator.standard_normal(scene.shape, np.float32)
    return np.clip(scene + 0.5, 0, 255).astype(np.uint8)
