"""The objective around the contrast: one grid, one order, one gate, and the numbers of the specification."""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
import torch

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.segmenter import Detail, Output
from cluda_cli.objectives.contrast.kernel import multires_contrast, tiled_contrast
from cluda_cli.objectives.pixel_contrast import PixelContrast, to_multires_rows, to_rows


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
    value = tiled_contrast(*to_rows(features, label, weight, size=65), temperature)
    assert value.item() == pytest.approx(expected, abs=6e-9)

    section = settings.PixelContrast(temperature=temperature)
    view = View("mixed", torch.zeros(num_images, 3, 3, 5), label, weight.float(), weight.float())
    output = Output(torch.zeros(num_images, 1, 3, 5), features.float(), (), view.image)
    assert PixelContrast(section, ("mixed",))(Seen(output, view)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("num_images", "weighted", "expected"),
    [(1, False, 2.94864732), (1, True, 1.39050857), (2, False, 3.49832171), (2, True, 1.61943589)],
)
def test_values_of_the_specification_with_ignored_pixels_as_one_more_class(num_images, weighted, expected) -> None:
    features, label, weight = formula_inputs(num_images)
    weight = weight if weighted else torch.ones_like(weight)
    value = tiled_contrast(*to_rows(features, label.where(label != 255, 100), weight, size=65), temperature=1.0)
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
    """Its features and weights of the context are at the resolution of the detail already; its mask is another."""
    tensors, description = golden("02_cluda_multires/p01_resize_17")
    bounds = description["tolerance_demanded"]["bounds"]
    top, bottom, left, right = description["settings"]["crop_box_yyxx"]
    boxes = Boxes(torch.tensor([[top, left]]).expand(2, 2), (bottom - top, right - left))
    context, detail, mix = (tensors[f"in.{name}"].double() for name in ("lr_feats", "hr_feats", "att"))
    detail = detail[:, :, top // 4 : bottom // 4, left // 4 : right // 4]
    label, weight = tensors["in.gt"][:, 0], tensors["in.pseudo_weight"].double()
    rows = to_multires_rows(context, detail, boxes, mix, label, weight, size=17)
    names = ("lr_feats", "hr_feats", "inside", "att", "labels", "pseudo_weight")
    actual = {name: map_.view(2, 17, 17, -1).permute(0, 3, 1, 2) for name, map_ in zip(names, rows, strict=True)}
    for name in ("lr_feats", "hr_feats", "att", "pseudo_weight"):
        assert (actual[name] - tensors[f"out64.{name}"]).abs().max() <= bounds[name]["float64_max_abs"]
    assert torch.equal(actual["labels"], tensors["out.labels"])
    single = to_rows(context, label, weight, size=17)
    assert all(torch.equal(a, b) for a, b in zip(single, (rows[0], rows[4], rows[5]), strict=True))


def test_similar_features_of_a_class_cost_less() -> None:
    label = torch.tensor([[[0, 0, 1, 1]]])
    view = View("source", torch.zeros(1, 3, 1, 4), label, *torch.ones(2, 1, 1, 4))
    objective = PixelContrast(settings.PixelContrast(), ("source",))
    together = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 1, 4)
    apart = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]).view(1, 2, 1, 4)
    good, bad = (
        objective(Seen(Output(torch.zeros(1, 1, 1, 4), features, (), view.image), view))
        for features in (together, apart)
    )
    assert good < bad


# Two resolutions: images 64 x 64, context features at stride 8, detail features of crops 32 x 32 at stride 4.
BOXES = Boxes(torch.tensor([[8, 16], [32, 0]]), (32, 32))
CHANNELS = (3, 4, 5, 6)
SECTION = settings.PixelContrast(weighter_dim=5, size=11, temperature=0.2)


