"""The decoders against measured vectors and their specification."""

import math

import pytest
import torch
import torch.nn.functional as F

from cluda_cli.models.decoders import DAFormerDecoder, DeepLabV2Decoder, PyramidDecoder, build_decoder
from cluda_cli.settings import Decoder, DeepLabV2, Model, Pyramid

B0 = (32, 64, 160, 256)


@pytest.mark.reference
@pytest.mark.parametrize(("case", "channels"), [("mitb0", B0), ("mitb1_to_b5", (64, 128, 320, 512))])
def test_keys_and_shapes(case, channels, golden):
    _, description = golden("04_heads/daformer_head_official_shapes")
    with torch.device("meta"):
        decoder = DAFormerDecoder(Decoder(), channels, num_classes=19)
    shapes = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert shapes == description[case]["shapes"]
    assert sum(p.numel() for p in decoder.parameters()) == description[case]["parameters"]


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_gradients_and_statistics(dtype, golden, check_bounds):
    vectors, description = golden("04_heads/daformer_sepaspp_small")
    decoder = DAFormerDecoder(Decoder(embed_dim=32, channels=32, dropout=0), B0, num_classes=19).to(dtype)
    parameters = {n.removeprefix("param."): v for n, v in vectors.items() if n.startswith("param.")}
    decoder.load_state_dict(parameters)
    maps = [vectors[f"in.feat{i}"].to(dtype).requires_grad_() for i in range(1, 5)]
    found = {"eval.logits": decoder.eval()(maps)[0].detach()}
    logits, _ = decoder.train()(maps)
    (logits * vectors["in.cotangent"].to(dtype)).sum().backward()
    found["train.logits"] = logits.detach()
    found |= {f"train.grad_feat{i}": features.grad for i, features in enumerate(maps, 1)}
    found |= {f"train.grad.{name}": parameter.grad for name, parameter in decoder.named_parameters()}
    buffers = dict(decoder.named_buffers())
    counters = [name for name in buffers if name.endswith("num_batches_tracked")]
    assert all(buffers.pop(name) == 8 for name in counters)
    check_bounds(found | {f"train.after.{n}": v for n, v in buffers.items()}, vectors, description, dtype)


def test_fused_feature_is_what_the_classifier_reads_before_dropout():
    torch.manual_seed(0)
    decoder = DAFormerDecoder(Decoder(embed_dim=8, channels=8, dropout=0.5), B0, num_classes=5)
    maps = [torch.randn(2, channels, 16 >> i, 24 >> i) for i, channels in enumerate(B0)]
    decoder.eval()
    logits, fused = decoder(maps)
    assert logits.shape == (2, 5, 16, 24) and fused.shape == (2, 8, 16, 24)
    torch.testing.assert_close(decoder.conv_seg(fused), logits)
    decoder.dropout.train()
    dropped, again = decoder(maps)
    torch.testing.assert_close(again, fused)
    assert not torch.allclose(dropped, logits)


