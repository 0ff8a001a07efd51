"""What every objective keeps to, for networks of one and of two resolutions, and which ones the settings build.

The student's outputs are leaves here. With one resolution, and with two: labels are 64 and 128 pixels wide, logits as
large. The encoder sees 64 pixels; its last map is 2 cells wide, features 8. Detail is 64 pixels wide, its logits as
large, its features 8 cells.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import View
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.multires import MultiResolution
from cluda_cli.models.segmenter import Detail, Output
from cluda_cli.objectives import build_objectives

CLASSES = ClassTable(CITYSCAPES)
READS = [
    ("source", "source"),
    ("mixed", "mixed"),
    ("masked", "masked"),
    ("feature_distance", "source"),
    ("pixel_contrast", "source"),
    ("pixel_contrast", "mixed"),
]
contract = pytest.mark.parametrize(
    ("name", "view_name", "resolutions"),
    [pytest.param(*reads, n, id="-".join(reads) + f"-{n}") for n in (1, 2) for reads in READS],
)
CORNERS = ((32, 48), (48, 16))  # of the detail of the two images: some of it is ignored, some is not
DETAIL, CELL = 64, 8


class Encoder(nn.Module):
    """Block means times a parameter; autocast leaves both alone."""

    channels = (3, 3, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.scale * F.avg_pool2d(image, stride) for stride in (4, 8, 16, 32))


class TwoResolutions(MultiResolution):
    """As much of such a network as objectives ask for when they are built."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.encoder = Encoder()


def objectives(resolutions: int = 1, **sections) -> nn.ModuleDict:
    """All of them, unless switched off; in evaluation mode, because the head of the contrast has dropout."""
    student = SimpleNamespace(encoder=Encoder()) if resolutions == 1 else TwoResolutions()
    return build_objectives(settings.Objectives(**{"masked": {}} | sections), student, CLASSES).eval()


def student_output(resolutions: int = 1, cells: int = CELL) -> Output:
    generator = torch.Generator().manual_seed(1)

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
    weight = torch.ones(2, side, side) if name == "source" else torch.full((2, side, side), 0.5)
    return View(name, torch.randn(2, 3, side, side, generator=generator), label, weight)


def gradients(value: Tensor, output: Output) -> dict[str, Tensor]:
    """By the name of the leaf, those that there are."""
    leaves = {"logits": output.logits, "features": output.features}
    leaves |= {f"map {i}": features for i, features in enumerate(output.encoder)}
    if output.detail is not None:
        leaves |= {"detail logits": output.detail.logits, "detail features": output.detail.features}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def what_it_reads(name: str, resolutions: int) -> set[str]:
    if name == "feature_distance":
        return {"map 3"}
    if name == "pixel_contrast":
        return {"features"} if resolutions == 1 else {"features", "detail features", *(f"map {i}" for i in range(4))}
    return {"logits"} if resolutions == 1 else {"logits", "detail logits"}


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


@contract
def test_finite_and_connected(name: str, view_name: str, resolutions: int) -> None:
    objective, output = objectives(resolutions)[name], student_output(resolutions)
    assert view_name in objective.views
    value = objective(output, make_view(view_name, resolutions))
    assert value.shape == ()
    assert value > 0
    found = gradients(value, output)
    assert found.keys() == what_it_reads(name, resolutions)
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in found.values())


@contract
def test_exactly_zero_and_connected_where_nothing_applies(name: str, view_name: str, resolutions: int) -> None:
    output, view = student_output(resolutions), make_view(view_name, resolutions)
    value = objectives(resolutions)[name](output, replace(view, label=torch.full_like(view.label, 255)))
    assert value == 0
    found = gradients(value, output)
    assert found.keys() == what_it_reads(name, resolutions)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