def two_resolutions() -> tuple[PixelContrast, Output, View]:
    """The objective, and an output whose features are leaves."""
    generator = torch.Generator().manual_seed(4)
    context, detail = (torch.randn(2, 7, 8, 8, generator=generator).requires_grad_() for _ in range(2))
    encoder = tuple(
        torch.randn(2, channels, side, side, generator=generator)
        for channels, side in zip(CHANNELS, (8, 4, 2, 1), strict=True)
    )
    label = torch.randint(4, (2, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    label[label == 3] = 255
    view = View("mixed", torch.zeros(2, 3, 64, 64), label, *torch.rand(2, 2, 64, 64, generator=generator))
    logits = torch.zeros(2, 3, 16, 16)
    output = Output(logits, context, encoder, torch.zeros(2, 3, 32, 32), Detail(BOXES, logits[..., :8, :8], detail))
    torch.manual_seed(0)
    return PixelContrast(SECTION, ("mixed",), CHANNELS), output, view


def half_of_one_resolution(output: Output, view: View) -> torch.Tensor:
    """The contrast of the context alone, at the resolution of the detail."""
    fine = torch.nn.functional.interpolate(output.features, (16, 16), mode="bilinear", align_corners=True)
    return tiled_contrast(*to_rows(fine, view.label, view.weight, SECTION.size), SECTION.temperature) / 2


def test_everything_that_takes_part_learns() -> None:
    objective, output, view = two_resolutions()
    encoder = [maps.requires_grad_() for maps in output.encoder]
    objective(Seen(output, view)).backward()
    learns = {"features": output.features, "detail": output.detail.features, **dict(objective.named_parameters())}
    learns |= {f"encoder {i}": maps for i, maps in enumerate(encoder)}
    assert "weighter.conv_seg.weight" in learns
    # What a batch norm follows learns nothing from a constant: the biases in front of it.
    unmoved = {name for name, tensor in learns.items() if tensor.grad is None or tensor.grad.abs().max() < 1e-9}
    assert unmoved <= {f"weighter.embed_layers.{i}.proj.bias" for i in range(4)}


@pytest.mark.parametrize(("bias", "matters"), [(-200.0, False), (0.0, True)])
def test_without_weight_on_detail_the_context_remains(bias: float, matters: bool) -> None:
    objective, output, view = two_resolutions()
    torch.nn.init.zeros_(objective.weighter.conv_seg.weight)
    torch.nn.init.constant_(objective.weighter.conv_seg.bias, bias)
    difference = objective(Seen(output, view)) - half_of_one_resolution(output, view)
    assert (difference.abs() > 1e-4) == matters


def test_a_forward_without_detail_is_contrasted_as_one_resolution() -> None:
    objective, output, view = two_resolutions()
    single = PixelContrast(SECTION, ("mixed",))
    assert not single.state_dict()
    alone = replace(output, detail=None)
    assert objective(Seen(alone, view)) == single(Seen(alone, view)) == single(Seen(output, view))


def test_images_keep_their_own_boxes_and_their_order_does_not_matter() -> None:
    objective, output, view = two_resolutions()
    objective.eval()  # batch statistics would be summed in another order, and dropout differs by image
    flip = torch.tensor([1, 0])
    detail = Detail(Boxes(BOXES.corner[flip], BOXES.size), output.detail.logits, output.detail.features[flip])
    flipped = Output(output.logits, output.features[flip], tuple(maps[flip] for maps in output.encoder), output.image)
    flipped_view = replace(view, label=view.label[flip], weight=view.weight[flip])
    expected = objective(Seen(output, view))
    torch.testing.assert_close(objective(Seen(replace(flipped, detail=detail), flipped_view)), expected)
    wrong = replace(detail, boxes=BOXES)
    assert (objective(Seen(replace(flipped, detail=wrong), flipped_view)) - expected).abs() > 1e-4


def test_learned_weights_outside_the_box_have_no_influence() -> None:
    """A cell of the mix is 8 pixels; interpolation carries it no further than two cells beyond its own."""
    _, output, view = two_resolutions()
    mix = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    rows = to_multires_rows(output.features, output.detail.features, BOXES, mix, view.label, view.weight, SECTION.size)
    multires_contrast(*rows, SECTION.temperature).backward()
    moved = mix.grad[:, 0] != 0
    assert moved.any(dim=(1, 2)).all()
    for image, (top, left) in enumerate((BOXES.corner // 8).tolist()):
        moved[image, max(top - 1, 0) : top + 5, max(left - 1, 0) : left + 5] = False
    assert not moved.any()


def test_context_is_upsampled_with_aligned_corners_and_the_mix_without() -> None:
    step = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    boxes, plane = Boxes(torch.zeros(1, 2, dtype=torch.long), (16, 16)), torch.zeros(1, 32, 32)
    detail = torch.ones(1, 1, 4, 4)
    context, _, _, mix, _, _ = to_multires_rows(step, detail, boxes, step, plane.long(), plane, size=65)
    torch.testing.assert_close(context.view(8, 8)[3], torch.arange(8) / 7)
    torch.testing.assert_close(mix.view(8, 8)[3], torch.tensor([0, 0, 1, 3, 5, 7, 8, 8]) / 8)


@pytest.mark.parametrize(("side", "size"), [(64, 11), (64, 16), (132, 17), (260, 65), (1024, 65)])
def test_a_row_is_inside_if_all_cells_it_comes_from_are(side: int, size: int) -> None:
    """Exactly, also where rows fall on cells, as every second one does in the first case and all in the next three."""
    fine = side // 4
    high, wide = (side // 2 // 4 * 4, side // 4 // 4 * 4)
    boxes = Boxes(torch.tensor([[0, side - wide], [side // 4 // 4 * 4, 8], [side - high, 12]]), (high, wide))
    detail = torch.tensor([3.0, 4.0])[:, None, None].expand(3, 2, high // 4, wide // 4)
    plane = torch.zeros(3, side, side)
    rows, detail_rows, inside, *_ = to_multires_rows(
        torch.zeros(3, 2, fine // 2, fine // 2), detail, boxes, torch.zeros(3, 1, 2, 2), plane.long(), plane, size
    )
    assert rows.shape == detail_rows.shape
    positions = [Fraction(i * (fine - 1), size - 1) for i in range(size)]
    for image, corner in enumerate((boxes.corner // 4).tolist()):
        along = [
            [start <= int(x) and ceil(x) < start + cells // 4 for x in positions]
            for start, cells in zip(corner, boxes.size, strict=True)
        ]
        expected = torch.tensor(along[0])[:, None] & torch.tensor(along[1])
        assert torch.equal(inside.view(3, size, size)[image], expected)
    unmixed = torch.tensor([3.0, 4.0]).expand_as(detail_rows[inside])
    torch.testing.assert_close(detail_rows[inside], unmixed)


def test_state_survives_a_round_trip() -> None:
    objective, output, view = two_resolutions()
    objective(Seen(output, view))  # moves the statistics of the batch norm
    other = PixelContrast(SECTION, ("mixed",), CHANNELS)
    other.load_state_dict(objective.state_dict())
    assert other.eval()(Seen(output, view)) == objective.eval()(Seen(output, view))


def test_computed_in_float32_under_autocast() -> None:
    objective, output, view = two_resolutions()
    objective.eval()
    half = replace(
        output, features=output.features.bfloat16(), encoder=tuple(maps.bfloat16() for maps in output.encoder),
        detail=replace(output.detail, features=output.detail.features.bfloat16()),
    )  # fmt: skip
    full = replace(
        half, features=half.features.float(), encoder=tuple(maps.float() for maps in half.encoder),
        detail=replace(half.detail, features=half.detail.features.float()),
    )  # fmt: skip
    expected = objective(Seen(full, view))
    with torch.autocast("cpu", torch.bfloat16):
        actual = objective(Seen(half, view))
    assert actual.dtype == torch.float32
    assert actual == expected