@pytest.mark.parametrize("embed_norm", [False, True])
def test_without_dilations_one_pointwise_convolution_fuses_the_resized_maps(embed_norm):
    """In whichever order it is computed."""
    torch.manual_seed(0)
    section = Decoder(embed_dim=6, channels=8, dilations=(), dropout=0, embed_norm=embed_norm)
    decoder = DAFormerDecoder(section, B0, num_classes=5).double()
    maps = [torch.randn(2, channels, 16 >> i, 24 >> i).double().requires_grad_() for i, channels in enumerate(B0)]
    logits, fused = decoder(maps)
    embedded = [layer(features) for layer, features in zip(decoder.embed_layers, maps, strict=True)]
    resized = [F.interpolate(features, (16, 24), mode="bilinear") for features in embedded]
    expected = decoder.fuse_layer(torch.cat(resized, dim=1))
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logits, decoder.conv_seg(expected), rtol=1e-12, atol=1e-13)
    leaves = [*maps, decoder.fuse_layer.conv.weight, decoder.embed_layers[2].proj.weight]
    cotangent = torch.randn_like(expected)
    gradients = (torch.autograd.grad(result, leaves, cotangent) for result in (fused, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_dilations_are_a_setting():
    decoder = DAFormerDecoder(Decoder(embed_dim=8, channels=8, dilations=(1, 3)), B0, num_classes=5)
    first, second = decoder.fuse_layer.aspp_modules
    assert first.conv.kernel_size == (1, 1)
    assert second.depthwise_conv.conv.dilation == second.depthwise_conv.conv.padding == (3, 3)
    maps = [torch.randn(1, channels, 4, 4) for channels in B0]
    assert decoder.eval()(maps)[0].shape == (1, 5, 4, 4)


def test_initial_values():
    torch.manual_seed(0)
    decoder = DAFormerDecoder(Decoder(), B0, num_classes=200)
    expected = {
        "conv_seg": 0.01,
        "fuse_layer.bottleneck.conv": math.sqrt(2 / (9 * 256)),
        "fuse_layer.aspp_modules.0.conv": math.sqrt(2 / 256),
        "fuse_layer.aspp_modules.1.depthwise_conv.conv": math.sqrt(2 / (9 * 1024)),
    }
    for name, std in expected.items():
        assert decoder.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.05), name
    assert not decoder.conv_seg.bias.any()


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deeplab_equals_the_reference(dtype, golden, check_bounds):
    vectors, description = golden("04_heads/dlv2_2rates")
    maps = [vectors[f"in.feat{i}"].to(dtype).requires_grad_() for i in range(1, 5)]
    channels = [features.shape[1] for features in maps]
    decoder = DeepLabV2Decoder(DeepLabV2(dilations=(6, 12)), channels, num_classes=19).to(dtype)
    decoder.load_state_dict({n.removeprefix("param."): v for n, v in vectors.items() if n.startswith("param.")})
    found = {"eval.logits": decoder.eval()(maps)[0].detach()}
    logits, fused = decoder.train()(maps)
    (logits * vectors["in.cotangent"].to(dtype)).sum().backward()
    found |= {"train.logits": logits.detach(), "train.grad_feat4": maps[3].grad}
    found |= {f"train.grad.{name}": parameter.grad for name, parameter in decoder.named_parameters()}
    check_bounds(found, vectors, description, dtype)
    assert fused is maps[3] and all(features.grad is None for features in maps[:3])


def test_deeplab_initial_values():
    torch.manual_seed(0)
    decoder = DeepLabV2Decoder(DeepLabV2(dilations=(6, 12, 18, 24)), B0, num_classes=19)
    for branch, dilation in zip(decoder.aspp_modules, (6, 12, 18, 24), strict=True):
        assert branch.conv.dilation == branch.conv.padding == (dilation, dilation)
        assert branch.conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not branch.conv.bias.any()


@pytest.mark.reference
@pytest.mark.parametrize(("dilations", "total"), [((6, 12, 18, 24), 43_920_300), ((6, 12), 43_219_846)])
def test_number_of_parameters_of_deeplab_on_resnet101(dilations, total):
    with torch.device("meta"):
        decoder = DeepLabV2Decoder(DeepLabV2(dilations=dilations), (256, 512, 1024, 2048), num_classes=19)
    resnet = 42_519_392  # without its classifier; see the tests of encoders
    assert sum(p.numel() for p in decoder.parameters()) + resnet == total


def test_light_decoder_fuses_with_one_convolution():
    decoder = DAFormerDecoder(Decoder(embed_dim=8, channels=8, dilations=()), B0, num_classes=5)
    keys = [name for name in decoder.state_dict() if name.startswith("fuse_layer") and name.endswith("weight")]
    assert keys == ["fuse_layer.conv.weight", "fuse_layer.bn.weight"]
    assert tuple(decoder.fuse_layer.conv.weight.shape) == (8, 32, 1, 1)
    maps = [torch.randn(2, channels, 16 >> i, 24 >> i) for i, channels in enumerate(B0)]
    logits, fused = decoder(maps)
    assert logits.shape == (2, 5, 16, 24) and fused.shape == (2, 8, 16, 24)


@pytest.mark.reference
def test_light_decoder_has_the_parameters_of_the_scale_attention():
    light = Decoder(embed_dim=256, channels=256, dilations=())
    with torch.device("meta"):
        decoder = DAFormerDecoder(light, (64, 128, 320, 512), num_classes=19)
    assert sum(p.numel() for p in decoder.parameters()) == 530_707


def test_pyramid_sums_from_the_coarsest_map_to_the_finest():
    torch.manual_seed(0)
    decoder = PyramidDecoder(Pyramid(channels=8, dropout=0.5), B0, num_classes=5).eval()
    for norm in (module for module in decoder.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    maps = [torch.randn(2, channels, -(-18 // 2**i), -(-25 // 2**i)) for i, channels in enumerate(B0)]
    logits, fused = decoder(maps)
    assert logits.shape == (2, 5, 18, 25) and fused.shape == (2, 8, 18, 25)
    torch.testing.assert_close(decoder.conv_seg(fused), logits)

    def embed(i):
        layer = decoder.embed_layers[i]
        return F.relu(layer.bn(F.conv2d(maps[i], layer.proj.weight[:, :, None, None])))

    expected = embed(3)
    for i in (2, 1, 0):
        unit = decoder.fuse_layers[i]
        coarse = F.interpolate(expected, maps[i].shape[2:], mode="bilinear", align_corners=False)
        expected = F.relu(unit.bn(F.conv2d(embed(i) + coarse, unit.conv.weight, padding=1)))
    torch.testing.assert_close(fused, expected)
    assert decoder.classifiers() == [decoder.conv_seg]


def test_the_settings_choose_the_decoder():
    chosen = {
        kind: type(build_decoder(Model(**({kind: True} if kind else {})), B0, 5)) for kind in ("", "deeplab", "pyramid")
    }
    assert chosen == {"": DAFormerDecoder, "deeplab": DeepLabV2Decoder, "pyramid": PyramidDecoder}
    assert type(build_decoder(Model(deeplab=True, pyramid=True), B0, 5)) is DeepLabV2Decoder
