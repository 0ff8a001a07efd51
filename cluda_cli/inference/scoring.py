"""Scores of a network on the labelled images of a split, for validation and `eval`. H W pixels."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli import console, settings
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.distributed import collectives
from cluda_cli.errors import DataError
from cluda_cli.inference.metrics import Confusion, Scores
from cluda_cli.inference.prefetch import pin_memory, prefetch, to_device
from cluda_cli.inference.sliding import ResizedImage, eval_mode, fit_image, segment
from cluda_cli.models.segmenter import Segmenter


def score(
    network: Segmenter,
    index: Index,
    *,
    split: str,
    classes: ClassTable,
    seen: Sequence[str],
    box: tuple[int, int] | None,
    evaluation: settings.Evaluation,
    device: torch.device,
) -> Scores:
    """Score a network on the labelled images of a split.

    `classes` are the network's, and labels are matched to them by name. `seen` names those that occur in the source
    labels. Images are resized to fit `box`. The network is on `device`. With several processes, each takes its share of
    the images, and all get the scores of all images.

    Raises DataError if the split has no labels. Raises DataError that names the file if a label does not fit its image
    or holds an id that the dataset does not have.
    """
    items = index.labelled(split)
    if not items:
        without = len(index.split(split))
        raise DataError(f'the {without} images of split "{split}" have no labels', index.folder, "take another --split")
    confusion = Confusion(len(classes), device=device)
    read = partial(_read_pair, index, np.array(index.classes.remap_to(classes), dtype=np.uint8), box, device)
    share = items[collectives.rank() :: collectives.world_size()]
    progress = console.Progress(f"evaluating {index.name} {split}", len(share))
    with collectives.fail_together(), progress, eval_mode(network):
        for label, prediction, _ in segment(network, prefetch(read, share), evaluation):
            confusion.update(prediction, to_device(label, device))  # does not wait for a GPU
            progress.advance()
    confusion.counts = collectives.all_reduce_sum(confusion.counts)
    return Scores(classes, tuple(seen), index.classes.names, confusion, len(items))


def _read_pair(
    index: Index, table: NDArray[np.uint8], box: tuple[int, int] | None, device: torch.device, item: Item
) -> tuple[ResizedImage, Tensor]:
    """Read an image and its label. `table` maps train ids of the dataset to those of the network.  # uint8 H W

    This uses numpy, because torch would start further threads in each reading thread.
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
    return fit_image(image, box, device), pin_memory(torch.from_numpy(table[label.numpy()]), device)


def compare_classes(dataset: ClassTable, network: ClassTable) -> None:
    """Warn of classes that only the dataset or only the network has. Raises DataError if they share none."""
    ignored = [name for name in dataset.names if name not in network.names]
    unscored = [name for name in network.names if name not in dataset.names]
    if len(ignored) == len(dataset):
        raise DataError("dataset and checkpoint have no class name in common", "", f"the dataset has: {ignored}")
    if ignored:
        console.warn(f"the network does not have these classes, so their pixels are ignored: {', '.join(ignored)}")
    if unscored:
        console.warn(f"the dataset does not have these classes, so they are not scored: {', '.join(unscored)}")
    if len(dataset) - len(ignored) == 1:
        common = next(name for name in dataset.names if name in network.names)
        console.warn(f"only {common} is scored: a network that predicts it everywhere would have an IoU of 100")
