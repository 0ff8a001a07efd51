"""Weights, draws and pastes by how confident the student is of each class (AEL, arXiv 2110.05474).

B batch, K classes, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.class_confidence import (
    class_law,
    keep_pixels,
    keep_rates,
    move_confidence,
    paste_law,
    sum_confidence,
    weigh_pixels,
)
from cluda_cli.adaptation.cutmix import choose_box, draw_class, zoom
from cluda_cli.adaptation.mixing import NUM_IDS, class_mask
from cluda_cli.adaptation.views import Domain, Maker, Scene, Seen, View, show_truth
from cluda_cli.data.labels import IGNORE, ClassTable
from cluda_cli.data.streams import LOOKAHEAD
from cluda_cli.distributed import collectives
from cluda_cli.errors import SettingsError, nearest
from cluda_cli.objectives.crop_memory import CropMemory, shown_classes
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.objective import Objective
from cluda_cli.spans import span

CUTMIX, PASTED = "cutmix", "pasted"
TRUTH = ("source", "labelled", PASTED)
"""Views of ground truth alone, which are not edited."""


class AdaptiveBalance(Objective):
    """Let the classes of which the student is not confident count more (AEL, arXiv 2110.05474).

    `confidence` is a moving average of the student's probability of the label, for each class, in the view that
    `confidence_from` names. From it follow the weights of pixels with pseudo-labels (`edit`), the law by which classes
    are drawn for source and labelled target images, and what is pasted: in the view `cutmix` a rectangle of an earlier
    target image that shows a drawn class, in the view `pasted` classes of another labelled image. `cutmix` is learned
    from here, `pasted` by the objective `labelled`.

    The weights take the place of the image-level weight of pseudo-labels (DAFormer, section 3.1). Statistics are those
    of all ranks; they are taken after a step and act in later ones. Ours are: the class of a pixel is its pseudo-label,
    each pixel has a draw of its own, and the images that `cutmix` pastes are those that the memory holds.
    """

    settings: settings.AdaptiveBalance
    confidence: Tensor
    seen: Tensor
    laws: Tensor
    published: Tensor

    def __init__(
        self,
        section: settings.AdaptiveBalance,
        confidence_from: str,
        classes: ClassTable,
        size: tuple[int, int],
        mixing: settings.Mixing,
    ) -> None:
        """`size` is that of crops. Raises SettingsError if a class that is not to be pasted does not exist."""
        super().__init__(section)
        self.confidence_from, self.mixing, num_classes = confidence_from, mixing, len(classes)
        self.excluded = _find_classes(section.exclude_classes, classes)
        self.register_buffer("confidence", torch.zeros(num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("laws", torch.zeros(2, num_classes))  # the last two, the older one first
        self.register_buffer("published", torch.zeros(2, dtype=torch.long))  # the step of each; 0: none yet
        self.reads = ((CUTMIX,),) if section.cutmix else ()
        self.memory = CropMemory(section.slots, size, num_classes) if section.cutmix else None
        self.measure = CrossEntropy(section, CUTMIX)
        self.recalled: list[Tensor] = []
        """Within a step: slots of recalled crops and the classes that they show; no state."""

    def makers(self) -> Mapping[str, Maker]:
        makers: dict[str, Maker] = {CUTMIX: self._make_cutmix} if self.memory else {}
        return makers | ({PASTED: self._make_pasted} if self.settings.copy_paste else {})

    def edit(self, view: View, scene: Scene) -> View:
        """Weigh every pixel with a pseudo-label by its probability and by its class; ground truth keeps its weight."""
        if view.name in TRUTH:
            return view
        pseudo = torch.ones_like(view.label, dtype=torch.bool) if view.truth is None else ~view.truth
        counted = pseudo & (view.label != IGNORE) & (view.probability > 0)
        generators = scene.generators(f"adaptive balance {view.name}")
        drawn = torch.stack([torch.rand(view.label.shape[1:], generator=generator) for generator in generators])
        rates = keep_rates(self.confidence, self.seen, self.settings.keep_exponent)
        kept = keep_pixels(view.label, rates, drawn.to(view.label.device, non_blocking=True))
        weight = weigh_pixels(view.probability, kept, counted, self.settings.confidence_exponent)
        return replace(view, weight=weight.where(pseudo, view.weight))

    def forward(self, *seen: Seen) -> Tensor:
        value: Tensor = self.measure(*seen)
        return value

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        sums = self.confidence.new_zeros(2, len(self.confidence))
        for output, view in (one for one in seen if one.view.name == self.confidence_from):
            chosen = (view.label != IGNORE) & (view.probability > 0)
            if view.name not in TRUTH and view.truth is not None:
                chosen &= ~view.truth
            with torch.autocast(output.logits.device.type, enabled=False):
                sums += sum_confidence(output.logits.float(), view.label, chosen)
        sums = collectives.all_reduce_sum(sums)
        self.confidence.copy_(move_confidence(self.confidence, self.seen, sums, self.settings.momentum))
        self.seen |= sums[1] > 0
        if self.memory is not None:
            self._remember(self.memory, scene)
        if (scene.step + 1) % LOOKAHEAD == 0:
            self.laws.copy_(torch.stack([self.laws[1], self._law()]))
            self.published.copy_(torch.stack([self.published[1], torch.full_like(self.published[1], scene.step + 1)]))

    def source_law(self, step: int) -> tuple[float, ...] | None:
        """The law that was published between `LOOKAHEAD` and twice as many steps before `step`; None: none was."""
        wanted, published = (step // LOOKAHEAD - 1) * LOOKAHEAD, self.published.tolist()
        if self.settings.law_temperature is None or wanted <= 0 or wanted not in published:
            return None
        return tuple(self.laws[published.index(wanted)].tolist())

    def _law(self) -> Tensor:
        """Probabilities of classes, those that were never seen like classes of no confidence.  # K"""
        return class_law(self.confidence, self.settings.law_temperature or 1.0)

    def _make_cutmix(self, scene: Scene) -> View:
        """Target images with a rectangle of a remembered one that shows a drawn class; as they are while none does."""
        shown, memory = scene.target, self.memory
        assert memory is not None
        slots, train_ids = self._draw_slots(memory, scene)
        if not slots:
            return scene.view(CUTMIX, shown)
        where = torch.tensor(slots, device=shown.label.device)
        crops = memory.recall(where)
        assert crops.valid is not None
        image = scene.normalise(crops)
        with span("teacher"):
            found = scene.teacher.pseudo_labels(image, crops.valid)
        counted = found.label.where(crops.valid, IGNORE)
        self.recalled = [where, shown_classes(counted, len(self.confidence), self.settings.image_area)]
        pasted = torch.zeros_like(shown.truth)  # B H W
        for i, generator in enumerate(scene.generators("cutmix box")):
            uniforms = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            top, left, bottom, right = choose_box(counted[i] == train_ids[i], self.settings.box_area, uniforms)
            pasted[i, top:bottom, left:right] = True
        other = Domain(image, found.label, found.weight, found.probability, torch.zeros_like(shown.truth))
        return scene.view(CUTMIX, _paste(shown, other, pasted))

    def _draw_slots(self, memory: CropMemory, scene: Scene) -> tuple[list[int], list[int]]:
        """For each image a slot of the memory and the class that it is drawn for; nothing while none shows any."""
        contains = memory.contains.cpu()  # K N
        law = self._law().cpu().double() * contains.any(1)
        if not law.any():
            return [], []
        slots, train_ids = [], []
        for generator in scene.generators("cutmix"):
            first, second = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            train_ids.append(draw_class(law / law.sum(), first))
            among = contains[train_ids[-1]].nonzero().flatten().tolist()
            slots.append(among[int(second * len(among))])
        return slots, train_ids

    def _remember(self, memory: CropMemory, scene: Scene) -> None:
        """Put the target images of all ranks into the memory, and correct what recalled ones were said to show."""
        if self.recalled:
            slots, contains = (collectives.all_gather_rows(rows) for rows in self.recalled)
            memory.correct(slots, contains)
            self.recalled = []
        crops = scene.batch["target"]
        assert crops.valid is not None
        counted = scene.target.label.where(crops.valid, IGNORE)
        shown = shown_classes(counted, len(self.confidence), self.settings.image_area)
        rows = (crops.image, crops.inside, crops.valid, shown)
        memory.remember(*(collectives.all_gather_rows(tensor) for tensor in rows))

    def _make_pasted(self, scene: Scene) -> View:
        """Labelled target images with drawn classes of the next one in the joint batch, enlarged or made smaller."""
        s, shown = self.settings, scene.labelled
        law = paste_law(self.confidence.cpu().double(), self.excluded)
        chosen = torch.zeros(len(shown.image), NUM_IDS, dtype=torch.bool)  # B 256
        scale, shift = torch.ones(len(shown.image)), torch.zeros(len(shown.image), 2)
        for i, generator in enumerate(scene.generators("copy-paste")):
            uniforms = torch.rand(4 + s.paste_classes, generator=generator, dtype=torch.float64).tolist()
            if uniforms[0] < s.paste_probability:
                chosen[i, [draw_class(law, uniform) for uniform in uniforms[4:]]] = True
            low, high = s.paste_scale
            scale[i] = low * (high / low) ** uniforms[1]
            shift[i] = torch.tensor(uniforms[2:4])
        image, label = (_next_rows(rows) for rows in (shown.image, shown.label))
        image, label = zoom(image, label, scale, shift)
        pasted = class_mask(label, chosen.to(label.device, non_blocking=True))
        mixed = _paste(shown, replace(shown, image=image, label=label), pasted)
        return show_truth(PASTED, mixed, scene, self.mixing)


def _find_classes(names: Sequence[str], classes: ClassTable) -> list[int]:
    where = "objectives.adaptive_balance.exclude_classes"
    for name in set(names) - set(classes.names):
        close = nearest(name, classes.names)
        raise SettingsError(f'no class "{name}"', where, f"did you mean {close}?" if close else "see its classes")
    if set(names) == set(classes.names):
        raise SettingsError("leaves no class to paste", where, "set copy_paste=false")
    return [classes.names.index(name) for name in names]


def _paste(shown: Domain, other: Domain, pasted: Tensor) -> Domain:
    """One domain with the pixels of `pasted` B H W, bool, from another."""
    image = torch.where(pasted[:, None], other.image, shown.image)
    pairs = zip(list(vars(other).values())[1:], list(vars(shown).values())[1:], strict=True)  # all but the image
    return Domain(image, *(torch.where(pasted, *pair) for pair in pairs))


def _next_rows(rows: Tensor) -> Tensor:
    """For each row the next one in the joint batch of all ranks; the first one for the last."""
    return collectives.local_rows(collectives.all_gather_rows(rows).roll(-1, 0))
