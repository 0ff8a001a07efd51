"""Source samples per second of the stream, against a loader that repeats its whole pipeline for each rejected crop.

    python tests/bench/bench_stream.py [samples]

Both share decoding and resizing, so the ratio is what choosing the crop on the label saves: one decoded image per
sample however often the crop is redrawn, and only the crop of it resized. The images are synthetic, of the size of
GTA5, with rare classes in small patches; both sides draw with the same rules and run in this process on one thread.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from cluda_cli import settings
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, IGNORE, ClassTable
from cluda_cli.data.streams import Steps
from cluda_cli.data.transforms import fit_box, read_image, read_label, resize_image, resize_label_region
from cluda_cli.seeds import derive_seed


def write_dataset(folder: Path, images: int, size: tuple[int, int], seed: int = 0) -> Index:
    """Images that compress like photographs, with layers of common classes and two patches of rare ones each."""
    rng, (height, width) = np.random.default_rng(seed), size
    items = []
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


def plain_sample(steps: Steps, rng: Generator) -> tuple[Tensor, Tensor]:
    """Image and label of one crop, each try from the files on."""
    assert steps.rare is not None
    train_id, position = steps.rare.draw(rng)
    item = steps.source_items[position]
    for _ in range(11):
        image, label = plain_pipeline(steps, item, rng)
        if (label == train_id).sum() > steps.rare.crop_pixels:
            break
    return image, label


def plain_pipeline(steps: Steps, item: Item, rng: Generator) -> tuple[Tensor, Tensor]:
    """Decode, resize the frame, draw crops until one is diverse, flip."""
    image, label = read_image(steps.source.image_path(item)), read_label(steps.source.label_path(item))
    size, (height, width) = fit_box((label.shape[0], label.shape[1]), steps.data.source_box), steps.data.crop
    image, label = resize_image(image, size), resize_label_region(label, size, 0, 0, *size)
    for _ in range(11):
        top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
        window = label[top : top + height, left : left + width]
        counts = torch.bincount(window.flatten(), minlength=256)[:IGNORE]
        if counts.max() < steps.data.max_class_share * counts.sum():
            break
    crop = image[:, top : top + height, left : left + width]
    return (crop.flip(-1), window.flip(-1)) if rng.random() < 0.5 else (crop, window)


def rate(sample: Callable[[Generator], object], purpose: str, count: int) -> float:
    """Samples per second."""
    began = time.perf_counter()
    for i in range(count):
        sample(np.random.default_rng(derive_seed(0, purpose, i)))
    return count / (time.perf_counter() - began)


def measure(
    images: int, size: tuple[int, int], data: settings.Data, count: int, repeats: int
) -> list[tuple[float, float]]:
    """Samples per second of the stream and of the plain loader, several times in turns."""
    with tempfile.TemporaryDirectory() as folder:
        index = write_dataset(Path(folder), images, size)
        steps = Steps(index, index, data, seed=0)
        plain = lambda rng: plain_sample(steps, rng)  # noqa: E731
        # The draws differ from repeat to repeat, and both sides see the same classes and images on average.
        return [(rate(steps.source_sample, f"a{i}", count), rate(plain, f"b{i}", count)) for i in range(repeats)]


def main(count: int) -> None:
    torch.set_num_threads(1)
    for share in (1500 / 512**2, 6000 / 512**2):
        data = settings.Data(rare_class=settings.RareClass(min_crop_share=share))
        rates = measure(images=12, size=(1052, 1914), data=data, count=count, repeats=5)
        ours, plain = (statistics.median(side) for side in zip(*rates, strict=True))
        ratios = [a / b for a, b in rates]
        print(
            f"min_crop_share {share:.4f}: stream {ours:.1f} samples/s, plain {plain:.1f} samples/s, "
            f"ratio {statistics.median(ratios):.2f} (of {len(ratios)}: {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
