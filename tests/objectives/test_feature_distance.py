"""The distance to the pretrained encoder, on cells of things only; the frozen copy stays out of the way."""

import pytest
import torch
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.errors import SettingsError
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.feature_distance import FeatureDistance, downscale_label, masked_distance

CLASSES = ClassTable(CITYSCAPES)
PERSON, SKY = CLASSES.names.index("person"), CLASSES.names.index("sky")


class Encoder(nn.Module):
    """One strided convolution with dropout and batch norm, which would betray a copy in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 8, stride=8)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.dropout(self.norm(self.convolution(image)), 0.5, self.training),)


def source_view(label: int | Tensor = PERSON) -> View:
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 16, 24), label) if isinstance(label, int) else label
    return View("source", image, labels, *torch.ones(2, 2, 16, 24))


def output_of(features: Tensor, image: Tensor | None = None) -> Output:
    image = source_view().image if image is None else image
    return Output(torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6), (features,), image)


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
    assert masked_distance((0.3 * n).sin(), (0.2 * n).cos(), mask).item() == pytest.approx(1.4417871035, abs=1e-10)


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
    value = masked_distance(features, tensors["in.f2"].to(dtype), mask)
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
