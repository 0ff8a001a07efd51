"""The distance to the pretrained encoder, on cells of things only; the frozen copy stays out of the way."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.data.batch import Crops
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.errors import SettingsError
from cluda_cli.models.normalisation import IMAGENET, Normalisation
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.feature_distance import (
    FeatureDistance,
    downscale_label,
    find_nearest,
    make_paired,
    masked_mean,
    measure_cells,
)

CLASSES = ClassTable(CITYSCAPES)
HALF = Normalisation((127.5,) * 3, (63.75,) * 3)
PERSON, SKY = CLASSES.names.index("person"), CLASSES.names.index("sky")


class Encoder(nn.Module):
    """One strided convolution with dropout and batch norm, which would betray a copy in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 8, stride=8)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.dropout(self.norm(self.convolution(image)), 0.5, self.training),) * 4


def source_view(label: int | Tensor = PERSON) -> View:
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 16, 24), label) if isinstance(label, int) else label
    return View("source", image, labels, *torch.ones(2, 2, 16, 24))


def output_of(features: Tensor, image: Tensor | None = None) -> Output:
    image = source_view().image if image is None else image
    return Output(torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6), (features,) * 4, image)


def specified_labels() -> Tensor:
    h, w = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    first = (h // 3 + w // 5) % 20
    label = torch.stack([first, (first + 7) % 20])
    return label.masked_fill(label == 19, 255)


def test_values_of_the_specification() -> None:
    cells = downscale_label(specified_labels(), (4, 6), 0.75, 19)
    none = 255
    assert cells[0].tolist() == [
        [0, none, none, none, 3, 4], [none] * 6, [3, none, none, none, 6, 7], [4, none, none, none, 7, 8],
    ]  # fmt: skip
    assert torch.equal(cells[1], torch.where(cells[0] == none, none, cells[0] + 7))
    mask = torch.isin(cells, torch.tensor(CLASSES.things()))
    assert mask.sum() == 10
    n = torch.arange(2 * 3 * 4 * 6).double().view(2, 3, 4, 6)
    assert masked_mean(measure_cells((0.3 * n).sin(), (0.2 * n).cos(), "euclidean"), mask).item() == pytest.approx(
        1.4417871035, abs=1e-10
    )


@pytest.mark.reference
def test_downscaled_labels_of_the_reference(golden) -> None:
    tensors, description = golden("07_labels_fdist/downscale_label_ratio")
    for case in description["settings"]["cases"]:
        scale, ratio = case["scale"], case["min_ratio"]
        label = tensors[f"in.{case['input']}"][:, 0].long()
        size = label.shape[-2] // scale, label.shape[-1] // scale
        cells = downscale_label(label[:, : size[0] * scale, : size[1] * scale], size, ratio, 19)
        expected = tensors[f"out.{case['input']}.s{scale}.r{ratio}"][:, 0]
        assert torch.equal(cells, expected.long()), case


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["masked", "unmasked"])
def test_distance_of_the_reference(case: str, dtype: torch.dtype, golden) -> None:
    tensors, description = golden("07_labels_fdist/masked_feature_distance")
    bounds = description["tolerance_demanded"]["bounds"]
    features = tensors["in.f1"].to(dtype).requires_grad_()
    mask = tensors["in.mask"][:, 0] if case == "masked" else torch.ones(2, 8, 12, dtype=torch.bool)
    value = masked_mean(measure_cells(features, tensors["in.f2"].to(dtype), "euclidean"), mask)
    value.backward()
    bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
    for key, actual in {f"{case}.loss": value, f"{case}.grad_f1": features.grad}.items():
        expected = tensors[f"out64.{key}"].view(actual.shape)
        assert (actual.detach() - expected).abs().max() <= bounds[key][bits]


def test_labels_that_are_no_multiple_of_the_grid() -> None:
    label = torch.zeros(1, 35, 50, dtype=torch.long)
    assert torch.equal(downscale_label(label, (2, 3), 0.75, 19), torch.zeros(1, 2, 3, dtype=torch.long))


def test_is_zero_only_for_the_pretrained_features() -> None:
    encoder = Encoder()
    objective = FeatureDistance(settings.FeatureDistance(), encoder, CLASSES)
    features = encoder.eval()(source_view().image)[-1].detach()
    assert objective(Seen(output_of(features), source_view())) == 0
    torch.testing.assert_close(objective(Seen(output_of(features + 2), source_view())), torch.tensor(2 * 5**0.5))


