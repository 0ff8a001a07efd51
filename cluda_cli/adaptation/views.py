"""What a step is given, and what the student sees of it. B batch, H W pixels of the crop."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.masking import block_mask, importance_ratio
from cluda_cli.adaptation.mixing import choose_by_law, choose_classes, class_mask, class_mix
from cluda_cli.adaptation.photometric import strong_augment
from cluda_cli.adaptation.style import transfer_moments
from cluda_cli.adaptation.teacher import PseudoLabels, Teacher
from cluda_cli.data.batch import Batch, Crops
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.segmenter import Output
from cluda_cli.seeds import derive_seed
from cluda_cli.spans import span


@dataclass(frozen=True)
class View:
    """One batch of images with what is to be learned from them."""

    name: str
    image: Tensor  # B 3 H W, float32, normalised
    label: Tensor  # B H W, int64 train ids, 255 = ignore
    weight: Tensor  # B H W, float32, 1 on ground truth, teacher confidence elsewhere
    probability: Tensor  # B H W, float32, the teacher's probability of the label; 1 on ground truth
    boxes: Boxes | None = None  # where a student of two resolutions looks closely; None: where it is least certain
    pseudo_label: Tensor | None = None  # B H W, int64, of the target images of a mixed view, 255 = no pseudo-label
    teacher_logits: Tensor | None = None  # B K h w, of which pseudo-labels were made; for methods that ask for it
    truth: Tensor | None = None  # B H W, bool, where the label is ground truth; None: nowhere
    seed: Tensor | None = None  # B, int64 on the CPU, for what objectives draw in each image
    guide: Tensor | None = None  # B D h w, for methods that ask for it: features of a frozen teacher, a paired picture

    def part(self, images: slice) -> Self:
        """The view of some of its images."""
        maps = ("image", "label", "weight", "probability", "pseudo_label", "teacher_logits", "truth", "seed", "guide")
        chosen = {name: None if (value := getattr(self, name)) is None else value[images] for name in maps}
        return replace(self, boxes=self.boxes and self.boxes.part(images), **chosen)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A generator on the CPU for each image: (run seed, view, step, position of the image, purpose) decide."""
        assert self.seed is not None
        return [torch.Generator().manual_seed(derive_seed(seed, purpose)) for seed in self.seed.tolist()]


class Seen(NamedTuple):
    """A view, and what the student makes of it."""

    output: Output
    view: View


@dataclass(frozen=True)
class Domain:
    """Images of one domain with labels, before any of them is altered."""

    image: Tensor  # B 3 H W, normalised, 0 on padding
    label: Tensor  # B H W, ground truth or pseudo-label
    weight: Tensor  # B H W
    probability: Tensor  # B H W, as in `View`
    truth: Tensor  # B H W, bool, as in `View`


