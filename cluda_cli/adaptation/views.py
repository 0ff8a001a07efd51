"""What the student sees in one step. B batch, H W pixels of the crop."""

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.mixing import choose_classes, class_mix
from cluda_cli.adaptation.photometric import strong_augment
from cluda_cli.adaptation.teacher import Teacher
from cluda_cli.data.labels import IGNORE
from cluda_cli.data.streams import Batch
from cluda_cli.data.transforms import normalise
from cluda_cli.seeds import derive_seed


@dataclass(frozen=True)
class View:
    """One batch of images with what is to be learned from them."""

    name: str  # "source" | "mixed"
    image: Tensor  # B 3 H W, float32, normalised
    label: Tensor  # B H W, int64 train ids, 255 = ignore
    weight: Tensor  # B H W, float32, 1 on ground truth, teacher confidence elsewhere
    pseudo_label: Tensor | None = None  # B H W, int64, of the target images of a mixed view, 255 = no pseudo-label


def make_views(
    batch: Batch, teacher: Teacher, wanted: Set[str], mixing: settings.Mixing, seed: int, step: int
) -> Iterator[View]:
    """Yield the wanted views of a batch: "source", then "mixed".

    Each is made when it is asked for, so that the graph of the one before is gone by then. The same seed and step give
    the same views.
    """
    source_image = normalise(batch.source_image) * batch.source_inside[:, None]  # B 3 H W, 0 on padding
    source_label = batch.source_label.long()
    if "source" in wanted:
        weight = torch.ones_like(source_label, dtype=torch.float32)
        yield View("source", source_image, source_label, weight)
    if "mixed" in wanted:
        generator = torch.Generator().manual_seed(derive_seed(seed, "mixing", step))
        yield _mixed(batch, source_image, source_label, teacher, mixing, generator)


def _mixed(
    batch: Batch,
    source_image: Tensor,
    source_label: Tensor,
    teacher: Teacher,
    mixing: settings.Mixing,
    generator: torch.Generator,
) -> View:
    """Target images with pseudo-labels under pasted source classes, strongly augmented (DACS, algorithm 1)."""
    target_image = normalise(batch.target_image) * batch.target_inside[:, None]  # B 3 H W, 0 on padding
    pseudo_label, confidence = teacher.pseudo_labels(target_image, batch.target_valid)
    chosen = choose_classes(source_label, generator)
    image, label, weight = class_mix(source_image, source_label, target_image, pseudo_label, confidence, chosen)
    image = strong_augment(image, mixing, generator)
    return View("mixed", image, label, weight, pseudo_label.masked_fill(~batch.target_valid, IGNORE))
