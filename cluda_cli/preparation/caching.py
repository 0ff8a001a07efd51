"""Write the cache of a prepared dataset: its training images as plain pixels at the size of training.

`data/cache.py` reads the cache and describes its files. h w stored size.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluda_cli import console
from cluda_cli.data.cache import FORMAT, SPLIT, Box, Cache, make_netpbm_header, name_box
from cluda_cli.data.index import Index, Item
from cluda_cli.data.transforms import read_image, read_label, resize_image, resize_label_region
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import atomic, write_json
from cluda_cli.preparation.conversion import reading, run_all


@dataclass(frozen=True)
class CacheTask:
    """One image to store. It is sent to a worker process."""

    image: Path
    label: Path | None
    size: tuple[int, int]
    """Height and width to store."""
    output: Path
    """Without suffix."""


def write_cache(index: Index, names: Mapping[str, str], inputs: str, box: Box, workers: int | None) -> Cache:
    """Store the training images of `index` that are not stored yet, and remove stored files that it does not need.

    `names` names the stored file of each image. The name must change with the image or its label; a stored file of
    that name is then right, because files appear whole or not at all. `inputs` identifies all files together, as in
    the manifest. Raises EnvironmentProblem if the disk has no room, DataError if a file cannot be read.
    """
    folder, items = index.folder / "cache" / name_box(box), index.split(SPLIT)
    cache = Cache(folder, box, {item.image: f"{SPLIT}/{names[item.image]}-{FORMAT}" for item in items})
    missing = [item for item in items if not _is_stored(cache, item)]
    _require_room(folder, sum(map(cache.num_bytes, missing)))
    tasks = [
        CacheTask(
            index.image_path(item),
            index.label_path(item) if item.label else None,
            cache.size(item),
            folder / cache.files[item.image],
        )
        for item in missing
    ]
    with console.Progress(f"caching {index.name}", len(items), len(items) - len(tasks)) as progress:
        for _ in run_all(store, tasks, workers):
            progress.advance()
    wanted = {f"{path}{suffix}" for path in cache.files.values() for suffix in (".ppm", ".pgm")}
    for path in folder.rglob("*.p[gp]m"):
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink(missing_ok=True)
    content = {"format": FORMAT, "box": list(box) if box else None, "inputs": inputs, "files": cache.files}
    write_json(folder / "cache.json", content, indent=None)
    return cache


def store(task: CacheTask) -> None:
    """Write one image, then its label."""
    with reading(task.image):
        pixels = resize_image(read_image(task.image), task.size).permute(1, 2, 0)  # h w 3
    _write_netpbm(task.output, ".ppm", pixels)
    if task.label:
        label = resize_label_region(read_label(task.label), task.size, 0, 0, *task.size)  # h w
        _write_netpbm(task.output, ".pgm", label[:, :, None])


def _write_netpbm(output: Path, suffix: str, pixels: Tensor) -> None:
    with atomic(output.with_name(output.name + suffix)) as temporary, temporary.open("wb") as file:
        file.write(make_netpbm_header((pixels.shape[0], pixels.shape[1]), pixels.shape[2]))
        file.write(pixels.contiguous().numpy().data)


def _is_stored(cache: Cache, item: Item) -> bool:
    """Whether all files of an image exist and are whole."""
    try:
        cache.image(item)
        if item.label:
            cache.label(item)
    except DataError:
        return False
    return True


def _require_room(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise EnvironmentProblem(
            f"the cache takes {num_bytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free", folder,
            "give a smaller size to --cache, or make room",
        )  # fmt: skip
