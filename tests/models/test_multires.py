"""Context and detail in one network.

B batch, K classes, H W pixels, h w cells of the context, a b cells of a detail crop.
"""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.teacher import Teacher
from cluda_cli.errors import SettingsError
from cluda_cli.models.boxes import Boxes, Size
from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.models.multires import MultiResolution, build_segmenter, entropy, find_most_uncertain
from cluda_cli.models.segmenter import Segmenter

K = 5
CROP = (128, 160)
DETAIL = (64, 80)  # half of it
BOXES = Boxes(torch.tensor([[16, 40], [64, 0]]), DETAIL)


def build(
    encoder: str = "mit_b0", crop: Size = CROP, dropout: float = 0.0, drop_path: float = 0.0, **multires: Any
) -> MultiResolution:
    """A small network without anything random in it, in training mode."""
    decoder = settings.Decoder(embed_dim=8, channels=8, dropout=dropout)
    model = settings.Model(encoder=encoder, drop_path=drop_path, decoder=decoder)
    torch.manual_seed(0)
    network = MultiResolution(model, settings.MultiResolution(attention_dim=8, **multires), crop, K)
    # New heads give all pixels nearly the same logits.
    nn.init.normal_(network.decoder.conv_seg.weight, std=1.0)
    nn.init.normal_(network.scale_attention.conv_seg.weight, std=1.0)
    return network


def noise(count: int = 2, size: Size = CROP, seed: int = 1) -> Tensor:
    """Images whose parts differ: some are flat, some are noisy."""
    generator = torch.Generator().manual_seed(seed)
    strength = F.interpolate(torch.rand(count, 1, 3, 3, generator=generator) ** 2, size, mode="bilinear")
    return 4 * strength * torch.randn(count, 3, *size, generator=generator)


