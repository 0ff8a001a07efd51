"""The verb `pseudo-label`: checkpoint + images -> a labelled dataset. K classes, H W pixels of one image.

<out>/index.json                    a prepared dataset with one split, "train", for `cluda train --source <out>`
<out>/labels/train/<image>.png      train ids of the checkpoint, 255 where the confidence is too low
<out>/confidence/train/<image>.png  softmax probability of the most probable class, 0..255 = 0..1
<out>/manifest.json                 checkpoint, dataset, thresholds, coverage
"""

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli import __version__, console
from cluda_cli.data.counting import count_pixels
from cluda_cli.data.index import Index, Item, find, read_stamp
from cluda_cli.data.labels import IGNORE
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.errors import SettingsError, name_out_of_memory, out_of_memory
from cluda_cli.files import is_vacant, locked, make_unique, read_text, sha256, write_json
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import PIXELS_AT_ONCE, count_values
from cluda_cli.inference.prefetch import HostCopy, prefetch, write_png
from cluda_cli.inference.sliding import ResizedImage, fit_image, quantise, segment
from cluda_cli.inference.weights_file import TrainedNetwork, load_weights
from cluda_cli.settings import Data

Pixels = NDArray[np.uint8]
KIND = "pseudo-labels"
THRESHOLD = 0.968  # DACS weights pseudo-labels by the share of pixels above it
LARGEST_THRESHOLD = 0.9  # with per_class, as in the released self-training of BDL (Li et al., CVPR 2019)
LEVELS = torch.arange(256, dtype=torch.float64) / 255  # confidence of each value of a confidence map


def pseudo_label(
    checkpoint: Path,
    *,
    dataset: str | None = None,
    split: str = "train",
    out: Path | None = None,
    threshold: float = THRESHOLD,
    per_class: bool = False,
    data_root: Path | None = None,
    device: str = "auto",
    as_json: bool = False,
    overwrite: bool = False,
) -> Path:
    """Label the images of a split and return the folder, a prepared dataset.

    Pixels get 255 if their confidence is below `threshold` (0..1) or if they lie in the margins of the dataset. With
    `per_class`, the threshold of a class is instead the median confidence of the pixels predicted as that class, at
    most 0.9. The median comes from the 256 levels of the confidence maps, so it is exact to 0.002. Labels of the split
    are not read.

    Raises SettingsError if the folder is taken or the threshold out of range, DataError if a file cannot be used,
    EnvironmentProblem that names the image if memory runs out.
    """
    if not 0 <= threshold <= 1:
        raise SettingsError(f"{threshold} is not in 0..1", "--threshold", "0 keeps every pixel, 0.968 is usual")
    chosen = pick_device(device)
    trained = load_weights(checkpoint, chosen)
    checkpoint = trained.path
    data = trained.settings.data
    index = find(dataset or data.target, data_root or data.root)
    index.split(split)
    out = out or checkpoint.parent / KIND / f"{index.name}-{split}"
    if dataset is None and data.target_margins is not None:  # the margins of the run's target
        index = replace(index, margins=data.target_margins)
    with locked(out, "name another folder with --out"):
        _claim(out, overwrite)
        manifest = _make(trained, index, split, out, None if per_class else threshold, checkpoint)
    _report(out, manifest, as_json)
    if manifest["coverage"]:
        command = _suggest_command(checkpoint, out, dataset or data.target, data_root or data.root, data)
        console.info(f"next: {command}")
    return out


def _make(
    trained: TrainedNetwork, index: Index, split: str, out: Path, threshold: float | None, checkpoint: Path
) -> dict[str, Any]:
    """Write labels, confidences, manifest and index; return the manifest. Without a threshold, each class has one."""
    names = trained.classes.names
    items, histogram = _label(trained, index, split, out, threshold or 0.0)
    thresholds: list[float | None] = [threshold] * len(names)
    if threshold is None:
        thresholds = compute_thresholds(histogram)
        items = _apply_thresholds(out, items, thresholds)
    name, splits = f"{index.name}-{split}-{KIND}", {"train": tuple(items)}
    made = Index(name, out, index.root, trained.classes, splits, index.margins)
    origin = {
        "kind": KIND,
        "version": __version__,
        "checkpoint": str(checkpoint),
        "sha256": sha256(checkpoint),
        "network": trained.network_name,
        "step": trained.step,
        "dataset": index.name,
        "split": split,
        "fingerprint": index.fingerprint,
        "per_class": threshold is None,
        "thresholds": dict(zip(names, thresholds, strict=True)),
    }
    manifest = origin | _summarise(made, histogram)
    write_json(out / "manifest.json", manifest)
    made.save()  # last: only now the folder is a dataset
    return manifest


