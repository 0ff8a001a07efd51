"""One contract for encoders of every family."""

import math
import re
from copy import deepcopy

import pytest
import torch
import torchvision
from torch import nn

from cluda_cli.errors import SettingsError
from cluda_cli.models.encoders import Encoder, build_encoder
from cluda_cli.settings import Model

# A small member of every family, with its output stride and the strides of its maps.
PYRAMID = (4, 8, 16, 32)
FAMILIES = {
    "mit_b0": (32, PYRAMID),
    "test_resnet": (32, PYRAMID),
    "test_resnet dilated": (8, (4, 8, 8, 8)),
    "mobilenetv2_050": (32, PYRAMID),
    "mobilenetv2_050 dilated": (16, (4, 8, 16, 16)),
    "test_convnext": (32, PYRAMID),
    "test_convnext2": (32, PYRAMID),
    "pvt_v2_b0": (32, PYRAMID),
    "swin_tiny_patch4_window7_224": (32, PYRAMID),
    "test_vit": (32, (4, 16, 16, 16)),
    "vit_small_patch14_reg4_dinov2": (32, (4, 14, 14, 14)),
    "vit_small_patch16_dinov3": (32, (4, 16, 16, 16)),
}
# Swin refuses images of other sizes, and ConvNeXt drops the remainder.
ONLY_PADDED = ("test_convnext", "test_convnext2", "swin_tiny_patch4_window7_224")


def _family_model(family: str, **options: object) -> Model:
    stride = FAMILIES[family][0] if family in FAMILIES else 32
    return Model(encoder=family.partition(" ")[0], output_stride=stride, **options)


def _shaken(encoder: Encoder) -> Encoder:
    """Noise on every parameter: zeros, as residual branches begin with, would hide what is not connected."""
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return encoder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoder(family) -> Encoder:
    torch.manual_seed(0)
    return _shaken(build_encoder(_family_model(family, drop_path=0.5)))


def test_maps_are_as_declared(encoder, family):
    assert encoder.training and encoder.strides == FAMILIES[family][1] and len(encoder.channels) == 4
    sizes = [tuple(max(encoder.pad_multiple, side) for side in size) for size in ((32, 32), (64, 32), (32, 224))]
    if family not in ONLY_PADDED:
        sizes += [(33, 47), (50, 131)]
    for size in sizes:
        assert encoder.pad_multiple <= 32
        with torch.no_grad():
            maps = encoder.eval()(torch.randn(1, 3, *size))
        grids = [tuple(math.ceil(side / stride) for side in size) for stride in encoder.strides]
        expected = [(1, channels, *grid) for channels, grid in zip(encoder.channels, grids, strict=True)]
        assert [tuple(features.shape) for features in maps] == expected


def test_gradients_reach_every_parameter_and_the_image(encoder):
    image = torch.randn(1, 3, 64, 96, requires_grad=True)
    encoder.eval().zero_grad()
    sum((features * torch.randn_like(features)).sum() for features in encoder(image)).backward()
    silent = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent and bool(image.grad.flatten(1).any())
    encoder.zero_grad()


@torch.no_grad()
def test_evaluation_is_deterministic_and_treats_images_alone(encoder):
    images = torch.randn(2, 3, 64, 96)
    together = encoder.eval()(images)
    for first, second in zip(together, encoder(images), strict=True):
        assert torch.equal(first, second)
    for whole, alone in zip(together, encoder(images[1:]), strict=True):
        torch.testing.assert_close(whole[1:], alone, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(whole[:1], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_maps_lie_as_the_image_does(encoder):
    """A change at the lower right shows there; it would not if rows and columns were confused."""
    image = torch.randn(1, 3, 64, 128)
    changed = image.clone()
    changed[..., 32:, 96:] += 3
    for before, after in zip(encoder.eval()(image), encoder(changed), strict=True):
        difference = (after - before).abs().sum(dim=1)[0]  # h w
        for sums in (difference.sum(dim=1), difference.sum(dim=0)):  # of rows, of columns
            center = (sums * torch.arange(len(sums))).sum() / sums.sum()
            assert center > (len(sums) - 1) / 2 or len(sums) == 2  # two cells see much of each other


@torch.no_grad()
def test_copies_are_independent_and_states_go_round(encoder):
    image = torch.randn(1, 3, 64, 64)
    before = encoder.eval()(image)[-1]
    other = deepcopy(encoder)
    assert torch.equal(other(image)[-1], before)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    assert not torch.allclose(other(image)[-1], before) and torch.equal(encoder(image)[-1], before)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(image)[-1], before)


@torch.no_grad()
def test_stochastic_depth_acts_in_training_only(encoder):
    network, image = deepcopy(encoder).train(), torch.randn(2, 3, 64, 64)
    draws = [network(image)[-1] for _ in range(3)]
    assert not all(torch.equal(draws[0], draw) for draw in draws[1:])


@pytest.mark.parametrize("family", ["mit_b0", "test_resnet", "test_vit"])
def test_without_stochastic_depth(family):
    encoder, image = build_encoder(_family_model(family, drop_path=0.0)), torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder(image)[-1], encoder(image)[-1])