def enlarge(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def attend(network: MultiResolution, bias: float) -> None:
    """To the detail everywhere (large), or nowhere (-large)."""
    nn.init.constant_(network.scale_attention.conv_seg.bias, bias)


def plain_evaluation(
    network: MultiResolution, image: Tensor, detail: Size, starts: tuple[list[int], list[int]]
) -> Tensor:
    """HRDA's fusion of the context and of windows at `starts`, one after another.  # B K H/4 W/4"""
    maps = network.encoder(F.avg_pool2d(image, 2))
    context = network.decoder(maps)[0]
    attention = network.scale_attention(maps)[0].sigmoid()
    size = (image.shape[2] // 4, image.shape[3] // 4)
    total, cover = torch.zeros(len(image), K, *size), torch.zeros(size)
    for y in starts[0]:
        for x in starts[1]:
            logits = network.decoder(network.encoder(image[:, :, y : y + detail[0], x : x + detail[1]]))[0]
            rows, columns = slice(y // 4, (y + detail[0]) // 4), slice(x // 4, (x + detail[1]) // 4)
            total[:, :, rows, columns] += logits
            cover[rows, columns] += 1
    return enlarge(attention, size) * total / cover + enlarge((1 - attention) * context, size)


# What training sees


def test_output_of_training() -> None:
    network, image = build(), noise()
    network.eval().training = True  # batch norms as in evaluation, so that parts can be computed alone
    output = network(image, BOXES)
    assert output.logits.shape == (2, K, 32, 40)
    torch.testing.assert_close(output.image, F.avg_pool2d(image, 2))
    maps = network.encoder(output.image)
    for found, expected in zip(output.encoder, maps, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(output.features, network.decoder(maps)[1])
    assert output.detail is not None and output.detail.boxes is BOXES
    parts = torch.stack([image[0, :, 16:80, 40:120], image[1, :, 64:, :80]])
    logits, features = network.decoder(network.encoder(parts))
    assert logits.shape == (2, K, 16, 20) and features.shape == (2, 8, 16, 20)
    torch.testing.assert_close(output.detail.logits, logits)
    torch.testing.assert_close(output.detail.features, features)


@pytest.mark.parametrize("blend_late", [False, True])
def test_fusion_in_training(blend_late: bool) -> None:
    network, image, size = build(blend_late=blend_late), noise(), (32, 40)
    network.eval().training = True
    output = network(image, BOXES)
    context = network.decoder(output.encoder)[0]
    attention = network.scale_attention(output.encoder)[0].sigmoid()
    mask, fine = torch.zeros(2, 1, 16, 20), torch.zeros(2, K, *size)
    assert output.detail is not None
    mask[0, :, 2:10, 5:15], fine[0, :, 4:20, 10:30] = 1, output.detail.logits[0]
    mask[1, :, 8:, :10], fine[1, :, 16:, :20] = 1, output.detail.logits[1]
    attention = attention * mask
    if blend_late:
        upsampled = enlarge(attention, size)
        expected = upsampled * fine + (1 - upsampled) * enlarge(context, size)
    else:
        expected = enlarge(attention, size) * fine + enlarge((1 - attention) * context, size)
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize("blend_late", [False, True])
def test_attention_chooses_between_context_and_detail(blend_late: bool) -> None:
    network, image = build(blend_late=blend_late), noise()
    network.eval().training = True
    attend(network, -1e4)
    output = network(image, BOXES)
    context = enlarge(network.decoder(output.encoder)[0], (32, 40))
    torch.testing.assert_close(output.logits, context)
    attend(network, 1e4)
    output = network(image, BOXES)
    assert output.detail is not None
    inner = (..., slice(1, -1), slice(1, -1))  # the border is a mixture
    torch.testing.assert_close(BOXES.over(4).crop(output.logits)[inner], output.detail.logits[inner])
    outside = ~BOXES.over(8).inside((16, 20)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    outside &= F.max_pool2d((~outside).float(), 3, stride=1, padding=1) == 0
    torch.testing.assert_close(output.logits.movedim(1, -1)[outside], context.movedim(1, -1)[outside])


def test_every_parameter_learns() -> None:
    network = build()
    network(noise(), BOXES).logits.square().mean().backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not missing


def test_training_draws_nothing_of_its_own() -> None:
    network = build()
    before = torch.get_rng_state()
    network(noise(), BOXES)
    network(noise(), None)
    assert torch.equal(torch.get_rng_state(), before)
    network.draw_boxes(2, CROP, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dropout", "drop_path"), [(0.5, 0.0), (0.0, 0.5)])
def test_dropouts_of_training_follow_the_global_generator(dropout: float, drop_path: float) -> None:
    network, found = build(dropout=dropout, drop_path=drop_path), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(network(noise(), BOXES).logits)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-3)


def test_boxes_are_drawn_on_the_grid_of_the_context() -> None:
    network, generator = build(), torch.Generator().manual_seed(0)
    corners = [network.draw_boxes(3, CROP, generator) for _ in range(300)]
    assert all(boxes.size == DETAIL and len(boxes.corner) == 3 for boxes in corners)
    drawn = torch.cat([boxes.corner[:1] for boxes in corners])
    assert drawn[:, 0].unique().tolist() == list(range(0, 65, 8))
    assert drawn[:, 1].unique().tolist() == list(range(0, 81, 8))


# Where the context is least certain


def test_entropy_is_a_share_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [50, 0, 0, 0], [0, 0, -200, -200], [math.log(3), 0, -200, -200]])
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    expected = torch.tensor([1, 0, 0.5, quarter])
    found = entropy(logits.T[None, :, :, None])  # 1 4 4 1
    torch.testing.assert_close(found, expected[None, :, None])
    assert entropy(torch.randn(2, K, 4, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("count", [1, 3])
def test_most_uncertain_window_of_each_map(count: int) -> None:
    maps = torch.zeros(count, 8, 12)
    places = [(5, 9), (0, 0), (3, 6)]  # of the only uncertain cell
    for b in range(count):
        maps[b, places[b][0], places[b][1]] = 1
    # Windows of 4 x 6 begin at rows 0, 2, 4 and columns 0, 3, 6; of several with the cell, the first counts.
    assert find_most_uncertain(maps, (4, 6), (2, 3)).tolist() == [[2, 6], [0, 0], [0, 3]][:count]


def test_first_of_equally_uncertain_windows() -> None:
    assert find_most_uncertain(torch.full((2, 8, 8), 0.5), (4, 4), (2, 2)).tolist() == [[0, 0], [0, 0]]
    maps = torch.zeros(1, 8, 8)
    maps[0, 0, 7] = maps[0, 7, 0] = 1
    assert find_most_uncertain(maps, (4, 4), (2, 2)).tolist() == [[0, 4]]


def test_without_boxes_each_image_is_seen_where_its_context_is_least_certain() -> None:
    network, image = build().double(), noise(3).double()
    logits: list[Tensor] = []
    network.decoder.register_forward_hook(lambda _, __, result: logits.append(result[0]))
    output = network(image)
    assert len(logits) == 2 and output.detail is not None and output.detail.boxes.size == DETAIL
    probability = logits[0].softmax(dim=1)
    certainty = (probability * probability.log()).sum(dim=1)  # 3 16 20
    best = []
    for b in range(3):
        windows = {(y, x): certainty[b, y : y + 8, x : x + 10].mean() for y in (0, 4, 8) for x in (0, 5, 10)}
        best.append([8 * side for side in min(windows, key=lambda corner: windows[corner])])
    assert output.detail.boxes.corner.tolist() == best
    assert len({tuple(corner) for corner in best}) > 1
    again = copy.deepcopy(network)(image, output.detail.boxes)
    torch.testing.assert_close(again.detail.logits, output.detail.logits)


def test_choosing_a_window_costs_no_statistics_and_no_gradient() -> None:
    image, results = noise(), []
    boxes = build()(image).detail.boxes
    for given in (boxes, None):
        network = build()
        network(image, given).logits.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append(gradients | dict(network.named_buffers()))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


# What evaluation and the teacher see


@pytest.mark.parametrize(
    ("size", "detail", "starts"),
    [
        ((128, 160), (64, 80), ([0, 32, 64], [0, 40, 80])),
        ((104, 136), (64, 80), ([0, 32, 40], [0, 40, 56])),  # the last windows are moved back
        ((64, 96), (64, 80), ([0], [0, 16])),
        ((64, 72), (64, 72), ([0], [0])),  # smaller than the detail crop
    ],
)
@torch.no_grad()
def test_evaluation_equals_plain_code(size: Size, detail: Size, starts: tuple[list[int], list[int]]) -> None:
    network, image = build().eval(), noise(2, size)
    output = network(image)
    assert output.detail is None and output.logits.shape == (2, K, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(output.logits, plain_evaluation(network, image, detail, starts), rtol=0, atol=1e-4)
    assert torch.equal(network(image).logits, output.logits)
    assert torch.equal(network(image, BOXES).logits, output.logits)  # boxes are for training
    torch.testing.assert_close(network(image[1:]).logits, output.logits[1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_evaluation_attends_to_detail_or_context_alone() -> None:
    network, image = build().eval(), noise(1)
    attend(network, -1e4)
    output = network(image)
    torch.testing.assert_close(output.logits, enlarge(network.decoder(output.encoder)[0], (32, 40)))
    attend(network, 1e4)
    corner = network(image).logits[..., :8, :10]  # which one window alone covers
    alone = network.decoder(network.encoder(image[..., :64, :80]))[0][..., :8, :10]
    torch.testing.assert_close(corner, alone)


def test_teacher_sees_all_windows_as_one_batch_after_the_context() -> None:
    network = Teacher(build("mobilenetv2_050", dropout=0.5), settings.Teacher()).network
    assert network.decoder.fuse_layer.bottleneck.bn.training
    expected, image, seen = copy.deepcopy(network), noise(), []
    network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = network(image).logits
    corners = [(y, x) for y in (0, 32, 64) for x in (0, 40, 80)]
    windows = torch.cat(
        [image[..., y : y + 64, x : x + 80] for y, x in corners]
    )  # window by window, not image by image
    assert len(seen) == 2 and torch.equal(seen[1], windows)
    torch.testing.assert_close(seen[0], F.avg_pool2d(image, 2))
    maps = expected.encoder(seen[0])
    context = expected.decoder(maps)[0]
    fine = expected.decoder(expected.encoder(windows))[0]
    attention = expected.scale_attention(maps)[0].sigmoid()
    total, cover = torch.zeros(2, K, 32, 40), torch.zeros(32, 40)
    for n, (y, x) in enumerate(corners):
        total[..., y // 4 : y // 4 + 16, x // 4 : x // 4 + 20] += fine[2 * n : 2 * n + 2]
        cover[y // 4 : y // 4 + 16, x // 4 : x // 4 + 20] += 1
    plain = enlarge(attention, (32, 40)) * total / cover + enlarge((1 - attention) * context, (32, 40))
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-4)
    buffers = dict(expected.named_buffers())
    for name, value in network.named_buffers():
        torch.testing.assert_close(value, buffers[name])  # an order of its own would leave other statistics
    assert network.decoder.fuse_layer.bottleneck.bn.num_batches_tracked == 2


# Sizes and settings


@pytest.mark.parametrize(
    ("crop", "detail"),
    [
        ((1024, 1024), (512, 512)),
        ((512, 512), (256, 256)),
        ((240, 320), (120, 160)),
        ((72, 200), (32, 96)),
        ((8, 8), (8, 8)),
    ],
)
def test_detail_is_half_the_crop_in_whole_cells(crop: Size, detail: Size) -> None:
    assert build("mobilenetv2_050", crop).detail_crop == detail


@pytest.mark.parametrize(
    ("crop", "options", "where", "remedy"),
    [
        ((100, 160), {}, "data.crop", "96 x 160"),
        ((128, 4), {}, "data.crop", "128 x 8"),
        ((128, 128), {"context_downscale": 3}, "data.crop", "132 x 132"),
        ((128, 160), {"detail_crop": (136, 80)}, "model.multires.detail_crop", "unset"),
        ((128, 160), {"detail_crop": (64, 168)}, "model.multires.detail_crop", "unset"),
        ((128, 160), {"detail_crop": (60, 80)}, "model.multires.detail_crop", "unset"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(crop: Size, options: dict[str, Any], where: str, remedy: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build("mobilenetv2_050", crop, **options)
    assert caught.value.where == where and remedy in caught.value.remedy


def test_detail_may_be_the_whole_crop() -> None:
    network = build("mobilenetv2_050", (64, 64), detail_crop=(64, 64))
    boxes = network.draw_boxes(1, (64, 64), torch.Generator())
    assert boxes.corner.tolist() == [[0, 0]]
    assert network(noise(2, (64, 64))).detail.logits.shape == (2, K, 16, 16)


@pytest.mark.parametrize(
    ("downscale", "starts"), [(3, ([0, 24, 48, 72, 96], [0, 36, 72])), (4, ([0, 32, 64], [0, 32, 64]))]
)
@torch.no_grad()
def test_context_may_be_smaller_still(downscale: int, starts: tuple[list[int], list[int]]) -> None:
    crop, detail = ((144, 144), (48, 72)) if downscale == 3 else ((128, 128), (64, 64))
    network = build(crop=crop, context_downscale=downscale, detail_crop=detail).eval()
    assert network.pad_multiple == 4 * downscale and network.smallest == 32 * downscale
    image = noise(1, crop)
    output = network(image)
    assert output.image.shape[2:] == (crop[0] // downscale, crop[1] // downscale)
    assert output.logits.shape[2:] == (crop[0] // 4, crop[1] // 4)
    attend(network, 1e4)
    total, cover = torch.zeros(1, K, crop[0] // 4, crop[1] // 4), torch.zeros(crop[0] // 4, crop[1] // 4)
    for y in starts[0]:
        for x in starts[1]:
            part = (..., slice(y // 4, (y + detail[0]) // 4), slice(x // 4, (x + detail[1]) // 4))
            total[part] += network.decoder(network.encoder(image[:, :, y : y + detail[0], x : x + detail[1]]))[0]
            cover[part[-2:]] += 1
    torch.testing.assert_close(network(image).logits, total / cover, rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_resolutions_are_blended_in_float32_under_autocast(training: bool) -> None:
    """Sums over windows and products with attention would lose what eight bits of mantissa cannot hold."""
    network, image = build().train(training), noise()
    exact = network(image, BOXES).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(image, BOXES)
    assert output.features.dtype == torch.bfloat16 and output.logits.dtype == torch.float32
    assert (output.logits - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(("encoder", "multiple"), [("mit_b0", 8), ("mobilenetv2_050", 64)])
def test_pad_multiple_suits_context_and_detail(encoder: str, multiple: int) -> None:
    network = build(encoder)
    assert network.pad_multiple == multiple and network.smallest == 64
    size = (64, 64 + multiple)
    assert network.eval()(noise(1, size)).logits.shape[2:] == (16, size[1] // 4)


@pytest.mark.parametrize("output_stride", [32, 8])
def test_deeplab_heads(output_stride: int) -> None:
    model = settings.Model(encoder="resnet18", output_stride=output_stride, deeplab=settings.DeepLabV2())
    network = MultiResolution(model, settings.MultiResolution(), (128, 192), K)
    assert network.cell == 2 * output_stride and network.detail_crop == (64, 64 if output_stride == 32 else 96)
    output = network(noise(2, (128, 192)), Boxes(torch.tensor([[0, 64], [64, 0]]), network.detail_crop))
    assert output.logits.shape == (2, K, 128 // output_stride, 192 // output_stride)
    assert output.detail is not None
    assert output.detail.logits.shape[2:] == tuple(side // output_stride for side in network.detail_crop)
    assert output.features.shape == (2, 512, 64 // output_stride, 96 // output_stride)
    output.logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.eval()(noise(1, (128, 256))).logits.shape[2:] == (128 // output_stride, 256 // output_stride)


# The state and its size


def test_state_is_that_of_one_resolution_and_an_attention_head() -> None:
    network = build()
    model = settings.Model(encoder="mit_b0", decoder=settings.Decoder(embed_dim=8, channels=8))
    own, single = network.state_dict(), Segmenter(model, K).state_dict()
    assert set(single) < set(own)
    assert all(name.startswith("scale_attention.") for name in set(own) - set(single))
    other = build(blend_late=True, detail_crop=(32, 32))
    other.load_state_dict(own)
    assert torch.equal(other.state_dict()["scale_attention.conv_seg.weight"], own["scale_attention.conv_seg.weight"])


def test_settings_choose_the_network() -> None:
    model = settings.Model(encoder="mobilenetv2_050", multires=settings.MultiResolution(attention_dim=8))
    network = build_segmenter(model, CROP, K)
    assert isinstance(network, MultiResolution) and network.detail_crop == DETAIL
    single = build_segmenter(settings.Model(encoder="mobilenetv2_050"), CROP, K)
    assert type(single) is Segmenter and single.draw_boxes(2, CROP, torch.Generator()) is None


def test_attention_drops_channels_as_the_decoder_does() -> None:
    assert build(dropout=0.25).scale_attention.dropout.p == 0.25


@pytest.mark.reference
@pytest.mark.parametrize(("embed_dim", "total"), [(256, 85_685_990), (512, 87_031_526)])
def test_number_of_parameters(embed_dim: int, total: int) -> None:
    model = settings.Model(encoder="mit_b5", decoder=settings.Decoder(embed_dim=embed_dim))
    with torch.device("meta"):
        network = MultiResolution(model, settings.MultiResolution(), (1024, 1024), 19)
        weighter = DAFormerDecoder(settings.Decoder(dilations=()), network.encoder.channels, 1)  # of the contrast
    assert sum(p.numel() for p in weighter.parameters()) == 526_081
    assert sum(p.numel() for p in network.scale_attention.parameters()) == 530_707
    assert sum(p.numel() for p in network.parameters()) == total