def compute_thresholds(histogram: Tensor, levels: Tensor = LEVELS) -> list[float | None]:
    """Per class, min(median confidence, 0.9); None without pixels (SPCL, arXiv 2111.12358).

    `histogram` (K L, integers) counts the pixels of each of the ascending `levels` (L) of confidence. The median of an
    even number of pixels is the mean of the two in the middle.
    """
    pixels, below = histogram.sum(1), 2 * histogram.cumsum(1)
    lower, upper = (reached.int().argmax(1) for reached in (below >= pixels[:, None], below > pixels[:, None]))  # K
    thresholds = ((levels[lower] + levels[upper]) / 2).clamp(max=LARGEST_THRESHOLD).tolist()
    return [value if count else None for value, count in zip(thresholds, pixels.tolist(), strict=True)]


@dataclass(frozen=True)
class _Prediction:
    """Pseudo-label and confidence of an image."""

    item: Item
    label: HostCopy  # uint8 H W, 255 below the threshold and in the margins
    level: HostCopy  # uint8 H W, confidence 0..255 = 0..1


def _label(trained: TrainedNetwork, index: Index, split: str, out: Path, threshold: float) -> tuple[list[Item], Tensor]:
    """Write label and confidence of every image of the split. Returns the items and a histogram.

    The histogram, int64 K 256, counts the pixels outside the margins by predicted class and level of confidence.
    """
    items, device = [], next(trained.network.parameters()).device
    total = torch.zeros(len(trained.classes), 256, dtype=torch.int64, device=device)
    with console.Progress(f"labelling {index.name} {split}", len(index.split(split))) as progress:
        predictions = _predict_all(trained, index, split, threshold, total)
        for item in prefetch(partial(_write, out), predictions, lambda prediction: math.prod(prediction.item.size)):
            items.append(item)
            progress.advance()
    return items, total.cpu()