class Scene:
    """The input of a step, before the student sees anything: the batch, the teacher's labels, named generators.

    Its domains are made when they are first asked for, so a step that needs no pseudo-label asks no teacher.
    """

    def __init__(self, batch: Batch, teacher: Teacher, seed: int, step: int, first: int = 0) -> None:
        """`first` is the position of the first image of this batch in the joint batch of all ranks."""
        self.batch, self.teacher, self.seed, self.step, self.first = batch, teacher, seed, step, first
        self.normalisation = teacher.network.normalisation
        self.notes: dict[str, Tensor] = {}
        """Numbers for the log that are no terms, by name: scalars on the device. The mean over the ranks is logged."""

    def generator(self, purpose: str) -> torch.Generator:
        """A generator on the CPU for what the joint batch has in common: (seed, purpose, step) decide."""
        return torch.Generator().manual_seed(derive_seed(self.seed, purpose, self.step))

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A generator on the CPU for each image: (seed, purpose, step, position of the image) decide."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds(purpose)]

    def seeds(self, purpose: str) -> list[int]:
        """A seed for each image, as for `generators`."""
        count = len(self.batch["target"].image)
        return [derive_seed(self.seed, purpose, self.step, self.first + i) for i in range(count)]

    @cached_property
    def source(self) -> Domain:
        """The source with its ground truth; without a source, labelled target images in its place."""
        return self.ground_truth("source") if "source" in self.batch else self.labelled

    @cached_property
    def labelled(self) -> Domain:
        """Labelled target images with their ground truth."""
        return self.ground_truth("labelled")

    @cached_property
    def target(self) -> Domain:
        """The target with pseudo-labels."""
        pseudo, image = self.pseudo_labels, self.normalise(self.batch["target"])
        truth = torch.zeros_like(pseudo.label, dtype=torch.bool)
        return Domain(image, pseudo.label, pseudo.weight, pseudo.probability, truth)

    @cached_property
    def pseudo_labels(self) -> PseudoLabels:
        """What the teacher says of the target."""
        crops = self.batch["target"]
        assert crops.valid is not None
        with span("teacher"):
            return self.teacher.pseudo_labels(self.normalise(crops), crops.valid)

    @cached_property
    def unlabelled(self) -> Domain:
        """The target for methods without labels, so that no teacher is asked: label 0 on images, 255 on padding."""
        crops = self.batch["target"]
        label = torch.where(crops.inside, 0, IGNORE)
        certain = torch.ones_like(label, dtype=torch.float32)
        return Domain(self.normalise(crops), label, certain, certain, torch.zeros_like(crops.inside))

    @cached_property
    def reference(self) -> Tensor:
        """The paired pictures of the target images.  # B 3 H W"""
        return self.normalise(self.batch["reference"])

    def ground_truth(self, name: str) -> Domain:
        """Labelled crops of the batch, by their name."""
        crops = self.batch[name]
        assert crops.label is not None
        label = crops.label.long()
        certain = torch.ones_like(label, dtype=torch.float32)
        return Domain(self.normalise(crops), label, certain, certain, torch.ones_like(label, dtype=torch.bool))

    def augment(self, image: Tensor, mixing: settings.Mixing, purpose: str) -> Tensor:
        """Jitter and blur normalised images B 3 H W, with the generators of `purpose`."""
        generator, generators = self.generator(purpose), self.generators(purpose)
        return strong_augment(image, self.normalisation, mixing, generator, generators)

    def normalise(self, crops: Crops) -> Tensor:
        """Images as the encoder wants them, 0 on padding.  # B 3 H W"""
        return self.normalisation.apply(crops.image) * crops.inside[:, None]

    def view(self, name: str, shown: Domain) -> View:
        """A view of a domain, with a detail crop of its own where the network has two resolutions."""
        size = (shown.image.shape[2], shown.image.shape[3])
        boxes = self.teacher.network.draw_boxes(len(shown.image), size, self.generator(f"{name} detail"))
        boxes = boxes and boxes.to(shown.image.device)
        return View(name, shown.image, shown.label, shown.weight, shown.probability, boxes, truth=shown.truth)


WITHOUT_TEACHER = frozenset(
    {"source", "labelled", "styleless source", "first jittered", "second jittered", "restyled", "swapped"}
)
"""Names of the views that no pseudo-label goes into."""

Maker = Callable[[Scene], View]
"""Makes one view of a scene. The same seed and step give the same view, whichever other views are made."""


@dataclass(frozen=True)
class MakeTruth:
    """Images with ground truth as they are or, with `mixing.source_jitter_strength`, strongly augmented."""

    name: Literal["source", "labelled"]
    mixing: settings.Mixing

    def __call__(self, scene: Scene) -> View:
        return show_truth(self.name, scene.source if self.name == "source" else scene.labelled, scene, self.mixing)


def show_truth(name: str, shown: Domain, scene: Scene, mixing: settings.Mixing) -> View:
    """A view of images with ground truth, augmented as `mixing.source_jitter_strength` says."""
    if mixing.source_jitter_strength is not None:
        stronger = mixing.model_copy(update={"jitter_strength": mixing.source_jitter_strength})
        shown = replace(shown, image=scene.augment(shown.image, stronger, f"{name} augmentation"))
    return scene.view(name, shown)


def make_target(scene: Scene) -> View:
    """Target images as they are, with pseudo-labels."""
    return scene.view("target", scene.target)


