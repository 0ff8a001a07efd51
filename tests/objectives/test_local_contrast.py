"""Regions of one view against themselves and others in both views."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.jittered import FIRST, SECOND
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.engine.step import training_step
from cluda_cli.errors import SettingsError
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.local_contrast import (
    LocalContrast,
    cut_regions,
    draw_corners,
    draw_rivals,
    place_contrast,
)

ON = {"objectives": {"source": False, "local_contrast": {"region": 2, "projection_channels": 8}}}


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["l01_local_3x3", "l02_local_identical", "l03_local_1x1"])
def test_reference_vectors(case: str, dtype: torch.dtype, golden: Any) -> None:
    """Places are those of the positives, then those of the negatives of each."""
    tensors, description = golden(f"27_local_global/{case}")
    maps = tensors["in.maps_nhwc"].to(dtype).requires_grad_()
    positives, negatives = tensors["in.positive_positions"], tensors["in.negative_positions"]
    corner = torch.cat([positives, negatives.flatten(0, 1)]).expand(len(maps) // 2, -1, -1)
    rival = len(positives) + torch.arange(negatives[..., 0].numel()).view(1, *negatives.shape[:2])
    rival = rival.expand(len(corner), -1, -1)
    inputs, vectors = {"map": maps}, []
    projection = tensors.get("param.projection")
    if projection is not None:
        inputs["projection"] = projection = projection.to(dtype).requires_grad_()
    for view in (maps[0::2], maps[1::2]):
        flat = cut_regions(view.movedim(-1, 1), corner, description["settings"]["region_size"]).flatten(2)
        vectors.append(flat if projection is None else flat @ projection)
    value = place_contrast(*vectors, rival, torch.ones_like(rival, dtype=torch.bool), 0.1)
    value.backward()
    bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
    found = {"loss": value.detach()} | {f"grad_{name}": tensor.grad for name, tensor in inputs.items()}
    for key, actual in found.items():
        if f"out64.{key}" in tensors:
            bound = description["tolerance_demanded"]["bounds"][key][bits]
            assert (actual - tensors[f"out64.{key}"].view(actual.shape)).abs().max() <= bound, key
    if case == "l02_local_identical":
        assert value.item() == pytest.approx(math.log(11), rel=1e-6)


def test_rivals_that_do_not_apply_and_anchors_without_any_take_no_part() -> None:
    one = torch.ones(1, 3, 2)
    rival = torch.tensor([[[1, 2], [0, 2], [0, 1]]])
    against = torch.tensor([[[True, False], [True, True], [False, False]]])
    value = place_contrast(one, one, rival, against, 1.0)
    assert value.item() == pytest.approx((math.log(1 + 2) + math.log(1 + 4)) / 2)
    one.requires_grad_()
    value = place_contrast(one, one, rival, torch.zeros_like(against), 1.0)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, one)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("size", "region", "count", "meshes"),
    [((128, 128), 3, 64, (8, 8)), ((9, 40), 3, 70, (7, 8)), ((4, 12), 3, 64, (2, 8)), ((3, 3), 3, 64, (1, 1))],
)
def test_corners_lie_one_in_each_mesh(size: tuple[int, int], region: int, count: int, meshes: tuple[int, int]) -> None:
    corner = draw_corners(size, region, count, generators(5))
    assert corner.shape == (5, math.prod(meshes), 2) and corner.dtype == torch.int64
    assert corner.min() >= 0 and torch.all(corner + region <= torch.tensor(size))
    places = torch.tensor(size) - region + 1
    mesh = (corner * torch.tensor(meshes) / places + 1e-6).long()
    expected = torch.cartesian_prod(*(torch.arange(number) for number in meshes))
    # A corner is rounded down to a cell, which may begin before its mesh does.
    assert torch.all((mesh == expected) | (mesh == expected - 1))
    if math.prod(meshes) > 1:
        assert not torch.equal(corner[0], corner[1])
    assert torch.equal(corner, draw_corners(size, region, count, generators(5)))


def test_rivals_are_far_enough_and_count() -> None:
    corner = draw_corners((24, 24), 2, 36, generators(3))
    counted = torch.rand(3, 36, generator=generators(1)[0]) < 0.6
    rival, against = draw_rivals(corner, counted, 6, 5, generators(3))
    assert rival.shape == against.shape == (3, 36, 5)
    for image, i, k in against.nonzero().tolist():
        j = int(rival[image, i, k])
        assert counted[image, i] and counted[image, j]
        assert (corner[image, i] - corner[image, j]).abs().max() >= 6
    assert torch.equal(against.any(dim=2), counted)
    few = [row[good].tolist() for row, good in zip(rival.flatten(0, 1), against.flatten(0, 1), strict=True)]
    assert all(len(set(chosen)) == len(chosen) for chosen in few)
    assert len({tuple(chosen) for chosen in few}) > 30  # they are drawn
    assert not draw_rivals(corner, counted, 25, 5, generators(3))[1].any()


def test_regions_are_cut_row_by_row() -> None:
    maps = torch.arange(2 * 3 * 20.0).view(2, 3, 4, 5)
    regions = cut_regions(maps, torch.tensor([[[0, 0]], [[2, 3]]]), 2)
    assert torch.equal(regions[0, 0], maps[0, :, [0, 0, 1, 1], [0, 1, 0, 1]].T)
    assert torch.equal(regions[1, 0], maps[1, :, [2, 2, 3, 3], [3, 4, 3, 4]].T)


def see(name: str, features: Tensor, label: Tensor) -> Seen:
    image = torch.zeros(len(features), 3, *label.shape[1:])
    view = View(name, image, label, *torch.ones(2, *label.shape), seed=torch.arange(len(features)))
    return Seen(Output(features, features, (), image), view)


def test_views_of_equal_features_agree_at_every_place() -> None:
    """Each positive has similarity 1, whatever the features and wherever the regions lie."""
    torch.manual_seed(0)
    method = LocalContrast(settings.LocalContrast(region=2, projection_channels=6, temperature=0.02), 4)
    features, label = torch.randn(2, 4, 16, 16), torch.zeros(2, 32, 32, dtype=torch.int64)
    same = method(see(FIRST, features, label), see(SECOND, features, label))
    shifted = method(see(FIRST, features, label), see(SECOND, features.roll(1, 3), label))
    assert same < 0.5 * shifted


def test_regions_with_an_unlabelled_pixel_in_either_view_have_no_part() -> None:
    torch.manual_seed(0)
    method = LocalContrast(settings.LocalContrast(region=2, projection_channels=6), 4)
    features, label = torch.randn(2, 2, 4, 16, 16), torch.zeros(2, 2, 32, 32, dtype=torch.int64)
    label[0, :, :12], label[1, :, 31] = 255, 255
    value = method(see(FIRST, features[0], label[0]), see(SECOND, features[1], label[1]))
    changed = features.clone()
    changed[:, :, :, :6] += 5
    changed[:, :, :, 15] -= 5
    assert method(see(FIRST, changed[0], label[0]), see(SECOND, changed[1], label[1])) == value
    changed[:, :, :, 8] += 5
    assert method(see(FIRST, changed[0], label[0]), see(SECOND, changed[1], label[1])) != value


@pytest.mark.parametrize(("size", "region"), [((4, 16), 5), ((8, 8), 3), ((3, 8), 3)])
def test_a_map_without_place_for_a_region_and_a_negative_is_refused(size: tuple[int, int], region: int) -> None:
    method = LocalContrast(settings.LocalContrast(region=region), 4)
    features = torch.randn(1, 4, *size)
    with pytest.raises(SettingsError, match=r"local_contrast\.region: the fused feature, \d x \d+ cells, has no two"):
        method.check(Output(features, features, (), features))


def test_a_side_of_three_regions_has_negatives() -> None:
    torch.manual_seed(0)
    method = LocalContrast(settings.LocalContrast(region=2, projection_channels=6), 4)
    features, label = torch.randn(2, 4, 2, 6), torch.zeros(2, 8, 24, dtype=torch.int64)
    seen = see(FIRST, features, label)
    method.check(seen.output)
    assert method(seen, see(SECOND, features, label)) > 0


def test_a_crop_without_negatives_is_refused_before_the_run(start: Any) -> None:
    with pytest.raises(SettingsError, match="far enough apart"):
        start(ON | {"objectives": ON["objectives"] | {"local_contrast": {"region": 8}}})


def test_a_frozen_encoder_stays_while_the_decoder_learns_without_a_teacher(start: Any, monkeypatch: Any) -> None:
    run, stream = start(ON | {"model": {"freeze": ["encoder"]}})
    monkeypatch.setattr(type(run.teacher), "pseudo_labels", lambda *_: pytest.fail("the teacher was asked"))
    before = {name: tensor.clone() for name, tensor in run.student.state_dict().items()}
    result = training_step(run, next(stream))
    assert list(result.terms) == [f"{FIRST}+{SECOND}/local_contrast"] and result.loss > 0
    for name, tensor in run.student.state_dict().items():
        part = "head" if "conv_seg" in name else name.split(".")[0]
        if part != "decoder":
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in run.student.named_parameters() if "decoder" in name)


def test_a_resumed_run_equals_one_that_never_stopped(assert_resume_is_exact: Any) -> None:
    assert_resume_is_exact(ON)
