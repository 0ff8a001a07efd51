"""What is particular to encoders of timm: windows, dilation, tokens and what they refuse."""

import re

import pytest
import torch
import torchvision
from torch import nn

from cluda_cli.errors import SettingsError
from cluda_cli.models.normalisation import IMAGENET, Normalisation
from cluda_cli.models.timm_encoders import PlainViT, TimmEncoder

HALVES = Normalisation(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))


def _shake(encoder: nn.Module) -> nn.Module:
    """Noise on every parameter: zeros, as residual branches begin with, would hide what is not connected."""
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return encoder


def test_fixed_windows_are_padded_to():
    encoder = TimmEncoder("test_maxvit", drop_path=0.1)
    assert encoder.pad_multiple == 160


def test_swin_with_windows_of_twelve_takes_multiples_of_32():
    with torch.device("meta"):
        encoder = TimmEncoder("swin_large_patch4_window12_384", drop_path=0.1)
        maps = encoder(torch.zeros(1, 3, 96, 352))
    assert encoder.pad_multiple == 32 and encoder.channels == (192, 384, 768, 1536)
    assert [tuple(features.shape[2:]) for features in maps] == [(24, 88), (12, 44), (6, 22), (3, 11)]


@pytest.mark.reference
@torch.no_grad()
def test_swin_equals_that_of_torchvision_where_windows_need_padding():
    torch.manual_seed(0)
    encoder = _shake(TimmEncoder("swin_tiny_patch4_window7_224", drop_path=0.1)).eval()
    other = torchvision.models.swin_t(weights=None).eval()
    state = {_torchvision_swin_name(name): tensor for name, tensor in encoder.network.state_dict().items()}
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert {name.rpartition(".")[2] for name in result.missing_keys if name.startswith("features")} <= {
        "relative_position_index"
    }
    features = torch.randn(1, 3, 256, 256)
    maps = encoder(features)
    for i, layer in enumerate(other.features):
        features = layer(features)
        if i % 2:
            torch.testing.assert_close(maps[i // 2], features.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-3)


def _torchvision_swin_name(name: str) -> str:
    name = name.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
    name = re.sub(r"^layers_(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
    name = re.sub(r"^layers_(\d)\.downsample", lambda m: f"features.{2 * int(m[1])}", name)
    return name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


def test_dilated_resnet101():
    """Strides 1, 2, 1, 1; the first block of a dilated stage has the dilation of the stage before."""
    with torch.device("meta"):
        encoder = TimmEncoder("resnet101c", drop_path=0.1, output_stride=8)
        maps = encoder(torch.zeros(1, 3, 64, 96))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 42_519_392
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 16, 24), (512, 8, 12), (1024, 8, 12), (2048, 8, 12)]
    stem = [module for module in encoder.network["conv1"] if isinstance(module, nn.Conv2d)]
    assert [(conv.out_channels, conv.stride[0]) for conv in stem] == [(32, 2), (32, 1), (64, 1)]
    dilations = [(1, 1, 3), (1, 1, 4), (1, 2, 23), (2, 4, 3)]  # of the first block, of the others, number of blocks
    for stage, (first, others, count) in enumerate(dilations, start=1):
        blocks = encoder.network[f"layer{stage}"]
        found = [(b.conv2.dilation[0], b.conv2.padding[0], b.conv2.stride[0]) for b in blocks]
        stride = 2 if stage == 2 else 1
        assert found == [(first, first, stride)] + [(others, others, 1)] * (count - 1)
        assert blocks[0].downsample[0].stride == (stride, stride)
        assert all(b.conv1.stride == b.conv3.stride == (1, 1) for b in blocks)


def test_large_vision_transformers_give_the_ends_of_their_quarters():
    with torch.device("meta"):
        encoder = PlainViT("vit_large_patch16_dinov3", drop_path=0.1)
    assert encoder.indices == [5, 11, 17, 23] and encoder.channels == (1024,) * 4


@torch.no_grad()
def test_plain_maps_are_the_normalised_tokens_of_a_stretched_image():
    encoder = _shake(PlainViT("test_vit", drop_path=0.1)).eval()
    image = torch.randn(1, 3, 40, 64)
    first, second, third, last = encoder(image)
    stretched = nn.functional.interpolate(image, (48, 64), mode="bilinear")
    tokens = encoder.network.forward_features(stretched)[:, 1:]  # after the class token
    torch.testing.assert_close(last, tokens.transpose(1, 2).unflatten(2, (3, 4)))
    assert first.shape[2:] == (10, 16) and second.shape == third.shape == last.shape


@pytest.mark.parametrize(
    ("name", "normalisation"),
    [
        ("resnet18", IMAGENET),
        ("tf_efficientnet_lite0", HALVES),
        ("convnext_tiny.in12k", IMAGENET),
        (
            "convnext_base.clip_laion2b",
            Normalisation((122.770938, 116.746013, 104.093736), (68.500533, 66.632158, 70.323163)),
        ),
    ],
)
def test_images_are_normalised_as_in_pretraining(name, normalisation):
    with torch.device("meta"):
        assert TimmEncoder(name, drop_path=0.1).normalisation == normalisation


def test_images_of_a_plain_vision_transformer_too():
    with torch.device("meta"):
        encoders = [PlainViT(name, drop_path=0.1) for name in ("test_vit", "vit_small_patch14_dinov2")]
    assert [encoder.normalisation for encoder in encoders] == [HALVES, IMAGENET]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mixer_s32_224", "has maps at strides [32]"),
        ("resnet18.nope", "Invalid pretrained tag"),
        ("hiera_tiny_224", "for images of any size"),
    ],
)
def test_unsuitable_networks(name, says):
    with pytest.raises(SettingsError) as caught:
        TimmEncoder(name, drop_path=0.1)
    assert says in str(caught.value) and caught.value.where == "model.encoder" and caught.value.remedy


@pytest.mark.parametrize("name", ["pvt_v2_b0", "hrnet_w18_small"])
def test_networks_without_dilation(name):
    with pytest.raises(SettingsError) as caught:
        TimmEncoder(name, drop_path=0.1, output_stride=8)
    assert caught.value.where == "model.output_stride" and caught.value.remedy and name in str(caught.value)