@dataclass(frozen=True)
class MakeStrongTarget:
    """Target images, strongly augmented as mixed ones are, with the pseudo-labels of the images as they were."""

    mixing: settings.Mixing
    name: str = "strong target"

    def __call__(self, scene: Scene) -> View:
        image = scene.augment(scene.target.image, self.mixing, f"{self.name} augmentation")
        return scene.view(self.name, replace(scene.target, image=image))


@dataclass(frozen=True)
class MakeMixed:
    """Target images with pseudo-labels under pasted source classes, strongly augmented (DACS, algorithm 1).

    With `mixing.tail` the classes are drawn by a law, given by its probabilities for each step, and the pasted pixels
    of an image get the moments of the target image.
    """

    mixing: settings.Mixing
    law: Callable[[int], tuple[float, ...]] | None = None

    def __call__(self, scene: Scene) -> View:
        source, target = scene.source, scene.target
        pasted = class_mask(source.label, self._choose(source.label, scene))  # B H W
        shown, tail = source.image, self.mixing.tail
        if tail:
            shown = transfer_moments(shown, pasted, target.image, scene.batch["target"].inside, tail.epsilon)
        image, label, weight = class_mix(shown, source.label, target.image, target.label, target.weight, pasted)
        image = scene.augment(image, self.mixing, "mixed augmentation")
        view = scene.view("mixed", Domain(image, label, weight, target.probability.masked_fill(pasted, 1.0), pasted))
        start, valid = self.mixing.uncertain_detail_from, scene.batch["target"].valid
        if start is not None and scene.step >= start:
            view = replace(view, boxes=None)
        return replace(view, pseudo_label=target.label.masked_fill(~valid, IGNORE))

    def _choose(self, label: Tensor, scene: Scene) -> Tensor:
        """The classes to paste of each image.  # B 256, bool"""
        if self.mixing.tail is None:
            return choose_classes(label, scene.generators("mixing"))
        assert self.law is not None
        law = torch.tensor(self.law(scene.step)).to(label.device, non_blocking=True)
        return choose_by_law(label, law, self.mixing.tail.classes, scene.generators("mixing"))


@dataclass(frozen=True)
class MakeMasked:
    """Target images that hide blocks of what their pseudo-labels show (MIC, section 3.2).

    Hidden pixels are 0 after normalisation, the mean colour. With `masking.with_source`, source images with their
    ground truth take the place of half of the target images, as MIC does between real domains. With
    `masking.importance` blocks differ in how likely they are hidden (GCA); the share of hidden pixels is noted.
    """

    masking: settings.Masking
    mixing: settings.Mixing
    which: str = ""
    """Before the name of the view, with a space behind: several have blocks and colours of their own."""

    def __call__(self, scene: Scene) -> View:
        masking, shown = self.masking, scene.target
        size = (shown.image.shape[2], shown.image.shape[3])
        if masking.augment:
            shown = replace(shown, image=scene.augment(shown.image, self.mixing, f"{self.which}masked augmentation"))
        if masking.with_source:
            pairs = zip(vars(scene.source).values(), vars(shown).values(), strict=True)
            shown = Domain(*(_first_halves(*pair) for pair in pairs))
        adaptive = masking.importance is not None
        ratio = importance_ratio(masking, shown.label, shown.probability) if adaptive else masking.ratio
        visible = block_mask(size, masking.block_pixels(size), ratio, scene.generators(f"{self.which}masking"))
        visible = visible.to(shown.image.device, non_blocking=True)
        name = f"{self.which}masked"
        if adaptive:
            scene.notes[f"{name}/hidden"] = 1 - visible.float().mean()
        return scene.view(name, replace(shown, image=shown.image * visible[:, None]))


def _first_halves(source: Tensor, target: Tensor) -> Tensor:
    """The first half of the source's rows, then the first half of the target's, the middle one included.

    Halves are those of the joint batch of all ranks.
    """
    source, target = collectives.all_gather_rows(source), collectives.all_gather_rows(target)
    return collectives.local_rows(torch.cat([source[: len(source) // 2], target[: (len(target) + 1) // 2]]))
