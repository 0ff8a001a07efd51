"""One contract for encoders of every family."""

import pytest
import torch

from cluda_cli.errors import SettingsError
from cluda_cli.models.encoders import build_encoder
from cluda_cli.settings import Model

FAMILIES = (
    "mit_b0", "mobilenetv2_100", "resnet18", "convnext_atto", "mambaout_femto", "swin_tiny_patch4_window7_224",
    "efficientnet_b0.ra_in1k", "twins_pcpvt_small",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_contract(name):
    torch.manual_seed(0)
    encoder = build_encoder(Model(encoder=name))
    assert encoder.training and encoder.strides == (4, 8, 16, 32)
    height, width = 2 * encoder.pad_multiple, 3 * encoder.pad_multiple
    height, width = max(height, 64), max(width, 96)
    maps = encoder(torch.randn(2, 3, height, width))
    expected = [(2, c, height // s, width // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(features.shape) for features in maps] == expected
    sum((features * torch.randn_like(features)).sum() for features in maps).backward()
    unused = [parameter_name for parameter_name, p in encoder.named_parameters() if p.grad is None]
    assert not unused

    other = build_encoder(Model(encoder=name)).eval()
    image = torch.randn(1, 3, 160, 96)
    with torch.no_grad():
        assert not torch.allclose(encoder.eval()(image)[-1], other(image)[-1])
        other.load_state_dict(encoder.state_dict())
        for ours, theirs in zip(encoder(image), other(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mit_b0", "resnet18"])
def test_sizes_beyond_the_pad_multiple(name):
    encoder = build_encoder(Model(encoder=name)).eval()
    shapes = [tuple(features.shape[2:]) for features in encoder(torch.randn(1, 3, 65, 99))]
    assert shapes == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_fixed_windows_are_padded_to():
    encoder = build_encoder(Model(encoder="maxvit_rmlp_pico_rw_256"))
    assert encoder.pad_multiple == 256


def test_drop_path_reaches_timm_models():
    image = torch.randn(1, 3, 64, 64)
    draws = {}
    for rate in (0.0, 0.9):
        encoder = build_encoder(Model(encoder="convnext_atto", drop_path=rate))
        draws[rate] = torch.equal(encoder(image)[-1], encoder(image)[-1])
    assert draws == {0.0: True, 0.9: False}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mit_b6", "did you mean mit_b"),
        ("convnxt_tiny", "convnext_tiny"),
        ("zzzz", "there is no encoder"),
        ("hf-hub:timm/resnet18.a1_in1k", "there is no encoder"),
        ("vit_tiny_patch16_224", "has maps at strides [16]"),
        ("resnet18.nope", "Invalid pretrained tag"),
        ("hiera_tiny_224", "for images of any size"),
    ],
)
def test_unsuitable_names(name, says):
    with pytest.raises(SettingsError) as caught:
        build_encoder(Model(encoder=name))
    assert says in str(caught.value) and caught.value.where == "model.encoder" and caught.value.remedy
