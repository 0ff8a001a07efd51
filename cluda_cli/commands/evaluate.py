"""The verb `eval`: checkpoint + labelled split -> IoU tables. K classes, H W pixels."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli import console, settings
from cluda_cli.data.index import Index, Item, find
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.distributed import collectives
from cluda_cli.errors import DataError
from cluda_cli.files import write_json
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import Confusion, Scores, percent
from cluda_cli.inference.prefetch import pin_memory, prefetch, to_device
from cluda_cli.inference.sliding import Frame, evaluating, segment
from cluda_cli.inference.weights_file import load_weights
from cluda_cli.models.segmenter import Segmenter


def evaluate(
    checkpoint: Path,
    *,
    dataset: str | None = None,
    split: str = "val",
    data_root: Path | None = None,
    device: str = "auto",
    as_json: bool = False,
    confusion: Path | None = None,
) -> None:
    """Print IoU per class and protocol, and optionally write the confusion matrix.

    Dataset and data root default to those of the run that made the checkpoint. Classes are matched by name.
    Raises DataError if the dataset, its labels or the checkpoint are not usable.
    """
    chosen = pick_device(device)
    deployed = load_weights(checkpoint, chosen)
    data = deployed.settings.data
    index = find(dataset or data.target, data_root or data.root)
    announce_classes(index.classes, deployed.classes)
    scores = score(
        deployed.network,
        index,
        split,
        deployed.classes,
        deployed.seen,
        data.target_box,
        deployed.settings.inference,
        chosen,
    )
    if not scores.confusion.counts.any():
        raise DataError(f'no pixel of split "{split}" is labelled with a class that the network knows', index.folder)
    if confusion:
        counts = scores.confusion.counts.tolist()
        content = {"classes": deployed.classes.names, "rows": "label", "columns": "prediction", "counts": counts}
        write_json(confusion, content, indent=None)
    described = {
        "checkpoint": str(checkpoint),
        "dataset": index.name,
        "split": split,
        "images": scores.images,
        "network": deployed.network_name,
    }
    if as_json:
        accuracy = {
            "pixel_accuracy": percent(scores.pixel_accuracy),
            "mean_accuracy": percent(scores.mean_accuracy),
        }
        console.result_json(described | {"protocols": scores.protocols(), "unseen": list(scores.unseen)} | accuracy)
    else:
        _print(scores, f"{index.name} {split}, {scores.images} images, {deployed.network_name} network")


def score(
    network: Segmenter,
    index: Index,
    split: str,
    classes: ClassTable,
    seen: Sequence[str],
    box: tuple[int, int] | None,
    evaluation: settings.Evaluation,
    device: torch.device,
) -> Scores:
    """Scores of a network over its own `classes` on the labelled images of a split.

    `seen` names the classes that the source had; the network lies on `device`. Raises DataError if the split has no
    labels, or naming the file if a label does not fit its image or holds an id that the dataset does not have.

    Of several processes each takes its share of the images; all get the scores of all of them.
    """
    items = index.labelled(split)
    if not items:
        without = len(index.split(split))
        raise DataError(f'the {without} images of split "{split}" have no labels', index.folder, "take another --split")
    confusion = Confusion(len(classes), device=device)
    read = partial(_read_pair, index, np.array(index.classes.remap_to(classes), dtype=np.uint8), box, device)
    share = items[collectives.rank() :: collectives.world_size()]
    progress = console.Progress(f"evaluating {index.name} {split}", len(share))
    with collectives.fail_together(), progress, evaluating(network):
        for label, prediction, _ in segment(network, prefetch(read, share), evaluation):
            confusion.update(prediction, to_device(label, device))  # nothing waits for a GPU until all are counted
            progress.advance()
    confusion.counts = collectives.all_reduce_sum(confusion.counts)
    return Scores(classes, tuple(seen), index.classes.names, confusion, len(items))


def _read_pair(
    index: Index, table: NDArray[np.uint8], box: tuple[int, int] | None, device: torch.device, item: Item
) -> tuple[Frame, Tensor]:
    """Image, and label in the network's train ids, by `table` of 256; both where `device` copies them fast.

    In numpy, because torch would start threads of its own in each reading thread.
    """
    path = index.label_path(item)
    image, label = read_image(index.image_path(item)), read_label(path)
    if image.shape[1:] != label.shape:
        sizes = [" x ".join(map(str, size)) for size in (label.shape, image.shape[1:])]
        raise DataError(f"label is {sizes[0]} pixels, its image {sizes[1]}", path, "run `cluda prepare` again")
    ids = np.bincount(label.numpy().ravel(), minlength=256).nonzero()[0]
    unknown = [str(i) for i in ids if len(index.classes) <= i != IGNORE]
    if unknown:
        what = f"label holds {', '.join(unknown)}; train ids are 0..{len(index.classes) - 1} and {IGNORE}"
        raise DataError(what, path, "run `cluda prepare` again")
    return Frame.of(image, box, device), pin_memory(torch.from_numpy(table[label.numpy()]), device)


def announce_classes(labelled: ClassTable, predicted: ClassTable) -> None:
    """Say which classes only one side has. Raises DataError if there is no common one."""
    unknown = [name for name in labelled.names if name not in predicted.names]
    undefined = [name for name in predicted.names if name not in labelled.names]
    if len(unknown) == len(labelled):
        raise DataError("dataset and checkpoint have no class name in common", "", f"the dataset has: {unknown}")
    if unknown:
        console.warn(f"the network does not know, so their pixels are ignored: {', '.join(unknown)}")
    if undefined:
        console.warn(f"the dataset does not have, so they are not scored: {', '.join(undefined)}")


def _print(scores: Scores, title: str) -> None:
    """The table of all protocols; `-` is a class that a protocol leaves out, or that has no pixels."""
    protocols = scores.protocols()
    rows = [[name] + [_cell(p["classes"][name]) for p in protocols.values()] for name in scores.classes.names]
    rows.append(["mean IoU"] + [_cell(p["miou"]) for p in protocols.values()])
    if scores.unseen:
        empty = [""] * (len(protocols) - 1)
        rows.append(["with unseen", _cell(protocols["all"]["miou_with_unseen"]), *empty])
    console.result_table(title, ["class", *protocols], rows)
    accuracy = [_cell(percent(value)) for value in (scores.pixel_accuracy, scores.mean_accuracy)]
    console.result(f"pixel accuracy {accuracy[0]}, mean accuracy {accuracy[1]}")
    if scores.unseen:
        console.result(f"unseen: the source never had {', '.join(scores.unseen)}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
