"""The objective around the contrast: one grid, one order, and the numbers of the specification."""

import pytest
import torch

from cluda_cli import settings
from cluda_cli.adaptation.views import View
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.contrast_kernel import contrast
from cluda_cli.objectives.pixel_contrast import PixelContrast, to_rows


def formula_inputs(num_images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features B 4 3 5, labels B 3 5 and weights B 3 5 given by formulas."""
    b, c, h, w = torch.meshgrid(
        torch.arange(num_images), torch.arange(4), torch.arange(3), torch.arange(5), indexing="ij"
    )
    b, c, h, w = (axis.double() for axis in (b, c, h, w))
    features = torch.sin(0.7 * c + 1.3 * h + 0.4 * w + 2.1 * b + 0.2)
    b, h, w = b[:, 0], h[:, 0], w[:, 0]
    label = torch.tensor([0, 6, 10, 255])[(2 * h + w + 3 * b).long() % 4]
    weight = torch.where(w % 2 == 0, 1 / (1 + h), torch.tensor(0.8).double())  # 0.8 as float32 has it
    return features, label, weight


@pytest.mark.parametrize(
    ("num_images", "weighted", "temperature", "expected"),
    [
        (1, False, 1.0, 2.61162667),
        (1, True, 1.0, 1.11835704),
        (2, False, 1.0, 3.08919641),
        (2, True, 1.0, 1.42359241),
        (1, False, 0.1, 10.96159366),
        (2, False, 0.1, 11.29461555),
    ],
)
def test_values_of_the_specification(num_images: int, weighted: bool, temperature: float, expected: float) -> None:
    features, label, weight = formula_inputs(num_images)
    weight = weight if weighted else torch.ones_like(weight)
    value = contrast(*to_rows(features, label, weight, size=65), temperature)
    assert value.item() == pytest.approx(expected, abs=6e-9)

    section = settings.PixelContrast(temperature=temperature)
    view = View("mixed", torch.zeros(num_images, 3, 3, 5), label, weight.float())
    output = Output(torch.zeros(num_images, 1, 3, 5), features.float(), ())
    assert PixelContrast(section, frozenset({"mixed"}))(output, view).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("num_images", "weighted", "expected"),
    [(1, False, 2.94864732), (1, True, 1.39050857), (2, False, 3.49832171), (2, True, 1.61943589)],
)
def test_values_of_the_specification_with_ignored_pixels_as_one_more_class(num_images, weighted, expected) -> None:
    features, label, weight = formula_inputs(num_images)
    weight = weight if weighted else torch.ones_like(weight)
    value = contrast(*to_rows(features, label.where(label != 255, 100), weight, size=65), temperature=1.0)
    assert value.item() == pytest.approx(expected, abs=6e-9)


def test_rows_labels_and_weights_stay_together() -> None:
    """Every cell carries its own number in all three; a difference in flattening order would tear them apart."""
    number = torch.arange(24).view(2, 3, 4)
    features = torch.stack([number, number], dim=1).double()
    rows, label, weight = to_rows(features, number, number.double(), size=65)
    assert torch.equal(rows[:, 0], label.double())
    assert torch.equal(weight, label.double())


@pytest.mark.parametrize(("shape", "grid"), [((80, 70), (65, 65)), ((20, 70), (20, 65)), ((20, 30), (20, 30))])
def test_the_grid_is_never_finer_than_the_features(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    label = torch.zeros(1, 160, 140, dtype=torch.long)
    rows, label, weight = to_rows(torch.rand(1, 2, *shape), label, torch.ones(label.shape), size=65)
    assert rows.shape == (grid[0] * grid[1], 2)
    assert label.shape == weight.shape == (grid[0] * grid[1],)


@pytest.mark.reference
def test_resizing_of_the_reference(golden) -> None:
    tensors, description = golden("02_cluda_multires/p01_resize_17")
    bounds = description["tolerance_demanded"]["bounds"]
    rows, label, weight = to_rows(
        tensors["in.lr_feats"].double(), tensors["in.gt"][:, 0], tensors["in.pseudo_weight"].double(), size=17
    )
    features = rows.view(2, 17, 17, -1).permute(0, 3, 1, 2)
    assert (features - tensors["out64.lr_feats"]).abs().max() <= bounds["lr_feats"]["float64_max_abs"]
    assert torch.equal(label.view(2, 1, 17, 17), tensors["out.labels"])
    assert (weight.view(2, 1, 17, 17) - tensors["out64.pseudo_weight"]).abs().max() <= 1e-10


def test_similar_features_of_a_class_cost_less() -> None:
    label = torch.tensor([[[0, 0, 1, 1]]])
    view = View("source", torch.zeros(1, 3, 1, 4), label, torch.ones(1, 1, 4))
    objective = PixelContrast(settings.PixelContrast(), frozenset({"source"}))
    together = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 1, 4)
    apart = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]).view(1, 2, 1, 4)
    good, bad = (objective(Output(torch.zeros(1, 1, 1, 4), features, ()), view) for features in (together, apart))
    assert good < bad
