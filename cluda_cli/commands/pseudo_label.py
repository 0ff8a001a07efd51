"""The verb `pseudo-label`: checkpoint + images -> a labelled dataset. K classes, H W pixels of one image.

<out>/index.json                    a prepared dataset with one split, "train": `cluda train --source <out>`
<out>/labels/train/<image>.png      train ids of the checkpoint, 255 where the confidence is too low
<out>/confidence/train/<image>.png  softmax probability of the most probable class, 0..255 = 0..1
<out>/manifest.json                 what made it, thresholds, coverage
"""

import json
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
from cluda_cli.commands.predict import unique_names
from cluda_cli.data.index import Index, Item, find
from cluda_cli.data.labels import IGNORE
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.errors import SettingsError
from cluda_cli.files import sha256, write_json
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import histogram
from cluda_cli.inference.prefetch import Fetched, prefetch, write_png
from cluda_cli.inference.sliding import Frame, segment
from cluda_cli.inference.weights_file import Deployed, load_weights

Pixels = NDArray[np.uint8]
KIND = "pseudo-labels"
THRESHOLD = 0.968  # that of the teacher's confidence weight in DACS
LARGEST_THRESHOLD = 0.9  # of a class with per_class, as in the released self-training of BDL (Li et al., CVPR 2019)
LEVELS = torch.arange(256, dtype=torch.float64) / 255  # the confidences that a confidence map can hold


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

    Pixels below `threshold` (0..1) and those in the margins of the dataset get 255. With `per_class` the threshold of
    a class is instead the median confidence of the pixels predicted as it, at most 0.9; the median is that of the
    confidence maps, which hold 256 levels, so it is exact to 0.002. Labels that the split has are not looked at.

    Raises SettingsError if the folder is taken or the threshold out of range, DataError for unusable files.
    """
    if not 0 <= threshold <= 1:
        raise SettingsError(f"{threshold} is not in 0..1", "--threshold", "0 keeps every pixel, 0.968 is usual")
    chosen = pick_device(device)
    deployed = load_weights(checkpoint, chosen)
    data, names = deployed.settings.data, deployed.classes.names
    index = find(dataset or data.target, data_root or data.root)
    index.split(split)
    out = out or checkpoint.parent / KIND / f"{index.name}-{split}"
    _take(out, overwrite)
    if dataset is None and data.target_margins is not None:  # they are those of the run's target
        index = replace(index, margins=data.target_margins)

    items, histogram = _label(deployed, index, split, out, 0.0 if per_class else threshold)
    thresholds: list[float | None] = [threshold] * len(names)
    if per_class:
        thresholds = median_thresholds(histogram)
        items = _apply(out, items, thresholds)
    made = Index(
        f"{index.name}-{split}-{KIND}", out, index.root, deployed.classes, {"train": tuple(items)}, index.margins
    )
    origin = {
        "kind": KIND,
        "version": __version__,
        "checkpoint": str(checkpoint),
        "sha256": sha256(checkpoint),
        "network": deployed.network_name,
        "step": deployed.step,
        "dataset": index.name,
        "split": split,
        "fingerprint": index.fingerprint,
        "per_class": per_class,
        "thresholds": dict(zip(names, thresholds, strict=True)),
    }
    manifest = origin | _statistics(made, histogram)
    write_json(out / "manifest.json", manifest)
    made.save()  # last: only now the folder is a dataset
    _report(out, manifest, as_json)
    return out


def median_thresholds(histogram: Tensor) -> list[float | None]:
    """min(median confidence, 0.9) per class from counts of confidence levels; None without pixels.  # K 256"""
    pixels = histogram.sum(1)
    median = (2 * histogram.cumsum(1) >= pixels[:, None]).int().argmax(1)  # K, first level with half of the pixels
    thresholds = LEVELS[median].clamp(max=LARGEST_THRESHOLD).tolist()
    return [value if count else None for value, count in zip(thresholds, pixels.tolist(), strict=True)]


@dataclass(frozen=True)
class _Prediction:
    """One labelled image, on its way to main memory."""

    item: Item
    label: Fetched  # uint8 H W, 255 below the threshold and in the margins
    level: Fetched  # uint8 H W, confidence


