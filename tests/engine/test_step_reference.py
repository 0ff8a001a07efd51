"""The whole training step equals a plain form of it: whole matrices, one total loss, one backward, in float64.

Encoder and heads are copies of the run's, photometric augmentation and all draws come from the same functions and
seeds; these are checked elsewhere. Everything around them is written here a second time, from the papers: class mix and
masking, context and detail and their fusion, the sliding teacher, every term of the loss, groups and rates of AdamW.

B batch, K classes, D fused channels, H W pixels, h w cells of the context, f fine cells of an axis, a b cells of a
detail crop, N cells of the contrast's grid in the batch.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cluda_cli import presets
from cluda_cli.adaptation.mixing import choose_classes
from cluda_cli.adaptation.photometric import strong_augment
from cluda_cli.data.batch import Batch, Crops
from cluda_cli.data.index import find
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.models.encoders import build_encoder
from cluda_cli.models.normalisation import IMAGENET
from cluda_cli.models.segmenter import Output
from cluda_cli.seeds import derive_seed
from cluda_cli.settings import Settings

Box = tuple[int, int, int, int]  # top, left, height, width, pixels
Size = tuple[int, int]
IGNORE, STRIDE, SCALE = 255, 4, 2
THINGS = (3, 4)  # person, car
STEPS = 2  # mixed images show detail anywhere in the first, and where the context is least certain in the second

BASE = {
    "data": {"source": "clean", "target": "noisy", "crop": [128, 128]},
    "model": {"encoder": "mit_b0", "drop_path": 0.2, "decoder": {"embed_dim": 12, "channels": 10, "dilations": [1, 2]}},
    "objectives": {
        "source": {"weight": 0.7},
        "mixed": {"weight": 1.3},
        "feature_distance": {"min_share": 0.6},
        "pixel_contrast": {"size": 13, "weighter_dim": 8, "temperature": 0.3, "weight": 0.9},
    },
    "teacher": {"confidence": 0.5, "decay": 0.6},
    "optimizer": {"lr": 1e-3, "warmup": 3, "power": 1.1},
    "training": {"steps": 10, "device": "cpu", "seed": 3},
}
MULTIRES = {"model": {"multires": {"attention_dim": 8}}, "mixing": {"uncertain_detail_from": 1}}
MASKING = {"masking": {"block": 16, "ratio": 0.4}, "objectives": {"masked": {"weight": 0.8, "detail_weight": 0.3}}}
# Of 16 x 32 fine cells the contrast samples 6 x 6: rows exactly, columns between two cells.
OBLONG = {"data": {"crop": [64, 128], "batch_size": 3}, "objectives": {"pixel_contrast": {"size": 6}}}
LARGE_DETAIL = {"model": {"multires": {"detail_crop": [48, 64]}}}
LATE = {"model": {"multires": {"blend_late": True}, "checkpoint_activations": True}}
CASES: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
    "hrda-cluda": (["hrda-cluda"], [MULTIRES]),
    "mic-cluda": (["mic-cluda"], [MULTIRES, MASKING, OBLONG, LARGE_DETAIL]),
    "mic-cluda between real domains, blended late, checkpointed": (["mic-cluda", "acdc"], [MULTIRES, MASKING, LATE]),
    "daformer-cluda": (["daformer-cluda"], [OBLONG]),
}


@dataclass
class Shown:
    """What the student is shown, and where in detail; None: where its context is least certain."""

    image: Tensor  # B 3 H W
    label: Tensor  # B H W
    weight: Tensor  # B H W
    boxes: list[Box] | None


@dataclass
class Seen:
    """What the student makes of it; without `boxes` there is one resolution."""

    image: Tensor  # of the context, B 3 H/2 W/2
    maps: tuple[Tensor, ...]  # of the context
    fused: Tensor  # of the context, B D h w
    logits: Tensor  # B K f f
    boxes: list[Box] | None = None
    detail: tuple[Tensor, Tensor] | None = None  # logits B K a b, fused B D a b


class PlainRun:
    """Student, teacher, frozen encoder and optimizer of a run, and its step."""

    def __init__(self, run: Run, pretrained: nn.Module) -> None:
        self.s, self.num_classes = run.settings, len(run.classes)
        self.multires = self.s.model.multires
        names = ["encoder", "decoder", *(["scale_attention"] if self.multires else [])]
        self.student = nn.ModuleDict({name: copy.deepcopy(getattr(run.student, name)) for name in names})
        self.student["encoder"].grad_checkpointing = False
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.frozen = copy.deepcopy(pretrained).double().requires_grad_(False).eval()
        self.weighter = copy.deepcopy(run.objectives["pixel_contrast"].weighter)
        crop, section = self.s.data.crop, self.multires
        self.window = (section and section.detail_crop) or (crop[0] // 2, crop[1] // 2)
        heads = [(f"weighter.{n}", p) for n, p in self.weighter.named_parameters()] if self.weighter else []
        groups = []
        for name, parameter in [*self.student.named_parameters(), *heads]:
            decay = 0.0 if name.startswith("encoder") and "norm" in name else 0.01
            rate = self.s.optimizer.lr * (1 if name.startswith("encoder") else 10)
            groups.append({"params": [parameter], "rate": rate, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def begin(self, step: int) -> None:
        """The teacher follows the student at the start of each step but the first; buffers stay its own."""
        alpha = min(1 - 1 / (step + 1), self.s.teacher.decay)
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data = alpha * slow.data + (1 - alpha) * fast.data

    def step(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, list[Box] | None]]:
        """The terms and the boxes of the views."""
        self.student.train()
        self.optimizer.zero_grad()
        terms: dict[str, Tensor] = {}
        boxes: dict[str, list[Box] | None] = {}
        total = torch.zeros((), dtype=torch.float64)
        for name, shown in self.views(batch, step).items():
            torch.manual_seed(derive_seed(self.s.training.seed, f"student {name}", step, 0))  # of dropout, for replay
            seen = self.see(shown)
            boxes[name] = seen.boxes
            for term, value in self.measure(name, seen, shown).items():
                total = total + getattr(self.s.objectives, term).weight * value
                terms[f"{name}/{term}"] = value.detach()
        total.backward()
        o, steps = self.s.optimizer, self.s.training.steps
        warm = 1 - (1 - step / o.warmup) * (1 - 1e-6) if step < o.warmup else 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / steps) ** o.power * warm
        self.optimizer.step()
        return terms, boxes

    def views(self, batch: Batch, step: int) -> dict[str, Shown]:
        s, count, label = self.s, len(batch["source"].label), batch["source"].label.long()
        source = IMAGENET.apply(batch["source"].image) * batch["source"].inside[:, None]
        target = IMAGENET.apply(batch["target"].image) * batch["target"].inside[:, None]
        probability = resize(self.teacher_logits(target), s.data.crop).softmax(dim=1)
        share = (probability.amax(dim=1) >= s.teacher.confidence).double().mean()
        assert 0.05 < share < 0.95
        pseudo, weight = probability.argmax(dim=1), share * batch["target"].valid.double()
        sure = torch.ones_like(weight)
        views = {"source": Shown(source, label, sure, self.one_place("source", count, step))}

        chosen = choose_classes(label, self.generators("mixing", count, step))  # B 256
        mask = torch.stack([chosen[i][label[i]] for i in range(count)]).long()  # B H W
        image = mask[:, None] * source + (1 - mask[:, None]) * target
        anywhere = s.mixing.uncertain_detail_from is None or step < s.mixing.uncertain_detail_from
        views["mixed"] = Shown(
            self.augment(image, "mixed augmentation", step), mask * label + (1 - mask) * pseudo,
            mask * sure + (1 - mask) * weight, self.one_place("mixed", count, step) if anywhere else None,
        )  # fmt: skip

        if s.objectives.masked:
            block, generators = s.masking.block, self.generators("masking", count, step)
            grid = [side // block for side in s.data.crop]
            drawn = torch.stack([torch.rand(1, *grid, generator=generator) for generator in generators])
            visible = (drawn > s.masking.ratio).repeat_interleave(block, 2).repeat_interleave(block, 3)
            image = self.augment(target, "masked augmentation", step) if s.masking.augment else target
            if s.masking.with_source:  # one of the two images of either domain
                image, pseudo = torch.cat([source[:1], image[:1]]), torch.cat([label[:1], pseudo[:1]])
                weight = torch.cat([sure[:1], weight[:1]])
            views["masked"] = Shown(visible * image, pseudo, weight, self.one_place("masked", count, step))
        return views

    def generators(self, purpose: str, count: int, step: int) -> list[torch.Generator]:
        """One for each image."""
        seeds = (derive_seed(self.s.training.seed, purpose, step, i) for i in range(count))
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def augment(self, image: Tensor, purpose: str, step: int) -> Tensor:
        whole = torch.Generator().manual_seed(derive_seed(self.s.training.seed, purpose, step))
        return strong_augment(image, IMAGENET, self.s.mixing, whole, self.generators(purpose, len(image), step))

    def one_place(self, name: str, count: int, step: int) -> list[Box] | None:
        """One random box for all images, on the grid of the context: row, then column."""
        if not self.multires:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.s.training.seed, f"{name} detail", step))
        places = [(whole - part) // 8 + 1 for whole, part in zip(self.s.data.crop, self.window, strict=True)]
        top, left = (8 * int(torch.randint(number, (), generator=generator)) for number in places)
        return [(top, left, *self.window)] * count

    def see(self, shown: Shown) -> Seen:
        """Context, then detail, then attention: the order in which dropout draws and batch norms see them."""
        if not self.multires:
            maps = self.student["encoder"](shown.image)
            logits, fused = self.student["decoder"](maps)
            return Seen(shown.image, maps, fused, logits)
        image = F.avg_pool2d(shown.image, SCALE)
        maps = self.student["encoder"](image)
        coarse, fused = self.student["decoder"](maps)
        boxes = shown.boxes or self.least_certain(coarse.detach())
        detail = self.student["decoder"](self.student["encoder"](cut(shown.image, boxes)))
        cells, fine = size_of(coarse), size_of(coarse, SCALE)
        here = torch.ones(len(boxes), 1, self.window[0] // 8, self.window[1] // 8, dtype=torch.float64)
        attention = self.student["scale_attention"](maps)[0].sigmoid() * paste(here, boxes, cells, 8)
        logits = self.fuse(coarse, paste(detail[0], boxes, fine, STRIDE), attention)
        return Seen(image, maps, fused, logits, boxes, detail)

    def fuse(self, coarse: Tensor, fine: Tensor, attention: Tensor) -> Tensor:
        size = size_of(fine)
        if self.multires.blend_late:
            return resize(attention, size) * fine + (1 - resize(attention, size)) * resize(coarse, size)
        return resize(attention, size) * fine + resize((1 - attention) * coarse, size)

    def least_certain(self, logits: Tensor) -> list[Box]:
        """Of the windows of evaluation the one with the largest mean entropy over its pixels, the first of equals."""
        probability = logits.softmax(dim=1)
        entropy = -(probability * probability.log()).sum(dim=1).repeat_interleave(8, 1).repeat_interleave(8, 2)  # B H W
        places = windows(self.s.data.crop, self.window)
        means = torch.stack([cut(entropy, [place] * len(entropy)).mean(dim=(1, 2)) for place in places])  # places B
        return [places[best] for best in means.argmax(dim=0).tolist()]

    @torch.no_grad()
    def teacher_logits(self, image: Tensor) -> Tensor:
        """Batch norms see the batch; dropout and stochastic depth are off."""
        for module in self.teacher.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        encoder, decoder = self.teacher["encoder"], self.teacher["decoder"]
        if not self.multires:
            return decoder(encoder(image))[0]
        maps = encoder(F.avg_pool2d(image, SCALE))
        coarse, count = decoder(maps)[0], len(image)
        places = windows(self.s.data.crop, self.window)
        parts = decoder(encoder(torch.cat([cut(image, [place] * count) for place in places])))[0].split(count)
        total = coverage = 0
        for place, part in zip(places, parts, strict=True):
            total = total + paste(part, [place] * count, size_of(coarse, SCALE), STRIDE)
            coverage = coverage + paste(torch.ones_like(part), [place] * count, size_of(coarse, SCALE), STRIDE)
        return self.fuse(coarse, total / coverage, self.teacher["scale_attention"](maps)[0].sigmoid())

    def measure(self, name: str, seen: Seen, shown: Shown) -> dict[str, Tensor]:
        """Terms of a view, unweighted."""
        terms = {name: self.cross_entropy(seen, shown, getattr(self.s.objectives, name).detail_weight)}
        if name == "source":
            terms["feature_distance"] = self.distance(seen, shown)
        if name != "masked":
            terms["pixel_contrast"] = self.contrast(seen, shown)
        return terms

    def cross_entropy(self, seen: Seen, shown: Shown, detail_weight: float) -> Tensor:
        def mean(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
            probability = resize(logits, label.shape[1:]).softmax(dim=1)
            loss = -probability.gather(1, label.where(label != IGNORE, 0)[:, None])[:, 0].log()
            return (loss * weight * (label != IGNORE)).sum() / label.numel()

        whole = mean(seen.logits, shown.label, shown.weight)
        if seen.boxes is None:
            return whole
        part = mean(seen.detail[0], cut(shown.label, seen.boxes), cut(shown.weight, seen.boxes))
        return (1 - detail_weight) * whole + detail_weight * part

    def distance(self, seen: Seen, shown: Shown) -> Tensor:
        before, after = self.frozen(seen.image)[-1], seen.maps[-1]
        one_hot = F.one_hot(shown.label.where(shown.label != IGNORE, self.num_classes), self.num_classes + 1)
        shares = F.avg_pool2d(one_hot.double().movedim(3, 1), shown.label.shape[1] // after.shape[2])
        share, winner = shares.max(dim=1)  # B h w
        mask = (share >= self.s.objectives.feature_distance.min_share) & torch.isin(winner, torch.tensor(THINGS))
        assert mask.any() and not mask.all()
        return (after - before).square().sum(dim=1).sqrt()[mask].mean()

    def contrast(self, seen: Seen, shown: Shown) -> Tensor:
        """CLUDA's contrast with pixels in one order and without ignored ones; with two resolutions its gate is the box
        and its share of detail that of HRDA's attention, where 1 is all detail."""
        section, boxes = self.s.objectives.pixel_contrast, seen.boxes
        fine = size_of(seen.fused, SCALE if boxes else 1)
        grid = tuple(min(section.size, side) for side in fine)
        nearest = [
            torch.arange(new) * old // new for old, new in zip(shown.label.shape[1:], grid, strict=True)
        ]  # row and column of a pixel for each cell
        label = shown.label[:, nearest[0]][:, :, nearest[1]].flatten()  # N
        valid = label != IGNORE

        def rows(maps: Tensor) -> Tensor:
            return resize(maps, grid, aligned=True).movedim(1, 3).flatten(0, 2)[valid]  # N *

        label, weight = label[valid], rows(shown.weight[:, None])
        positive = (label[:, None] == label) & ~torch.eye(len(label), dtype=torch.bool)
        share = positive * (weight * weight.T) / positive.sum(dim=1, keepdim=True).clamp_min(1) / len(label)  # N N
        if boxes is None:
            return (share * pair_costs(rows(seen.fused), rows(seen.fused), label, section.temperature)).sum()

        context, detail = rows(resize(seen.fused, fine, aligned=True)), rows(paste(seen.detail[1], boxes, fine, STRIDE))
        mix = rows(resize(self.weighter(seen.maps)[0].sigmoid(), fine))
        inside = torch.tensor([within(box, fine, grid) for box in boxes]).flatten()[valid]
        assert inside.any() and not inside.all()
        mix = (mix * mix.T) * (inside[:, None] & inside)
        cost = (1 - mix) * pair_costs(context, context, label, section.temperature)
        cost = cost + mix * pair_costs(context, detail, label, section.temperature, columns=inside)
        return (share * cost).sum() / 2


