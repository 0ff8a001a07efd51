"""Scores of a network on the labelled images of a split, for validation and `eval`. H W pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluda_cli import console, settings
from cluda_cli.data.counting import count_ids
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.distributed import collectives
from cluda_cli.errors import DataError, name_out_of_memory, out_of_memory
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

    `classes` are the network's; the dataset's are matched to them by name. `seen` names those that occur in the source
    labels. Images are resized to fit `box`. The network is on `device`. With several processes, all take the buffers of
    the first, whose network is the one that is saved; each takes its share of the images, and all get the scores of all
    images.

    Raises DataError if the split has no labels. Raises DataError that names the file if a label does not fit its image
    or holds an id that the dataset does not have, EnvironmentProblem that names it if memory runs out.
    """
    items = index.labelled(split)
    if not items:
        without = len(index.split(split))
        raise DataError(f'the {without} images of split "{split}" have no labels', index.folder, "take another --split")
    collectives.broadcast_buffers(network)
    confusion = Confusion(len(index.classes), len(classes), device=device)

    def read(item: Item) -> tuple[ResizedImage, tuple[Item, Tensor]]:
        with name_out_of_memory(item.size, index.image_path(item)):
            return _read_pair(index, box, device, item)

    def refuse(key: tuple[Item, Tensor]) -> None:
        raise out_of_memory(key[0].size, index.image_path(key[0]))

    share = items[collectives.rank() :: collectives.world_size()]
    progress = console.Progress(f"evaluating {index.name} {split}", len(share))
    with collectives.fail_together(), progress, eval_mode(network):
        images = prefetch(read, share, lambda item: item.size[0] * item.size[1])
        for (_, label), prediction, _ in segment(network, images, evaluation, skip=refuse):
            confusion.update(prediction, to_device(label, device))  # does not wait for a GPU
            progress.advance()
    joint = _name_rows(collectives.all_reduce_sum(confusion.counts), index.classes, classes)
    return Scores(classes, tuple(seen), index.classes.names, joint, len(items))


def _name_rows(counts: Tensor, dataset: ClassTable, network: ClassTable) -> Confusion:
    """Counts with the dataset's classes as rows and the network's as columns, with the classes of both on both axes."""
    names = network.union(dataset).names
    joint = Confusion(len(names), device=counts.device)
    joint.counts[[names.index(name) for name in dataset.names], : len(network)] = counts
    return joint


def _read_pair(
    index: Index, box: tuple[int, int] | None, device: torch.device, item: Item
) -> tuple[ResizedImage, tuple[Item, Tensor]]:
    """Read the image of an item and its label, train ids of the dataset.  # uint8 H W

    This uses numpy, because torch would start further threads in each reading thread.
    """
    path = index.label_path(item)
    image, label = read_image(index.image_path(item)), read_label(path)
    if image.shape[1:] != label.shape:
        sizes = [" x ".join(map(str, size)) for size in (label.shape, image.shape[1:])]
        raise DataError(f"label is {sizes[0]} pixels, its image {sizes[1]}", path, "run `cluda prepare` again")
    ids = count_ids(label.numpy()).nonzero()[0]
    unknown = [str(i) for i in ids if len(index.classes) <= i != IGNORE]
    if unknown:
        what = f"label holds {', '.join(unknown)}; train ids are 0..{len(index.classes) - 1} and {IGNORE}"
        raise DataError(what, path, "run `cluda prepare` again")
    return fit_image(image, box, device), (item, pin_memory(label, device))


def compare_classes(dataset: ClassTable, network: ClassTable) -> None:
    """Warn of classes that only the dataset or only the network has. Raises DataError if they share none."""
    unknown = [name for name in dataset.names if name not in network.names]
    unscored = [name for name in network.names if name not in dataset.names]
    if len(unknown) == len(dataset):
        raise DataError("dataset and checkpoint have no class name in common", "", f"the dataset has: {unknown}")
    if unknown:
        console.warn(f"only the dataset has these classes, so the network can only err on them: {', '.join(unknown)}")
    if unscored:
        console.warn(f"only the network has these classes, so they are not scored: {', '.join(unscored)}")
    if len(dataset) - len(unknown) == 1:
        common = next(name for name in dataset.names if name in network.names)
        console.warn(f"only {common} is scored: a network that predicts it everywhere would have an IoU of 100")