def test_acts_on_the_named_classes_or_on_all_things() -> None:
    features = torch.zeros(2, 5, 2, 3, requires_grad=True)
    for names, acts_on in ((None, {PERSON}), (("sky",), {SKY}), (("sky", "person"), {SKY, PERSON})):
        objective = FeatureDistance(settings.FeatureDistance(classes=names), Encoder(), CLASSES)
        for train_id in (SKY, PERSON, 255):
            value = objective(Seen(output_of(features), source_view(train_id)))
            assert (value > 0) == (train_id in acts_on)
            assert value.requires_grad


def test_the_frozen_copy_is_no_part_of_the_objective() -> None:
    objective = FeatureDistance(settings.FeatureDistance(), Encoder(), CLASSES)
    assert not list(objective.parameters())
    assert not objective.state_dict()


def test_the_frozen_copy_does_not_follow_the_student() -> None:
    encoder = Encoder()
    objective = FeatureDistance(settings.FeatureDistance(), encoder, CLASSES)
    before = objective(Seen(output_of(torch.zeros(2, 5, 2, 3)), source_view()))
    with torch.no_grad():
        encoder.convolution.weight.add_(1)
    assert objective(Seen(output_of(torch.zeros(2, 5, 2, 3)), source_view())) == before


def test_the_frozen_copy_stays_in_evaluation_mode() -> None:
    objective = nn.ModuleDict({"it": FeatureDistance(settings.FeatureDistance(), Encoder(), CLASSES)})
    seen = Seen(output_of(torch.zeros(2, 5, 2, 3)), source_view())
    values = [objective.train(mode)["it"](seen) for mode in (True, False)]
    assert values[0] == values[1]


def test_the_frozen_copy_moves_with_the_objective() -> None:
    """Seen by the type of its numbers, because moving to a device and changing type are one mechanism."""
    objective = nn.ModuleDict({"it": FeatureDistance(settings.FeatureDistance(), Encoder(), CLASSES)}).double()
    output = output_of(torch.zeros(2, 5, 2, 3), source_view().image.double())
    assert objective["it"](Seen(output, source_view())) > 0


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        (("persom",), CLASSES, "did you mean person"),
        (("zebra",), CLASSES, "known: road"),
        ((), CLASSES, "objectives.feature_distance=false"),
        (None, ClassTable(CITYSCAPES[:3]), "objectives.feature_distance=false"),
    ],
)
def test_wrong_classes_are_explained(names: tuple[str, ...] | None, table: ClassTable, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FeatureDistance(settings.FeatureDistance(classes=names), Encoder(), table)


NORMS = {"l2": "euclidean", "l2sq": "squared", "cos": "cosine"}  # of the vectors, and ours


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["f01_norms", "f02_identical", "f03_constant_offset", "f04_empty_mask"])
def test_distances_of_the_specification(case: str, dtype: torch.dtype, golden) -> None:
    tensors, description = golden(f"28_feature_regression/{case}")
    things = torch.isin(tensors["in.labels"].long(), torch.tensor([6, 7, *range(11, 19)]))
    for name, section in description["settings"].items():
        features = tensors["in.features"].to(dtype).requires_grad_()
        distance = measure_cells(features, tensors["in.reference_features"].to(dtype), NORMS[section["norm"]])
        mask = things if section["class_mask"] else torch.ones_like(things)
        value = section["weight"] * masked_mean(distance, mask)
        value.backward()
        bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
        for key, actual in {f"{name}.loss": value, f"{name}.grad": features.grad}.items():
            difference = (actual.detach() - tensors[f"out64.{key}"].view(actual.shape)).abs().max()
            assert difference <= description["tolerance_demanded"]["bounds"][key][bits], key


def test_default_is_the_distance_of_daformer_to_the_last_bit() -> None:
    """Written as it was before there were other forms."""
    encoder = Encoder()
    objective = FeatureDistance(settings.FeatureDistance(), encoder, CLASSES)
    features, view = torch.randn(2, 5, 2, 3), source_view(specified_labels())
    with torch.no_grad():
        pretrained = encoder.eval()(view.image)[-1]
    mask = torch.isin(downscale_label(view.label, (2, 3), 0.1, 19), torch.tensor(CLASSES.things()))
    distance = torch.linalg.vector_norm(features - pretrained, dim=1)
    expected = torch.where(mask, distance, 0).sum() / mask.sum().clamp_min(1)
    objective.settings = settings.FeatureDistance(min_share=0.1)
    assert objective(Seen(output_of(features), view)) == expected > 0


def test_cosine_and_smooth_l1_are_those_of_vfm_uda() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    found = measure_cells(one[None, :, None, None], other[None, :, None, None], "cosine_and_smooth_l1", 0.9)
    assert found.item() == pytest.approx(0.9 * (1 - 0.6) + 0.1 * (0 + 3.5) / 2)


