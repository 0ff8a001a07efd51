"""What every objective keeps to, for networks of one and of two resolutions, and which ones the settings build.

Every objective that `build_objectives` can build is tested: each section of `settings.Objectives` is switched on, and
each group of views that an objective says it reads is a case. So a new objective cannot be forgotten.

The student's outputs are leaves here. With one resolution, and with two: labels are 64 and 128 pixels wide, logits as
large. The encoder sees 64 pixels; its last map is 2 cells wide, features 8. Detail is 64 pixels wide, its logits as
large, its features 8 cells.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import presets, settings
from cluda_cli.adaptation.teacher import FrozenTeacher
from cluda_cli.adaptation.views import Domain, Seen, View, make_target
from cluda_cli.data.batch import Crops
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.errors import SettingsError
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.models.multires import MultiResolution
from cluda_cli.models.segmenter import Detail, Output, Segmenter
from cluda_cli.objectives import build_makers, build_objectives
from cluda_cli.objectives.objective import Objective

CLASSES = ClassTable(CITYSCAPES)
CORNERS = ((32, 48), (48, 16))  # of the detail of the two images: some of it is ignored, some is not
DETAIL, CELL = 64, 8
TRUTH = {"source", "labelled"}
MAPS = {f"map {i}" for i in range(4)}
# Which leaves of the output the gradient of an objective reaches, with one resolution and with two; others: any.
READS_OUTPUT = {
    "source": ({"logits"}, {"logits", "detail logits"}),
    "labelled": ({"logits"}, {"logits", "detail logits"}),
    "adaptive_balance": ({"logits"}, {"logits", "detail logits"}),
    "mixed": ({"logits"}, {"logits", "detail logits"}),
    "masked": ({"logits"}, {"logits", "detail logits"}),
    "feature_distance": ({"map 3"}, {"map 3"}),
    "pixel_contrast": ({"features"}, {"features", "detail features"} | MAPS),
    "anchor_contrast": ({"features"}, {"features"}),
    "global_contrast": ({"map 3"}, {"map 3"}),
    "local_contrast": ({"features"}, {"features"}),
    "semantic_negatives": ({"features"}, {"features"}),
    "zero_style": ({"logits"}, {"logits", "detail logits"}),
    "memory_contrast": ({"features"}, {"features"}),
    "clustering": ({"features", "logits"}, {"features", "logits"}),
    "node_contrast": ({"features"}, {"features"}),
    "distilled": ({"logits"}, {"logits", "detail logits"}),
    "relation_distillation": ({"features"}, {"features"}),
    "prototype_contrast": (MAPS, MAPS),
    "locally_adaptive": ({"logits"}, {"logits", "detail logits"}),
}
# Sizes that suit maps so small.
SMALL: dict[str, Any] = {
    "memory_contrast": {"memory": 32, "projection_channels": 8},
    "local_contrast": {"region": 1},
    "adaptive_balance": {"cutmix": True, "slots": 3},
}


class Encoder(nn.Module):
    """Block means times a parameter; autocast leaves both alone."""

    channels = (3, 3, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.scale * F.avg_pool2d(image, stride) for stride in (4, 8, 16, 32))


class OneResolution(Segmenter):
    """As much of a network as objectives ask for when they are built."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.frozen, self.freeze_batch_norm = frozenset[str](), False
        self.encoder = Encoder()
        self.decoder = DAFormerDecoder(settings.Decoder(embed_dim=4, channels=6), Encoder.channels, len(CLASSES))


class TwoResolutions(OneResolution, MultiResolution):
    pass


def objectives(resolutions: int = 1, *, seed: int = 0, **sections: Any) -> nn.ModuleDict:
    """All of them, unless switched off, with what an earlier step left in their buffers.

    In evaluation mode, because heads of objectives may have dropout.
    """
    everything: dict[str, Any] = {name: True for name in settings.Objectives.model_fields}
    student = OneResolution() if resolutions == 1 else TwoResolutions()
    teacher = FrozenTeacher(OneResolution(), CLASSES, CLASSES)
    chosen = settings.Objectives(**everything | SMALL | sections)
    built = build_objectives(chosen, student, CLASSES, teacher=teacher, crop=(64, 64), seed=seed).eval()
    for objective in built.values():
        if objective.updates:
            names = tuple(name for group in objective.reads for name in group)
            with torch.no_grad():
                objective.update(EARLIER, see(names, resolutions))  # type: ignore[arg-type]
    return built