def _label(deployed: Deployed, index: Index, split: str, out: Path, threshold: float) -> tuple[list[Item], Tensor]:
    """Write label and confidence of every image of the split; items, and the histogram over all.  # K 256

    The histogram counts the pixels of each predicted class and level of confidence outside the margins.
    """
    items, device = [], next(deployed.network.parameters()).device
    total = torch.zeros(len(deployed.classes), 256, dtype=torch.int64, device=device)
    with console.Progress(f"labelling {index.name} {split}", len(index.split(split))) as progress:
        for item in prefetch(partial(_write, out), _predictions(deployed, index, split, threshold, total)):
            items.append(item)
            progress.advance()
    return items, total.cpu()


def _predictions(
    deployed: Deployed, index: Index, split: str, threshold: float, total: Tensor
) -> Iterator[_Prediction]:
    """Images are decoded ahead of the network. Adds to the histogram `total`."""
    items, settings = index.split(split), deployed.settings
    names = unique_names(Path(item.image).stem for item in items)
    top, bottom, left, right = index.margins

    def read(named: tuple[Item, str]) -> tuple[Frame, tuple[Item, str]]:
        return Frame.of(read_image(index.image_path(named[0])), settings.data.target_box, total.device), named

    frames = prefetch(read, zip(items, names, strict=True))
    for (item, name), label, confidence in segment(deployed.network, frames, settings.inference, confidence=True):
        assert confidence is not None
        level = (confidence * 255).round().to(torch.uint8)
        height, width = label.shape
        inner = (slice(top, max(height - bottom, 0)), slice(left, max(width - right, 0)))
        total += histogram(label[inner].int() * 256 + level[inner], total.numel()).view_as(total)
        kept = torch.full_like(label, IGNORE)
        kept[inner] = torch.where(confidence >= threshold, label, kept)[inner]
        labelled = Item(item.image, f"labels/train/{name}.png", (height, width))
        yield _Prediction(labelled, Fetched(kept), Fetched(level))


def _write(out: Path, prediction: _Prediction) -> Item:
    write_png(_confidence_path(out, prediction.item), prediction.level.numpy())
    return _write_label(out, prediction.item, prediction.label.numpy())


def _write_label(out: Path, item: Item, label: Pixels) -> Item:
    """Write the label; the item with its pixel counts."""
    assert item.label is not None
    write_png(out / item.label, label)
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORE].tolist()
    return replace(item, pixels={train_id: count for train_id, count in enumerate(counts) if count})


def _confidence_path(out: Path, item: Item) -> Path:
    assert item.label is not None
    return out / "confidence" / Path(item.label).relative_to("labels")


def _apply(out: Path, items: Sequence[Item], thresholds: Sequence[float | None]) -> list[Item]:
    """Second pass with per-class thresholds, over the files of the first."""
    keep = np.zeros((256, 256), dtype=np.bool_)  # train id, level
    for train_id, threshold in enumerate(thresholds):
        if threshold is not None:
            keep[train_id] = threshold <= LEVELS.numpy()
    with console.Progress("applying the thresholds", len(items)) as progress:
        result = []
        for item in prefetch(partial(_rewrite, out, keep), items):
            result.append(item)
            progress.advance()
    return result


def _rewrite(out: Path, keep: NDArray[np.bool_], item: Item) -> Item:
    assert item.label is not None
    label, level = read_label(out / item.label).numpy(), read_label(_confidence_path(out, item)).numpy()
    label[~keep[label, level]] = IGNORE
    return _write_label(out, item, label)


def _take(out: Path, overwrite: bool) -> None:
    """Refuse a folder with contents, unless it holds pseudo-labels that may be replaced; these stop being a dataset."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise SettingsError(
                "exists and is not empty", out, "replace it with --overwrite, or name another with --out"
            )
        if not _is_ours(out):
            raise SettingsError("holds something else than pseudo-labels", out, "name another folder with --out")
    (out / "index.json").unlink(missing_ok=True)
    write_json(out / "manifest.json", {"kind": KIND})  # marks the folder as ours, even if we do not get to the end


def _is_ours(out: Path) -> bool:
    try:
        return bool(json.loads((out / "manifest.json").read_text(encoding="utf-8"))["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _statistics(made: Index, histogram: Tensor) -> dict[str, Any]:
    """Coverage is the share of all pixels that got a label; the mean confidence is over all outside the margins."""
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
    """The folder (or the manifest) to stdout; coverage, what is missing and the next command to stderr."""
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
        return
    console.info(
        f"next: cluda train --source {shlex.quote(str(out))} ...   (images are then resized by data.source_box)"
    )
