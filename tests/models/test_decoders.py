"""The DAFormer decoder against measured vectors and its specification."""

import math

import pytest
import torch

from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.settings import Decoder

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