@contract
def test_ignored_pixels_do_not_matter(name: str, view_name: str, resolutions: int) -> None:
    """Features of the context are resized to the detail's cells, so that those of a border belong to both sides."""
    objective, output, view = (
        objectives(resolutions)[name],
        student_output(resolutions),
        make_view(view_name, resolutions),
    )
    changed = student_output(resolutions)
    half, clear = 32 * resolutions, CELL // 2 if resolutions == 1 else CELL // 2 - 1
    with torch.no_grad():
        changed.logits[:, :, :half, :half] += 7 * torch.randn(2, 19, half, half)
        changed.features[:, :, :clear, :clear] += 7
        if name == "feature_distance":  # the head of the contrast sees the maps as a whole
            changed.encoder[-1][:, :, 0, 0] += 7
        for i, (top, left) in enumerate(CORNERS if changed.detail else ()):
            rows, columns = half - top, half - left
            changed.detail.logits[i, :, :rows, :columns] += 7 * torch.randn(19, rows, columns)
            changed.detail.features[i, :, : rows // CELL, : columns // CELL] += 7
    assert objective(changed, view) == objective(output, view)
    with torch.no_grad():
        changed.logits[:, 3, half + 8 :, half + 8 :] += 7
        changed.features[:, :3, 4:, 4:] += 7
        changed.encoder[-1][:, :, 1, 0] += 7
    assert objective(changed, view) != objective(output, view)


@pytest.mark.parametrize("name", ["source", "mixed", "masked", "pixel_contrast"])
def test_labelled_pixels_of_the_detail_matter(name: str) -> None:
    objective, output, view = objectives(2)[name], student_output(2), make_view("source", 2)
    changed = student_output(2)
    with torch.no_grad():
        changed.detail.logits[:, 3, -8:, -8:] += 7
        changed.detail.features[:, :3, -1:, -1:] += 7
    assert objective(changed, view) != objective(output, view)


@pytest.mark.parametrize("resolutions", [1, 2])
@pytest.mark.parametrize("name", ["source", "mixed", "masked"])
def test_weightless_pixels_do_not_matter(name: str, resolutions: int) -> None:
    objective, view = objectives(resolutions)[name], make_view(name, resolutions)
    output, changed = student_output(resolutions), student_output(resolutions)
    view.weight[:, 50:] = 0
    with torch.no_grad():
        changed.logits[:, 3, 50:] += 7
        for i, (top, _) in enumerate(CORNERS if changed.detail else ()):
            changed.detail.logits[i, 3, 50 - top :] += 7
    assert objective(changed, view) == objective(output, view)


@contract
def test_order_of_images_does_not_matter(name: str, view_name: str, resolutions: int) -> None:
    objective, output, view = (
        objectives(resolutions)[name],
        student_output(resolutions),
        make_view(view_name, resolutions),
    )
    flipped_view = View(view_name, view.image.flip(0), view.label.flip(0), view.weight.flip(0))
    torch.testing.assert_close(objective(flipped(output), flipped_view), objective(output, view))


@contract
def test_computed_in_float32_under_autocast(name: str, view_name: str, resolutions: int) -> None:
    objective, view = objectives(resolutions)[name], make_view(view_name, resolutions)
    half = cast(student_output(resolutions), torch.bfloat16)
    expected = objective(cast(half, torch.float32), view)
    with torch.autocast("cpu", torch.bfloat16):
        actual = objective(half, view)
    assert actual.dtype == torch.float32
    assert actual == expected


@contract
def test_no_tensor_is_quadratic_in_pixels(name: str, view_name: str, resolutions: int) -> None:
    """The contrast has 2 x 48 x 48 cells of a feature map or of a finer one: all pairs would be 21 million numbers."""
    output = student_output(resolutions, cells=48 if resolutions == 1 else 32)
    objective = objectives(resolutions, pixel_contrast={"size": 48})[name]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objective(output, make_view(view_name, resolutions)).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 8 * 2**20


def test_with_one_resolution_no_objective_has_state_and_none_saves_its_frozen_network() -> None:
    """An objective that gets buffers of its own has to change this test to a round trip of theirs."""
    built = objectives()
    assert not built.state_dict()
    assert not list(built.parameters())


def test_with_two_resolutions_the_state_is_the_head_of_the_contrast() -> None:
    one, other = objectives(2), objectives(2)
    assert one.state_dict()
    assert all(name.startswith("pixel_contrast.weighter.") for name in one.state_dict())
    output, view = student_output(2), make_view("source", 2)
    assert one["pixel_contrast"](output, view) != other["pixel_contrast"](output, view)
    other.load_state_dict(one.state_dict())
    assert one["pixel_contrast"](output, view) == other["pixel_contrast"](output, view)
    one["pixel_contrast"](output, view).backward()
    assert all(p.grad is not None and p.grad.any() for p in one.parameters())


def test_settings_choose_the_objectives() -> None:
    assert list(objectives()) == ["source", "mixed", "masked", "feature_distance", "pixel_contrast"]
    assert list(objectives(mixed=False, masked=False, feature_distance=False, pixel_contrast=False)) == ["source"]
    assert "masked" not in build_objectives(settings.Objectives(), SimpleNamespace(encoder=Encoder()), CLASSES)
    assert objectives(pixel_contrast={"weight": 0.3, "start": 7})["pixel_contrast"].settings.start == 7


def test_contrast_reads_mixed_views_only_if_something_makes_them() -> None:
    assert objectives()["pixel_contrast"].views == {"source", "mixed"}
    assert objectives(mixed=False)["pixel_contrast"].views == {"source"}
