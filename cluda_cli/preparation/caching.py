"""Write the cache of a prepared dataset: its training images as plain pixels at the size of training.

`data/cache.py` says what lies in it, and reads it. h w stored size.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluda_cli import console
from cluda_cli.data.cache import FORMAT, SPLIT, Box, Cache, box_name, netpbm_header
from cluda_cli.data.index import Index, Item
from cluda_cli.data.transforms import read_image, read_label, resize_image, resize_label_region
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import atomic, write_json
from cluda_cli.preparation.conversion import run_all


@dataclass(frozen=True)
class Job:
    """One image to store; sent to a worker process."""

    image: Path
    label: Path | None
    size: tuple[int, int]
    """Height and width to store."""
    output: Path
    """Without suffix."""


def write_cache(index: Index, names: Mapping[str, str], inputs: str, box: Box, workers: int | None) -> Cache:
    """Store the training images of `index` that are not stored yet, and remove what is no longer wanted.

    `names` gives, for each image, a name that is another one whenever the image or its label changes: a file that is
    there is right, because it appears whole or not at all. `inputs` identifies all files together, as in the manifest.
    Raises EnvironmentProblem if the disk has no room, DataError that names an unreadable file.
    """
    folder, items = index.folder / "cache" / box_name(box), index.split(SPLIT)
    cache = Cache(folder, box, {item.image: f"{SPLIT}/{names[item.image]}-{FORMAT}" for item in items})
    missing = [item for item in items if not _is_stored(cache, item)]
    _require_room(folder, sum(map(cache.num_bytes, missing)))
    jobs = [
        Job(
            index.image_path(item),
            index.label_path(item) if item.label else None,
            cache.size(item),
            folder / cache.files[item.image],
        )
        for item in missing
    ]
    with console.Progress(f"caching {index.name}", len(items), len(items) - len(jobs)) as progress:
        for _ in run_all(store, jobs, workers):
            progress.advance()
    wanted = {f"{path}{suffix}" for path in cache.files.values() for suffix in (".ppm", ".pgm")}
    for path in folder.rglob("*.p[gp]m"):
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink(missing_ok=True)
    content = {"format": FORMAT, "box": list(box) if box else None, "inputs": inputs, "files": cache.files}
    write_json(folder / "cache.json", content, indent=None)
    return cache


def store(job: Job) -> None:
    """Write one image, and its label after it."""
    pixels = resize_image(read_image(job.image), job.size).permute(1, 2, 0)  # h w 3
    _write(job.output, ".ppm", pixels)
    if job.label:
        label = resize_label_region(read_label(job.label), job.size, 0, 0, *job.size)  # h w
        _write(job.output, ".pgm", label[:, :, None])


def _write(output: Path, suffix: str, pixels: Tensor) -> None:
    with atomic(output.with_name(output.name + suffix)) as temporary, temporary.open("wb") as file:
        file.write(netpbm_header((pixels.shape[0], pixels.shape[1]), pixels.shape[2]))
        file.write(pixels.contiguous().numpy().data)


def _is_stored(cache: Cache, item: Item) -> bool:
    """Whether all files of an image are there, in full length."""
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
