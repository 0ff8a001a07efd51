"""Samples per second of one core: the stream, with and without a cache, against a loader written plainly.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_stream.py [--samples 12] [--repeats 5] [--images 12]

The plain loader does for every try what the method's description says: decode image and label, resize the frame, draw
crops until one is diverse, flip; and again if the crop holds too little of the drawn class. It decodes with the same
decoder as the stream and resizes with torch's kernel for bytes, which is faster than the stream's own.

The images are synthetic, as large as those of GTA5 (source, 1914 x 1052) and Cityscapes (target, 2048 x 1024), about as
large in bytes, with rare classes in small patches. All sides see the same classes and images in turns, in this process.
Time is that of the processor, so that other programs disturb little; files lie in the memory of the system, as those of
a small dataset do during training. With a larger one, reading from the disk comes on top for every side.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.draws import LabelledImages, TargetImages
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, IGNORE, ClassTable
from cluda_cli.data.transforms import fit_box, read_image, read_label, resize_label_region
from cluda_cli.files import write_json
from cluda_cli.preparation.caching import write_cache
from cluda_cli.seeds import derive_seed

SIZES = {
    "DAFormer": {"crop": (512, 512), "source_box": (720, 1280), "target_box": (512, 1024)},
    "HRDA": {"crop": (1024, 1024), "source_box": (1440, 2560), "target_box": (1024, 2048)},
}
SHARES = {"rare class 0.6 %": 1500 / 512**2, "rare class 2.3 %": 6000 / 512**2}  # DAFormer's and HRDA's, and stricter


def write_dataset(folder: Path, images: int, size: tuple[int, int], seed: int = 0) -> Index:
    """Images that compress like photographs, with layers of common classes and two patches of rare ones each."""
    rng, (height, width) = np.random.default_rng(seed), size
    items = []
    folder.mkdir(exist_ok=True)
    for i in range(images):
        label = np.empty(size, dtype=np.uint8)
        label[: height // 3], label[height // 3 : height * 2 // 3], label[height * 2 // 3 :] = 10, 2, 0
        for train_id in rng.choice([6, 7, 11, 12, 15, 16, 17, 18], 2, replace=False):
            top, left = rng.integers(height * 7 // 8), rng.integers(width * 7 // 8)
            label[top : top + height // 8, left : left + width // 12] = train_id
        coarse = Image.fromarray(rng.integers(0, 256, (14, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        image = (smooth + rng.integers(-2, 3, (height, width, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(label).save(folder / f"{i}_label.png")
        ids, counts = np.unique(label, return_counts=True)
        pixels = {int(k): int(n) for k, n in zip(ids, counts, strict=True)}
        items.append(Item(f"{i}.png", f"{i}_label.png", size, pixels))
    return Index("bench", folder, folder, ClassTable(CITYSCAPES), {"train": tuple(items)})


def plain_source(images: LabelledImages, rng: Generator) -> tuple[Tensor, Tensor, int]:
    """Image and label of one crop, each try from the files on, and the number of tries."""
    assert images.rare is not None
    train_id, position = images.rare.draw(rng)
    item = images.items[position]
    for tries in range(1, 12):  # noqa: B007  the last one is returned
        image, label = plain_pipeline(images, item, rng)
        if (label == train_id).sum() > images.rare.crop_pixels:
            break
    return image, label, tries


def plain_pipeline(images: LabelledImages, item: Item, rng: Generator) -> tuple[Tensor, Tensor]:
    """Decode, resize the frame, draw crops until one is diverse, flip."""
    index, data = images.frames.index, images.data
    image, label = read_image(index.image_path(item)), read_label(index.label_path(item))
    size, (height, width) = fit_box(item.size, data.source_box), data.crop
    image, label = resize_frame(image, size), resize_label_region(label, size, 0, 0, *size)
    for _ in range(11):
        top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
        window = label[top : top + height, left : left + width]
        counts = torch.bincount(window.flatten(), minlength=256)[:IGNORE]
        if counts.max() < data.max_class_share * counts.sum():
            break
    crop = image[:, top : top + height, left : left + width]
    return (crop.flip(-1), window.flip(-1)) if rng.random() < 0.5 else (crop.contiguous(), window.contiguous())


def plain_target(images: TargetImages, rng: Generator) -> Tensor:
    """Image of one crop: decode, resize the frame, crop, flip."""
    item, (height, width) = images.items[rng.integers(len(images.items))], images.data.crop
    size = fit_box(item.size, images.data.target_box)
    image = resize_frame(read_image(images.frames.index.image_path(item)), size)
    top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
    crop = image[:, top : top + height, left : left + width]
    return crop.flip(-1) if rng.random() < 0.5 else crop.contiguous()


def resize_frame(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 3 H W -> uint8 3 h w."""
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def rate(sample: Callable[[Generator], object], repeat: int, count: int) -> float:
    """Samples per second of the processor."""
    began = time.process_time()
    for i in range(count):
        sample(np.random.default_rng(derive_seed(0, f"bench {repeat}", i)))
    return count / (time.process_time() - began)


