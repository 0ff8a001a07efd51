"""What every objective keeps to, and which ones the settings build.

The student's outputs are leaves here. Labels are 64 x 64, logits as large, features 8 x 8, the last encoder map 2 x 2.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import View
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives import build_objectives

CLASSES = ClassTable(CITYSCAPES)
READS = [
    ("source", "source"),
    ("mixed", "mixed"),
    ("feature_distance", "source"),
    ("pixel_contrast", "source"),
    ("pixel_contrast", "mixed"),
]
contract = pytest.mark.parametrize(("name", "view_name"), READS)


class Encoder(nn.Module):
    """Block means times a parameter; autocast leaves both alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.scale * F.avg_pool2d(image, stride) for stride in (4, 8, 16, 32))


def objectives(**sections) -> nn.ModuleDict:
    return build_objectives(settings.Objectives(**sections), Encoder(), CLASSES)


def student_output(num_images: int = 2, cells: int = 8) -> Output:
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_images, 19, 64, 64), (num_images, 6, cells, cells), (num_images, 3, 2, 2)]
    logits, features, last = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return Output(logits, features, (last,))


def make_view(name: str) -> View:
    """Vertical bands of car, sky and person; the upper left quarter is ignored."""
    generator = torch.Generator().manual_seed(2)
    label = torch.tensor([13, 10, 11])[torch.arange(64) // 24].expand(2, 64, 64).clone()
    label[1, 32:] = 13
    label[:, :32, :32] = 255
    weight = torch.ones(2, 64, 64) if name == "source" else torch.full((2, 64, 64), 0.5)
    return View(name, torch.randn(2, 3, 64, 64, generator=generator), label, weight)


def gradients(value: Tensor, output: Output) -> list[Tensor]:
    leaves = [output.logits, output.features, output.encoder[-1]]
    return [g for g in torch.autograd.grad(value, leaves, allow_unused=True) if g is not None]


@contract
def test_finite_and_connected(name: str, view_name: str) -> None:
    objective, output = objectives()[name], student_output()
    assert view_name in objective.views
    value = objective(output, make_view(view_name))
    assert value.shape == ()
    assert value > 0
    (gradient,) = gradients(value, output)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@contract
def test_exactly_zero_and_connected_where_nothing_applies(name: str, view_name: str) -> None:
    output, view = student_output(), make_view(view_name)
    value = objectives()[name](output, replace(view, label=torch.full_like(view.label, 255)))
    assert value == 0
    (gradient,) = gradients(value, output)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@contract
def test_ignored_pixels_do_not_matter(name: str, view_name: str) -> None:
    objective, output, view = objectives()[name], student_output(), make_view(view_name)
    changed = student_output()
    with torch.no_grad():
        changed.logits[:, :, :32, :32] += 7 * torch.randn(2, 19, 32, 32)
        changed.features[:, :, :4, :4] += 7
        changed.encoder[-1][:, :, 0, 0] += 7
    assert objective(changed, view) == objective(output, view)
    with torch.no_grad():
        changed.logits[:, 3, 40:, 40:] += 7
        changed.features[:, :3, 4:, 4:] += 7
        changed.encoder[-1][:, :, 1, 0] += 7
    assert objective(changed, view) != objective(output, view)


@pytest.mark.parametrize("name", ["source", "mixed"])
def test_weightless_pixels_do_not_matter(name: str) -> None:
    objective, output, changed, view = objectives()[name], student_output(), student_output(), make_view(name)
    view.weight[:, 50:] = 0
    with torch.no_grad():
        changed.logits[:, 3, 50:] += 7
    assert objective(changed, view) == objective(output, view)


@contract
def test_order_of_images_does_not_matter(name: str, view_name: str) -> None:
    objective, output, view = objectives()[name], student_output(), make_view(view_name)
    flipped = Output(output.logits.flip(0), output.features.flip(0), (output.encoder[-1].flip(0),))
    flipped_view = View(view_name, view.image.flip(0), view.label.flip(0), view.weight.flip(0))
    torch.testing.assert_close(objective(flipped, flipped_view), objective(output, view))


@contract
def test_computed_in_float32_under_autocast(name: str, view_name: str) -> None:
    objective, full, view = objectives()[name], student_output(), make_view(view_name)
    half = Output(full.logits.bfloat16(), full.features.bfloat16(), (full.encoder[-1].bfloat16(),))
    cast = Output(half.logits.float(), half.features.float(), (half.encoder[-1].float(),))
    expected = objective(cast, view)
    with torch.autocast("cpu", torch.bfloat16):
        actual = objective(half, view)
    assert actual.dtype == torch.float32
    assert actual == expected


@contract
def test_no_tensor_is_quadratic_in_pixels(name: str, view_name: str) -> None:
    """Features of 2 x 48 x 48 cells: all pairs of them would be 21 million numbers."""
    output = student_output(cells=48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objectives()[name](output, make_view(view_name)).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 8 * 2**20


def test_today_no_objective_has_state_and_none_saves_its_frozen_network() -> None:
    """An objective that gets buffers of its own has to change this test to a round trip of theirs."""
    built = objectives()
    assert not built.state_dict()
    assert not list(built.parameters())


def test_settings_choose_the_objectives() -> None:
    assert list(objectives()) == ["source", "mixed", "feature_distance", "pixel_contrast"]
    assert list(objectives(mixed=False, feature_distance=False, pixel_contrast=False)) == ["source"]
    assert objectives(pixel_contrast={"weight": 0.3, "start": 7})["pixel_contrast"].settings.start == 7


def test_contrast_reads_mixed_views_only_if_something_makes_them() -> None:
    assert objectives()["pixel_contrast"].views == {"source", "mixed"}
    assert objectives(mixed=False)["pixel_contrast"].views == {"source"}
