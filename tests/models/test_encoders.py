"""One contract for encoders of every family."""

import math
from copy import deepcopy

import pytest
import torch
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mit_b6", "did you mean mit_b"),
        ("convnxt_tiny", "convnext_tiny"),
        ("zzzz", "there is no encoder"),
        ("hf-hub:timm/resnet18.a1_in1k", "there is no encoder"),
        ("vit_tiny_patch16_224.nope", "Invalid pretrained tag"),
    ],
)
def test_unsuitable_names(name, says):
    with pytest.raises(SettingsError) as caught:
        build_encoder(Model(encoder=name))
    assert says in str(caught.value) and caught.value.where == "model.encoder" and caught.value.remedy


@pytest.mark.parametrize("name", ["mit_b0", "test_vit"])
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