def pair_costs(anchors: Tensor, others: Tensor, label: Tensor, temperature: float, columns: Any = True) -> Tensor:
    """-log of e^s_ij / (e^s_ij + sum of e^s_ik over the pixels k of other classes, among `columns`).  # N N"""
    similarity = (F.normalize(anchors, dim=1) @ F.normalize(others, dim=1).T / temperature).exp()
    negatives = (similarity * (label[:, None] != label) * columns).sum(dim=1, keepdim=True)
    return -(similarity / (similarity + negatives)).log()


def within(box: Box, fine: Size, grid: Size) -> list[list[bool]]:
    """For each cell of the grid whether the fine cells that its sample is made of all lie in the box."""
    axes = []
    for start, length, old, new in zip(box[:2], box[2:], fine, grid, strict=True):
        touched = [{i * (old - 1) // (new - 1), -(-i * (old - 1) // (new - 1))} for i in range(new)]
        axes.append([cells <= set(range(start // STRIDE, (start + length) // STRIDE)) for cells in touched])
    return [[row and column for column in axes[1]] for row in axes[0]]


def resize(maps: Tensor, size: Size, aligned: bool = False) -> Tensor:
    """Bilinear, as two matrices; corners aligned, or pixels of equal area."""
    matrices = []
    for old, new in zip(maps.shape[2:], size, strict=True):
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            position = i * (old - 1) / (new - 1) if aligned else max((i + 0.5) * old / new - 0.5, 0)
            matrix[i, int(position)] += 1 - position % 1
            matrix[i, min(int(position) + 1, old - 1)] += position % 1
        matrices.append(matrix)
    return torch.einsum("yh,bchw,xw->bcyx", matrices[0], maps, matrices[1])


def size_of(maps: Tensor, scale: int = 1) -> Size:
    return scale * maps.shape[2], scale * maps.shape[3]


def cut(maps: Tensor, boxes: list[Box]) -> Tensor:
    """B ... H W -> B ... a b."""
    return torch.stack([one[..., y : y + a, x : x + b] for one, (y, x, a, b) in zip(maps, boxes, strict=True)])


def paste(parts: Tensor, boxes: list[Box], size: Size, stride: int) -> Tensor:
    """On zeros of `size` cells, each of `stride` pixels."""
    pasted = []
    for part, (top, left, height, width) in zip(parts, boxes, strict=True):
        margins = (left, size[1] * stride - left - width, top, size[0] * stride - top - height)
        pasted.append(F.pad(part, [margin // stride for margin in margins]))
    return torch.stack(pasted)


def windows(size: Size, window: Size) -> list[Box]:
    """Overlapping by half, row by row, the last ones moved back to fit."""
    tops, lefts = (
        [min(start, whole - part) for start in range(0, whole - part + part // 2, part // 2)]
        for whole, part in zip(size, window, strict=True)
    )
    return [(top, left, *window) for top in tops for left in lefts]


@pytest.fixture
def plain_and_run(
    request: pytest.FixtureRequest, float64: None, narrow_mit: None, tiny_data: Path, tmp_path: Path
) -> tuple[PlainRun, Run]:
    """In float64, with all parameters away from where initialisation puts them."""
    names, changes = CASES[request.param]
    weights = tmp_path / "encoder.safetensors"
    tree: dict[str, Any] = {}
    for change in (BASE, *changes, {"data": {"root": str(tiny_data)}, "model": {"weights": str(weights)}}):
        tree = presets.merge(tree, change)
    settings = presets.load([*names], tree)
    torch.manual_seed(0)
    save_file(build_encoder(settings.model).state_dict(), weights)
    run = Run(settings, [find("clean", tiny_data)], torch.device("cpu"))
    pretrained = copy.deepcopy(run.student.encoder)
    for module in (run.student, run.teacher, run.objectives):
        module.double()
    with torch.no_grad():
        for name, parameter in [*run.student.named_parameters(), *run.objectives.named_parameters()]:
            parameter += (0.5 if "conv_seg" in name else 0.05) * torch.randn_like(parameter)
        run.teacher.network.load_state_dict(run.student.state_dict())
    return PlainRun(run, pretrained), run


def make_batch(settings: Settings, step: int) -> Batch:
    """Blocks of noisy shades; some are ignored, both domains are padded and the target has margins."""
    generator = torch.Generator().manual_seed(step)
    count, (height, width) = settings.data.batch_size, settings.data.crop
    label = torch.randint(0, 5, (2, count, height // 32, width // 32), generator=generator)
    label[0, :, :2, :2], label[0, :, -1, -1] = THINGS[step % 2], 5  # a cell of the last map, and ignored pixels
    label = label.repeat_interleave(32, 2).repeat_interleave(32, 3)  # 2 B H W
    shade = torch.tensor([40, 90, 130, 170, 220, 10])[label][:, :, None] + torch.tensor([0, 15, -20]).view(3, 1, 1)
    image = (shade + torch.randint(-30, 31, shade.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    inside = torch.ones(2, count, height, width, dtype=torch.bool)
    inside[0, 1, -5:], inside[1, 0, :, -7:] = False, False
    valid = inside[1].clone()
    valid[:, :6] = False
    source_label = label[0].where((label[0] < 5) & inside[0], IGNORE).to(torch.uint8)
    return {
        "source": Crops(image[0], inside[0], label=source_label),
        "target": Crops(image[1], inside[1], valid=valid),
    }


def assert_near(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor, relative to its largest number; a number below 1e-5 stands for a zero that rounding misses."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        difference, largest = (ours[name] - expected).abs().max().item(), expected.abs().max().item()
        assert difference <= tolerance * max(largest, 1e-5), f"{name}: {difference} of {largest}"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("plain_and_run", CASES, indirect=True)
def test_the_step_equals_its_plain_form(plain_and_run: tuple[PlainRun, Run]) -> None:
    plain, run = plain_and_run
    outputs: list[Output] = []
    run.student.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    weighter = run.objectives["pixel_contrast"].weighter
    for step in range(STEPS):
        outputs.clear()
        batch = make_batch(run.settings, step)
        result = training_step(run, batch)
        terms, boxes = plain.step(batch, step)
        plain.begin(step + 1)
        assert_near(result.terms, terms, 1e-10)
        for view, output in zip(result.views, outputs, strict=True):
            found = output.detail and output.detail.boxes
            assert (found and [(*corner, *found.size) for corner in found.corner.tolist()]) == boxes[view.name]
        for ours, expected in [(run.student, plain.student), *([(weighter, plain.weighter)] if weighter else [])]:
            assert_near(gradients(ours), gradients(expected), 1e-8)
            assert_near(ours.state_dict(), expected.state_dict(), 1e-10)  # parameters and running statistics
        assert_near(run.teacher.network.state_dict(), plain.teacher.state_dict(), 1e-10)
