"""What the student sees in one step. B batch, H W pixels of the crop."""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.masking import block_mask
from cluda_cli.adaptation.mixing import choose_classes, class_mix
from cluda_cli.adaptation.photometric import strong_augment
from cluda_cli.adaptation.teacher import Teacher
from cluda_cli.data.labels import IGNORE
from cluda_cli.data.streams import Batch
from cluda_cli.data.transforms import normalise
from cluda_cli.distributed import collectives
from cluda_cli.models.boxes import Boxes
from cluda_cli.seeds import derive_seed


@dataclass(frozen=True)
class View:
    """One batch of images with what is to be learned from them."""

    name: str  # "source" | "mixed" | "masked"
    image: Tensor  # B 3 H W, float32, normalised
    label: Tensor  # B H W, int64 train ids, 255 = ignore
    weight: Tensor  # B H W, float32, 1 on ground truth, teacher confidence elsewhere
    boxes: Boxes | None = None  # where a student of two resolutions looks closely; None: where it is least certain
    pseudo_label: Tensor | None = None  # B H W, int64, of the target images of a mixed view, 255 = no pseudo-label

    def part(self, images: slice) -> Self:
        """The view of some of its images."""
        boxes = self.boxes and self.boxes.part(images)
        return replace(
            self, image=self.image[images], label=self.label[images], weight=self.weight[images], boxes=boxes,
            pseudo_label=None if self.pseudo_label is None else self.pseudo_label[images],
        )  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """Images of one domain with labels, before any of them is altered."""

    image: Tensor  # B 3 H W, normalised, 0 on padding
    label: Tensor  # B H W, ground truth or pseudo-label
    weight: Tensor  # B H W


def make_views(
    batch: Batch,
    teacher: Teacher,
    wanted: Set[str],
    mixing: settings.Mixing,
    masking: settings.Masking,
    seed: int,
    step: int,
) -> Iterator[View]:
    """Yield the wanted views of a batch: "source", "mixed", "masked".

    Each is made when it is asked for, so that the graph of the one before is gone by then. The same seed and step give
    the same views, whichever of them are wanted.
    """
    source_image = normalise(batch.source_image) * batch.source_inside[:, None]
    source_label = batch.source_label.long()
    source = Domain(source_image, source_label, torch.ones_like(source_label, dtype=torch.float32))
    if "source" in wanted:
        yield _view("source", source, teacher, seed, step)
    if wanted <= {"source"}:
        return
    target_image = normalise(batch.target_image) * batch.target_inside[:, None]
    target = Domain(target_image, *teacher.pseudo_labels(target_image, batch.target_valid))
    if "mixed" in wanted:
        generator = torch.Generator().manual_seed(derive_seed(seed, "mixing", step))
        view = _view("mixed", _mix(source, target, mixing, generator), teacher, seed, step)
        if mixing.uncertain_detail_from is not None and step >= mixing.uncertain_detail_from:
            view = replace(view, boxes=None)
        yield replace(view, pseudo_label=target.label.masked_fill(~batch.target_valid, IGNORE))
    if "masked" in wanted:
        generator = torch.Generator().manual_seed(derive_seed(seed, "masking", step))
        yield _view("masked", _mask(source, target, mixing, masking, generator), teacher, seed, step)


def _view(name: str, shown: Domain, teacher: Teacher, seed: int, step: int) -> View:
    """A view with its own detail crop, where the network has any."""
    generator = torch.Generator().manual_seed(derive_seed(seed, f"{name} detail", step))
    size = (shown.image.shape[2], shown.image.shape[3])
    boxes = teacher.network.draw_boxes(len(shown.image), size, generator)
    return View(name, shown.image, shown.label, shown.weight, boxes and boxes.to(shown.image.device))


def _mix(source: Domain, target: Domain, mixing: settings.Mixing, generator: torch.Generator) -> Domain:
    """Target images with pseudo-labels under pasted source classes, strongly augmented (DACS, algorithm 1)."""
    chosen = choose_classes(source.label, generator)
    image, label, weight = class_mix(source.image, source.label, target.image, target.label, target.weight, chosen)
    return Domain(strong_augment(image, mixing, generator), label, weight)


def _mask(
    source: Domain, target: Domain, mixing: settings.Mixing, masking: settings.Masking, generator: torch.Generator
) -> Domain:
    """Target images that hide blocks of what their pseudo-labels show (MIC, section 3.2).

    Hidden pixels are 0 after normalisation, the mean colour. With `masking.with_source`, source images with their
    ground truth take the place of half of the target images, as MIC does between real domains.
    """
    size = (target.image.shape[2], target.image.shape[3])
    visible = block_mask(len(target.image), size, masking.block_pixels(size), masking.ratio, generator)
    image = strong_augment(target.image, mixing, generator) if masking.augment else target.image
    label, weight = target.label, target.weight
    if masking.with_source:
        image = _first_halves(source.image, image)
        label = _first_halves(source.label, label)
        weight = _first_halves(source.weight, weight)
    return Domain(image * visible.to(image.device, non_blocking=True)[:, None], label, weight)


def _first_halves(source: Tensor, target: Tensor) -> Tensor:
    """The first half of the source's rows, then the first half of the target's, the middle one included.

    Halves are those of the joint batch, so that rows of other processes may be needed.
    """
    source, target = collectives.all_gather_rows(source), collectives.all_gather_rows(target)
    return collectives.local_rows(torch.cat([source[: len(source) // 2], target[: (len(target) + 1) // 2]]))