def test_a_search_forgives_a_shift_inside_the_map() -> None:
    target = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    features = target.roll((1, -1), (2, 3)).requires_grad_()
    plain = measure_cells(features, target, "squared")
    found = measure_cells(features, find_nearest(features, target, 1, "squared"), "squared")
    assert not found[:, 1:, :-1].any() and plain[:, 1:, :-1].all()
    assert (found <= plain).all() and found[:, 0].all()  # what came in from the other side is nowhere near
    torch.testing.assert_close(find_nearest(features, target, 5, "squared"), features.detach())
    wide = torch.zeros(1, 4, 5, 6)  # padding would be the nearest of all
    assert torch.equal(find_nearest(wide, target, 0, "squared"), target)
    assert measure_cells(wide, find_nearest(wide, target, 2, "squared"), "squared").min() > 0


class Wide(Encoder):
    """A frozen encoder with other channels, a coarser map and another normalisation."""

    channels, pad_multiple, normalisation = (7, 7, 7, 7), 16, HALF

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 7, 16, stride=16), nn.BatchNorm2d(7)
        self.seen = Tensor()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        self.seen = image
        return super().forward(image)


VFM = {"views": ("source", "target"), "distance": "cosine_and_smooth_l1", "classes": "all", "head": True}


def build_wide(**section: Any) -> FeatureDistance:
    torch.manual_seed(0)
    student = Encoder()
    student.normalisation = IMAGENET
    chosen = settings.FeatureDistance(**VFM | section)
    return FeatureDistance(chosen, student, CLASSES, network=Wide(), channels=(5, 5, 5, 5, 6))  # type: ignore[arg-type]


def test_a_larger_network_is_met_through_a_head_on_its_own_grid() -> None:
    objective = build_wide(features=("third", "last"))
    assert objective.reads == (("source",), ("target",))
    assert [tuple(head[3].weight.shape[:2]) for head in objective.heads] == [(7, 20)] * 2
    features = torch.randn(2, 5, 2, 3, requires_grad=True)
    view = source_view(torch.full((2, 16, 24), SKY))
    value = objective(Seen(output_of(features), view))
    value.backward()
    assert features.grad.any() and all(p.grad.any() for p in objective.heads.parameters())
    seen = objective.pretrained.network.seen
    assert seen.shape == (2, 3, 16, 32)
    expected = nn.functional.interpolate((255 * IMAGENET.invert(view.image) - 127.5) / 63.75, (16, 32), mode="bilinear")
    torch.testing.assert_close(seen, expected)


def test_all_classes_are_all_labelled_valid_pixels() -> None:
    objective = build_wide()
    view = replace(source_view(torch.full((2, 16, 24), 255)), name="target")
    features = torch.randn(2, 5, 2, 3)
    assert objective(Seen(output_of(features), view)) == 0
    labelled = replace(view, label=torch.full_like(view.label, SKY))
    value = objective(Seen(output_of(features), labelled))
    assert value > 0
    half = replace(labelled, probability=torch.zeros_like(view.probability))
    assert objective(Seen(output_of(features), half)) == 0
    unsure = replace(labelled, weight=torch.zeros_like(view.weight))  # the share of sure pixels says nothing here
    assert objective(Seen(output_of(features), unsure)) == value


def test_a_paired_picture_is_what_the_frozen_network_sees() -> None:
    objective = build_wide(views=("paired",), classes=("sky",))
    assert list(objective.makers()) == ["paired"] and not build_wide().makers()
    guide = torch.rand(2, 3, 16, 24)
    domain = source_view(torch.full((2, 16, 24), SKY))
    inside = torch.ones(2, 16, 24, dtype=torch.bool)
    inside[0] = False
    batch = {"reference": Crops(guide, inside)}
    scene = SimpleNamespace(
        view=lambda name, shown: replace(shown, name=name), target=domain, reference=guide, batch=batch
    )
    view = make_paired(scene)  # type: ignore[arg-type]
    assert view.name == "paired" and view.guide is guide
    assert (view.label[0] == 255).all() and (view.label[1] == SKY).all()
    small = nn.functional.interpolate(view.image, (8, 12))  # a student of two resolutions encodes a smaller image
    objective(Seen(output_of(torch.randn(2, 5, 2, 3), small), view))
    expected = nn.functional.interpolate(guide, (8, 12), mode="bilinear")
    expected = nn.functional.interpolate((255 * IMAGENET.invert(expected) - 127.5) / 63.75, (16, 16), mode="bilinear")
    torch.testing.assert_close(objective.pretrained.network.seen, expected)


def test_networks_that_do_not_fit_are_explained() -> None:
    with pytest.raises(SettingsError, match="the last map has 5 channels in the student and 7 .*head=true"):
        build_wide(head=False)
    with pytest.raises(SettingsError, match="only the network of a run has a fused feature"):
        build_wide(features=("fused",))