def with_cache(index: Index, folder: Path, box: tuple[int, int] | None) -> Index:
    """The same dataset, prepared in another folder that has a cache."""
    cached = dataclasses.replace(index, folder=folder)
    names = {item.image: item.image for item in index.split("train")}
    folder.mkdir(parents=True, exist_ok=True)
    for item in index.split("train"):
        label = index.label_path(item)
        (folder / label.name).write_bytes(label.read_bytes())
    write_json(folder / "manifest.json", {"inputs": "bench"})
    write_cache(cached, names, "bench", box, workers=1)
    return cached


def measure(
    source: Index, target: Index, folder: Path, data: settings.Data, count: int, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Rates of each side, by repeat, and the mean number of tries of the plain loader."""
    labelled, unlabelled = LabelledImages(source, source.classes, data, data.source_box), TargetImages(target, data)
    cached_source = with_cache(source, folder / "cached-source", data.source_box)
    cached_target = with_cache(target, folder / "cached-target", data.target_box)
    cached = LabelledImages(cached_source, source.classes, data, data.source_box), TargetImages(cached_target, data)
    for ours, theirs in zip((labelled, unlabelled), cached, strict=True):
        images = (draw(np.random.default_rng(0)).image for draw in (ours, theirs))
        assert torch.equal(*images), "the cache changes what is learned from"
    tries: list[int] = []
    sides: dict[str, Callable[[Generator], object]] = {
        "source plain": lambda rng: tries.append(plain_source(labelled, rng)[2]),
        "source stream": labelled,
        "source cache": cached[0],
        "target plain": lambda rng: plain_target(unlabelled, rng),
        "target stream": unlabelled,
        "target cache": cached[1],
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, sample in sides.items():
            rates[name].append(rate(sample, repeat, count))
    return rates, statistics.mean(tries)


def report(title: str, rates: dict[str, list[float]]) -> None:
    """One line for each domain."""
    for domain in ("source", "target"):
        plain, line = rates[f"{domain} plain"], f"{title:<28} {domain}  plain {median(rates[f'{domain} plain'])}/s"
        for side in ("stream", "cache"):
            ours = rates[f"{domain} {side}"]
            ratios = [a / b for a, b in zip(ours, plain, strict=True)]
            line += f"  {side} {median(ours)}/s = {statistics.median(ratios):5.2f}x"
            line += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)


def median(rates: list[float]) -> str:
    return f"{statistics.median(rates):6.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("samples", 12), ("repeats", 5), ("images", 12)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        source = write_dataset(folder / "source", arguments.images, (1052, 1914))
        target = write_dataset(folder / "target", arguments.images, (1024, 2048), seed=1)
        for name, sizes in SIZES.items():
            for share_name, share in SHARES.items():
                data = settings.Data(rare_class=settings.RareClass(min_crop_share=share), **sizes)
                rates, tries = measure(source, target, folder / name, data, arguments.samples, arguments.repeats)
                report(f"{name}, {share_name}", rates)
                print(f"{'':<28} {tries:.1f} tries for a source sample of the plain loader", flush=True)


if __name__ == "__main__":
    main()