def student_output(resolutions: int = 1, cells: int = CELL, seed: int = 1) -> Output:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).requires_grad_()

    logits, features = leaf(19, 64 * resolutions, 64 * resolutions), leaf(6, cells, cells)
    maps = tuple(leaf(3, side, side) for side in (16, 8, 4, 2))
    image = torch.randn(2, 3, 64, 64, generator=generator)
    if resolutions == 1:
        return Output(logits, features, maps, image)
    detail = Detail(Boxes(torch.tensor(CORNERS), (DETAIL, DETAIL)), leaf(19, DETAIL, DETAIL), leaf(6, cells, cells))
    return Output(logits, features, maps, image, detail)


def make_view(name: str, resolutions: int = 1) -> View:
    """Vertical bands of car, sky and person; the upper left quarter is ignored."""
    side = 64 * resolutions
    generator = torch.Generator().manual_seed(2)
    label = torch.tensor([13, 10, 11])[torch.arange(side) // (24 * resolutions)].expand(2, side, side).clone()
    label[1, side // 2 :] = 13
    label[:, : side // 2, : side // 2] = 255
    if name == "swapped":
        label[:, 3 * side // 4 :, side // 2 :] = 5
    weight, probability = (torch.full((2, side, side), 1.0 if name in TRUTH else value) for value in (0.5, 0.97))
    shapes = ((3, side, side), (19, side, side), (6, CELL, CELL))
    image, logits, guide = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    seed = torch.tensor([3, 4])
    return View(name, image, label, weight, probability, teacher_logits=logits, seed=seed, guide=guide)


def see(group: tuple[str, ...], resolutions: int = 1, cells: int = CELL) -> list[Seen]:
    """Every view of a group with an output of its own."""
    return [Seen(student_output(resolutions, cells, i), make_view(n, resolutions)) for i, n in enumerate(group, 1)]


class EarlierTeacher:
    """Features of noise."""

    decay = 0.99

    def output(self, image: Tensor, **_: bool) -> Output:
        return student_output(seed=9)


def earlier_source() -> Domain:
    view = make_view("source")
    return Domain(view.image, view.label, view.weight, view.probability, torch.ones_like(view.label, dtype=torch.bool))


def earlier_target() -> Crops:
    everywhere = torch.ones(2, 64, 64, dtype=torch.bool)
    return Crops(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8), everywhere, valid=everywhere)


EARLIER = SimpleNamespace(
    step=9, source=earlier_source(), target=earlier_source(), teacher=EarlierTeacher(), notes={},
    batch={"target": earlier_target()},
)  # fmt: skip


def change(seen: list[Seen], output: Callable[[Output], Output] = lambda o: o, **fields: Any) -> list[Seen]:
    return [Seen(output(one.output), replace(one.view, **fields)) for one in seen]


def gradients(value: Tensor, seen: list[Seen]) -> dict[str, list[Tensor]]:
    """By the name of the leaf, those that there are."""
    found: dict[str, list[Tensor]] = {}
    for output, _ in seen:
        leaves = {"logits": output.logits, "features": output.features}
        leaves |= {f"map {i}": features for i, features in enumerate(output.encoder)}
        if output.detail is not None:
            leaves |= {"detail logits": output.detail.logits, "detail features": output.detail.features}
        for name, gradient in zip(
            leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True), strict=True
        ):
            if gradient is not None:
                found.setdefault(name, []).append(gradient)
    return found


def reached(name: str, resolutions: int, found: Collection[str]) -> set[str]:
    """The leaves that an objective has to reach; `found` where that is not known, if there is any."""
    return READS_OUTPUT[name][resolutions - 1] if name in READS_OUTPUT else set(found) or {"anything"}


def flipped(output: Output) -> Output:
    """The images of the batch in the opposite order."""
    detail = output.detail and Detail(
        Boxes(output.detail.boxes.corner.flip(0), output.detail.boxes.size),
        output.detail.logits.flip(0),
        output.detail.features.flip(0),
    )
    maps = tuple(features.flip(0) for features in output.encoder)
    return Output(output.logits.flip(0), output.features.flip(0), maps, output.image.flip(0), detail)


def cast(output: Output, dtype: torch.dtype) -> Output:
    detail = output.detail and replace(
        output.detail, logits=output.detail.logits.to(dtype), features=output.detail.features.to(dtype)
    )
    maps = tuple(features.to(dtype) for features in output.encoder)
    return Output(output.logits.to(dtype), output.features.to(dtype), maps, output.image, detail)


contract = pytest.mark.parametrize(
    ("name", "group", "resolutions"),
    [
        pytest.param(name, group, resolutions, id=f"{name}-{'+'.join(group)}-{resolutions}")
        for resolutions in (1, 2)
        for name, objective in objectives(resolutions).items()
        for group in objective.reads
    ],
)
cross_entropies = pytest.mark.parametrize("name", ["source", "labelled", "mixed", "masked", "distilled"])


def test_every_section_builds_an_objective_that_is_tested() -> None:
    built = objectives()
    assert set(built) == set(settings.Objectives.model_fields) >= set(READS_OUTPUT)
    assert all(isinstance(objective, Objective) for objective in built.values())


@contract
def test_finite_and_connected(name: str, group: tuple[str, ...], resolutions: int) -> None:
    seen = see(group, resolutions)
    value = objectives(resolutions)[name](*seen)
    assert value.shape == ()
    assert value > 0
    found = gradients(value, seen)
    assert found.keys() == reached(name, resolutions, found)
    assert all(torch.isfinite(one).all() and one.any() for same in found.values() for one in same)


@contract
def test_exactly_zero_and_connected_where_nothing_applies(name: str, group: tuple[str, ...], resolutions: int) -> None:
    seen = see(group, resolutions)
    seen = change(seen, label=torch.full_like(seen[0].view.label, 255))
    value = objectives(resolutions)[name](*seen)
    assert value == 0
    found = gradients(value, seen)
    assert found.keys() == reached(name, resolutions, found)
    assert all(torch.equal(one, torch.zeros_like(one)) for same in found.values() for one in same)


@contract
def test_ignored_pixels_do_not_matter(name: str, group: tuple[str, ...], resolutions: int) -> None:
    """Features of the context are resized to the detail's cells, so that those of a border belong to both sides."""
    objective, seen, changed = objectives(resolutions)[name], see(group, resolutions), see(group, resolutions)
    half, clear = 32 * resolutions, CELL // 2 if resolutions == 1 else CELL // 2 - 1
    expected = objective(*seen)
    with torch.no_grad():
        for output, _ in changed:
            output.logits[:, :, :half, :half] += 7 * torch.randn(2, 19, half, half)
            output.features[:, :, :clear, :clear] += 7
            if not reached(name, resolutions, ()) >= MAPS:  # a head sees the maps as a whole
                output.encoder[-1][:, :, 0, 0] += 7
            for i, (top, left) in enumerate(CORNERS if output.detail else ()):
                rows, columns = half - top, half - left
                output.detail.logits[i, :, :rows, :columns] += 7 * torch.randn(19, rows, columns)
                output.detail.features[i, :, : rows // CELL, : columns // CELL] += 7
    assert objective(*changed) == expected
    with torch.no_grad():
        for output, _ in changed:
            output.logits[:, 3, half + 8 :, half + 8 :] += 7
            output.features[:, :3, 4:, 4:] += 7
            output.encoder[-1][:, :, 1, 0] += 7
    assert objective(*changed) != expected


@contract
def test_labelled_pixels_of_the_detail_matter(name: str, group: tuple[str, ...], resolutions: int) -> None:
    if not any("detail" in leaf for leaf in reached(name, resolutions, ())):
        pytest.skip("it reads no detail")
    objective, changed = objectives(resolutions)[name], see(group, resolutions)
    expected = objective(*see(group, resolutions))
    with torch.no_grad():
        for output, _ in changed:
            output.detail.logits[:, 3, -8:, -8:] += 7
            output.detail.features[:, :3, -1:, -1:] += 7
    assert objective(*changed) != expected


@pytest.mark.parametrize("resolutions", [1, 2])
@cross_entropies
def test_weightless_pixels_do_not_matter(name: str, resolutions: int) -> None:
    objective = objectives(resolutions)[name]
    (view,) = objective.reads[0]
    (seen,), (changed,) = see((view,), resolutions), see((view,), resolutions)
    seen.view.weight[:, 50:] = 0
    with torch.no_grad():
        changed.output.logits[:, 3, 50:] += 7
        for i, (top, _) in enumerate(CORNERS if changed.output.detail else ()):
            changed.output.detail.logits[i, 3, 50 - top :] += 7
    assert objective(Seen(changed.output, seen.view)) == objective(seen)


@contract
def test_order_of_images_does_not_matter(name: str, group: tuple[str, ...], resolutions: int) -> None:
    objective, seen = objectives(resolutions)[name], see(group, resolutions)
    maps = ("image", "label", "weight", "probability", "teacher_logits", "seed", "guide")
    turned = [
        Seen(flipped(output), replace(view, **{name: getattr(view, name).flip(0) for name in maps}))
        for output, view in seen
    ]
    torch.testing.assert_close(objective(*turned), objective(*seen))


@contract
def test_computed_in_float32_under_autocast(name: str, group: tuple[str, ...], resolutions: int) -> None:
    objective = objectives(resolutions)[name]
    half = change(see(group, resolutions), lambda output: cast(output, torch.bfloat16))
    expected = objective(*change(half, lambda output: cast(output, torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        actual = objective(*half)
    assert actual.dtype == torch.float32
    assert actual == expected


@contract
def test_no_tensor_is_quadratic_in_pixels(name: str, group: tuple[str, ...], resolutions: int) -> None:
    """The contrast has 2 x 48 x 48 cells of a feature map or of a finer one: all pairs would be 21 million numbers."""
    seen = see(group, resolutions, cells=48 if resolutions == 1 else 32)
    objective = objectives(resolutions, pixel_contrast={"size": 48})[name]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objective(*seen).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 8 * 2**20


@contract
def test_state_survives_a_round_trip(name: str, group: tuple[str, ...], resolutions: int) -> None:
    """State is whatever makes two of a kind differ."""
    one, other = (objectives(resolutions, seed=seed)[name] for seed in (0, 1))
    other.load_state_dict(one.state_dict())
    if hasattr(one, "pretrained"):  # no state: whoever builds it again loads the same file
        other.pretrained.network.load_state_dict(one.pretrained.network.state_dict())
    if hasattr(one, "student"):  # has a state of its own
        other.student.load_state_dict(one.student.state_dict())
    seen = see(group, resolutions)
    assert one(*seen) == other(*seen)


def test_what_is_saved() -> None:
    """The heads of the contrasts, which learn; that of the pixel contrast exists with two resolutions alone.

    And what a memory remembers.
    """
    one, other = objectives(2), objectives(2, seed=1)
    memory = {f"memory_contrast.{name}" for name in ("head", "average", "memory", "pointer", "length")}
    heads = {f"{name}.head" for name in ("anchor_contrast", "global_contrast", "local_contrast", "semantic_negatives")}
    heads |= {"node_contrast.head"}
    prototypes = {f"prototype_contrast.{name}" for name in ("head", "average", "known")}
    balance = {f"adaptive_balance.{name}" for name in ("confidence", "seen", "laws", "published", "memory")}
    state = heads | {"clustering.steps"} | memory | prototypes | balance
    assert {".".join(name.split(".")[:2]) for name in one.state_dict()} == state | {"pixel_contrast.weighter"}
    assert {".".join(name.split(".")[:2]) for name in objectives(1).state_dict()} == state
    learning = ["pixel_contrast", "anchor_contrast", "memory_contrast", "prototype_contrast", "node_contrast"]
    for name in (*learning, "global_contrast", "local_contrast", "semantic_negatives"):
        seen = see(one[name].reads[0], 2)
        assert one[name](*seen) != other[name](*seen)
        one[name](*seen).backward()
    assert all(p.grad is not None and p.grad.any() for p in one.parameters())


@pytest.mark.parametrize("name", [name for name in settings.Objectives.model_fields])
def test_an_objective_begins_alike_whether_others_are_on_or_off(name: str) -> None:
    others = {other: False for other in settings.Objectives.model_fields if other != name}
    together, alone = (build(seed=3, **sections)[name].state_dict() for sections in ({}, others))
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], alone[key]) for key in together)


def test_another_seed_draws_other_layers() -> None:
    first, second = (build(seed=seed)["anchor_contrast"].state_dict() for seed in (3, 4))
    assert any(not torch.equal(first[key], second[key]) for key in first)


def build(*, seed: int, **sections: Any) -> nn.ModuleDict:
    """Objectives as a run begins with them."""
    everything: dict[str, Any] = {name: True for name in settings.Objectives.model_fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = OneResolution()
        teacher = FrozenTeacher(OneResolution(), CLASSES, CLASSES)
    return build_objectives(
        settings.Objectives(**everything | SMALL | sections), student, CLASSES, teacher=teacher, seed=seed
    )


def test_settings_choose_the_objectives() -> None:
    off = {name: False for name in settings.Objectives.model_fields}
    assert list(objectives(**off)) == []
    for name in off:
        assert list(objectives(**off | {name: True})) == [name]
    assert "masked" not in build_objectives(settings.Objectives(), OneResolution(), CLASSES)
    assert objectives(pixel_contrast={"weight": 0.3, "start": 7})["pixel_contrast"].settings.start == 7


def test_contrast_reads_mixed_views_only_if_they_are_learned_from() -> None:
    assert objectives()["pixel_contrast"].reads == (("source",), ("mixed",))
    assert objectives(mixed=False)["pixel_contrast"].reads == (("source",),)
    assert objectives()["anchor_contrast"].reads == (("source", "mixed"),)
    assert objectives(mixed=False)["anchor_contrast"].reads == (("source",),)


class Reader(Objective):
    """Reads a view of some name, and makes others."""

    def __init__(self, view: str, *made: str) -> None:
        super().__init__(settings.Objective())
        self.reads, self.made = ((view,),), made

    def makers(self) -> dict[str, Any]:
        return dict.fromkeys(self.made, make_target)


def test_a_view_that_nobody_makes_is_an_error_before_the_run() -> None:
    with pytest.raises(SettingsError, match=r"objectives\.reader: reads the view mixd, which nobody makes -> .*mixed"):
        build_makers(settings.Settings(), nn.ModuleDict({"reader": Reader("mixd")}))
    makers = build_makers(settings.Settings(), nn.ModuleDict({"reader": Reader("weak", "weak", "strong")}))
    assert list(makers) == [
        "source",
        "mixed",
        "masked",
        "second masked",
        "target",
        "strong target",
        "second strong target",
        "weak",
        "strong",
    ]


@pytest.mark.parametrize(
    ("data", "views"),
    [
        ({"labelled": 3}, ["source", "labelled", "mixed"]),
        ({"labelled": 3, "source": False}, ["labelled", "mixed"]),
        ({"source": False}, []),
    ],
)
def test_views_are_made_of_the_images_that_there_are(data: dict[str, Any], views: list[str]) -> None:
    chosen = presets.load([], {"data": data, "objectives": {"masked": True}})
    made = list(build_makers(chosen, nn.ModuleDict()))
    assert [name for name in made if name in {"source", "labelled", "mixed"}] == views
    if "mixed" not in views:
        with pytest.raises(SettingsError, match=r"reads the view mixed.*data\.source or data\.labelled gives more"):
            build_makers(chosen, build_objectives(chosen.objectives_in_use, OneResolution(), CLASSES))


def test_without_a_source_objectives_read_labelled_target_images() -> None:
    chosen = presets.load(
        [],
        {"data": {"labelled": 3, "source": False}, "objectives": {"anchor_contrast": True, "prototype_contrast": True}},
    )
    built = build_objectives(chosen.objectives_in_use, OneResolution(), CLASSES, truth="labelled")
    assert {name: objective.reads for name, objective in built.items()} == {
        "labelled": (("labelled",),),
        "mixed": (("mixed",),),
        "feature_distance": (("labelled",),),
        "pixel_contrast": (("labelled",), ("mixed",)),
        "anchor_contrast": (("labelled", "mixed"),),
        "prototype_contrast": (("labelled",), ("mixed",)),
    }


def test_a_view_has_one_maker() -> None:
    with pytest.raises(SettingsError, match="makes the view mixed, which exists"):
        build_makers(settings.Settings(), nn.ModuleDict({"reader": Reader("mixed", "mixed")}))