def test_fixed_windows_are_padded_to():
    encoder = build_encoder(Model(encoder="test_maxvit"))
    assert encoder.pad_multiple == 160


def test_swin_with_windows_of_twelve_takes_multiples_of_32():
    with torch.device("meta"):
        encoder = build_encoder(Model(encoder="swin_large_patch4_window12_384"))
        maps = encoder(torch.zeros(1, 3, 96, 352))
    assert encoder.pad_multiple == 32 and encoder.channels == (192, 384, 768, 1536)
    assert [tuple(features.shape[2:]) for features in maps] == [(24, 88), (12, 44), (6, 22), (3, 11)]


@pytest.mark.reference
@torch.no_grad()
def test_swin_equals_that_of_torchvision_where_windows_need_padding():
    torch.manual_seed(0)
    encoder = _shaken(build_encoder(Model(encoder="swin_tiny_patch4_window7_224"))).eval()
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
        encoder = build_encoder(Model(encoder="resnet101c", output_stride=8))
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
        encoder = build_encoder(Model(encoder="vit_large_patch16_dinov3"))
    assert encoder.indices == [5, 11, 17, 23] and encoder.channels == (1024,) * 4


@torch.no_grad()
def test_plain_maps_are_the_normalised_tokens_of_a_stretched_image():
    encoder = _shaken(build_encoder(Model(encoder="test_vit"))).eval()
    image = torch.randn(1, 3, 40, 64)
    first, second, third, last = encoder(image)
    stretched = nn.functional.interpolate(image, (48, 64), mode="bilinear")
    tokens = encoder.network.forward_features(stretched)[:, 1:]  # after the class token
    torch.testing.assert_close(last, tokens.transpose(1, 2).unflatten(2, (3, 4)))
    assert first.shape[2:] == (10, 16) and second.shape == third.shape == last.shape


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mit_b6", "did you mean mit_b"),
        ("convnxt_tiny", "convnext_tiny"),
        ("zzzz", "there is no encoder"),
        ("hf-hub:timm/resnet18.a1_in1k", "there is no encoder"),
        ("mixer_s32_224", "has maps at strides [32]"),
        ("resnet18.nope", "Invalid pretrained tag"),
        ("vit_tiny_patch16_224.nope", "Invalid pretrained tag"),
        ("hiera_tiny_224", "for images of any size"),
    ],
)
def test_unsuitable_names(name, says):
    with pytest.raises(SettingsError) as caught:
        build_encoder(Model(encoder=name))
    assert says in str(caught.value) and caught.value.where == "model.encoder" and caught.value.remedy


@pytest.mark.parametrize("name", ["mit_b0", "test_vit", "pvt_v2_b0", "hrnet_w18_small"])
def test_networks_without_dilation(name):
    with pytest.raises(SettingsError) as caught:
        build_encoder(Model(encoder=name, output_stride=8))
    assert caught.value.where == "model.output_stride" and caught.value.remedy and name in str(caught.value)


def _training(encoder: Encoder) -> Encoder:
    """Training mode with batch norms frozen, as in a network of frozen norms."""
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return encoder


def _gradients(encoder: Encoder) -> tuple[list[torch.Tensor], int]:
    """Gradients of one backward pass in training mode, and the elements that were kept for it."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    torch.manual_seed(2)
    image = torch.randn(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = sum(features.square().mean() for features in encoder(image))
    loss.backward()
    return [parameter.grad for parameter in encoder.parameters()], kept


@pytest.mark.parametrize(
    "family", ["mit_b0", "test_resnet", "test_convnext", "pvt_v2_b0", "test_vit", "eva02_tiny_patch14_224"]
)
def test_recomputed_activations_give_the_same_gradient_for_less_memory(family):
    torch.manual_seed(0)
    plain = _training(_shaken(build_encoder(_family_model(family, drop_path=0.5))))
    saving = build_encoder(_family_model(family, drop_path=0.5, checkpoint_activations=True, freeze_batch_norm=True))
    saving.load_state_dict(plain.state_dict())
    expected, much = _gradients(plain)
    found, little = _gradients(_training(saving))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert little < 0.75 * much


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050"])
def test_moving_statistics_forbid_recomputation(name):
    with pytest.raises(SettingsError) as caught:
        build_encoder(Model(encoder=name, checkpoint_activations=True))
    assert caught.value.where == "model.checkpoint_activations"
    assert "model.freeze_batch_norm=true" in caught.value.remedy


def test_recomputation_is_refused_where_it_does_not_exist():
    with pytest.raises(SettingsError) as caught:
        build_encoder(Model(encoder="hrnet_w18_small", checkpoint_activations=True, freeze_batch_norm=True))
    assert caught.value.where == "model.checkpoint_activations"