def _predict_all(
    trained: TrainedNetwork, index: Index, split: str, threshold: float, total: Tensor
) -> Iterator[_Prediction]:
    """Yield the prediction of each image, while threads read the next ones. Adds to the histogram `total`."""
    items, settings = index.split(split), trained.settings
    names = make_unique(Path(item.image).stem for item in items)
    top, bottom, left, right = index.margins

    def read(named: tuple[Item, str]) -> tuple[ResizedImage, tuple[Item, str]]:
        path = index.image_path(named[0])
        with name_out_of_memory(named[0].size, path):
            return fit_image(read_image(path), settings.data.target_box, total.device), named

    def refuse(named: tuple[Item, str]) -> None:
        raise out_of_memory(named[0].size, index.image_path(named[0]))

    images = prefetch(read, zip(items, names, strict=True), lambda named: math.prod(named[0].size))
    results = segment(trained.network, images, settings.inference, confidence=True, skip=refuse)
    for (item, name), label, confidence in results:
        assert confidence is not None
        level = quantise(confidence)
        height, width = label.shape
        inner = (slice(top, max(height - bottom, 0)), slice(left, max(width - right, 0)))
        rows = max(PIXELS_AT_ONCE // width, 1)  # counting needs wider integers
        for classes, levels in zip(label[inner].split(rows), level[inner].split(rows), strict=True):
            total += count_values(classes.int() * 256 + levels, total.numel()).view_as(total)
        kept = torch.full_like(label, IGNORE)
        kept[inner] = torch.where(confidence[inner] >= threshold, label[inner], kept[inner])
        stamp = (*read_stamp(index.image_path(item)), 0, 0)  # that of the label follows when it is written
        labelled = Item(item.image, f"labels/train/{name}.png", (height, width), stamp=stamp)
        yield _Prediction(labelled, HostCopy(kept), HostCopy(level))


def _write(out: Path, prediction: _Prediction) -> Item:
    write_png(_confidence_path(out, prediction.item), prediction.level.numpy())
    return _write_label(out, prediction.item, prediction.label.numpy())


def _write_label(out: Path, item: Item, label: Pixels) -> Item:
    """Write the label. Returns the item with its pixel counts and the stamp of the label."""
    assert item.label is not None and item.stamp is not None
    write_png(out / item.label, label)
    return replace(item, pixels=count_pixels(label), stamp=(*item.stamp[:2], *read_stamp(out / item.label)))


def _confidence_path(out: Path, item: Item) -> Path:
    assert item.label is not None
    return out / "confidence" / Path(item.label).relative_to("labels")


def _apply_thresholds(out: Path, items: Sequence[Item], thresholds: Sequence[float | None]) -> list[Item]:
    """Read the written labels again and set pixels below the threshold of their class to 255."""
    lowest = np.zeros(256, dtype=np.uint8)  # level of confidence that a pixel needs, by train id
    for train_id, threshold in enumerate(thresholds):
        if threshold is not None:  # otherwise no pixel has this class
            lowest[train_id] = np.searchsorted(LEVELS.numpy(), threshold)
    with console.Progress("applying the thresholds", len(items)) as progress:
        result = []
        for item in prefetch(partial(_rewrite, out, lowest), items, lambda item: math.prod(item.size)):
            result.append(item)
            progress.advance()
    return result


def _rewrite(out: Path, lowest: Pixels, item: Item) -> Item:
    assert item.label is not None
    label, level = read_label(out / item.label).numpy(), read_label(_confidence_path(out, item)).numpy()
    label[level < lowest.take(label)] = IGNORE
    return _write_label(out, item, label)


def _claim(out: Path, overwrite: bool) -> None:
    """Mark the folder as one of pseudo-labels and remove an earlier index, so that it is no dataset until the end.

    What an interrupted call began is taken over. Raises SettingsError if the folder has other contents, or whole
    pseudo-labels that may not be replaced.
    """
    if not is_vacant(out):
        if not _is_ours(out):
            raise SettingsError("holds something other than pseudo-labels", out, "name another folder with --out")
        if (out / "index.json").exists() and not overwrite:
            remedy = "replace them with --overwrite, or name another folder with --out"
            raise SettingsError("holds pseudo-labels already", out, remedy)
    (out / "index.json").unlink(missing_ok=True)
    write_json(out / "manifest.json", {"kind": KIND})  # `_is_ours` reads it


def _is_ours(out: Path) -> bool:
    try:
        return bool(json.loads(read_text(out / "manifest.json"))["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _summarise(made: Index, histogram: Tensor) -> dict[str, Any]:
    """Coverage, the share of all pixels that got a label, mean confidence outside the margins, and counts by class."""
    items, pixels = made.splits["train"], made.class_pixels("train")
    labelled, inside = sum(pixels), histogram.sum().item()
    shares = [count / labelled if labelled else 0.0 for count in pixels]
    rows = zip(made.classes.names, pixels, shares, strict=True)
    return {
        "images": len(items),
        "margins": list(made.margins),
        "coverage": labelled / sum(item.size[0] * item.size[1] for item in items),
        "mean_confidence": float((histogram.sum(0) * LEVELS).sum() / inside) if inside else None,
        "classes": {name: {"pixels": count, "share": share} for name, count, share in rows},
    }


def _report(out: Path, manifest: dict[str, Any], as_json: bool) -> None:
    """Print the folder or the manifest to stdout, and coverage, absent classes and the next command to stderr."""
    if as_json:
        console.result_json({"folder": str(out)} | manifest)
    else:
        console.result(str(out))
    console.info(
        f"{manifest['images']} images, {100 * manifest['coverage']:.1f} % of the pixels labelled, "
        f"mean confidence {manifest['mean_confidence'] or 0:.3f}"
    )
    missing = [name for name, row in manifest["classes"].items() if not row["pixels"]]
    if missing:
        console.warn(f"no pixel is labelled: {', '.join(missing)}")
    if manifest["coverage"] == 0:
        console.warn("no pixel is confident enough: lower --threshold, or use --per-class")


def _suggest_command(checkpoint: Path, out: Path, target: str, root: Path, data: Data) -> str:
    """The command that trains on the pseudo-labels, with the settings of the run that wrote the weights if it is there.

    Images are then resized by data.source_box.
    """
    settings = checkpoint.parent / "settings.json"
    parts = ["cluda", "train"]
    parts += ["--preset", str(settings)] if settings.is_file() else []
    parts += ["--source", str(out), "--target", target]
    parts += ["--data-root", str(root)] if root != Path("data") or settings.is_file() else []
    parts += ["--set", "data.source_shares=false"] if settings.is_file() and data.source_shares else []
    return shlex.join(parts)
