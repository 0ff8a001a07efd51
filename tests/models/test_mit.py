"""The Mix Transformer against its specification, measured vectors and a second implementation."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from cluda_cli.models.mit import VARIANTS, Block, MixTransformer


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_shapes_and_drop_rates_of_all_variants(variant, golden):
    _, description = golden("03_mit/mit_shapes")
    expected = description["variants"][variant]
    with torch.device("meta"):
        network = MixTransformer(variant)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == expected["shapes"]
    assert sum(p.numel() for p in network.parameters()) == expected["parameters"]
    rates = [block.drop_path.drop_prob for block in network.modules() if isinstance(block, Block)]
    assert rates == pytest.approx(expected["drop_path_rates"], abs=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_and_gradients_of_b0(dtype, golden, check_bounds):
    vectors, description = golden("03_mit/mit_b0_eval")
    weights, _ = golden("03_mit/mit_b0_weights")
    network = MixTransformer("mit_b0").to(dtype).eval()
    network.load_state_dict({name.removeprefix("param."): value.to(dtype) for name, value in weights.items()})
    image = vectors["in.image"].to(dtype).requires_grad_()
    maps = network(image)
    sum((features * vectors[f"in.cotangent{i}"].to(dtype)).sum() for i, features in enumerate(maps, 1)).backward()
    parameters = dict(network.named_parameters())
    found = {f"feat{i}": features.detach() for i, features in enumerate(maps, 1)} | {"grad_image": image.grad}
    wanted = [name for name in description["tolerance_demanded"]["bounds"] if name.startswith("grad.")]
    found |= {name: parameters[name.removeprefix("grad.")].grad for name in wanted}
    check_bounds(found, vectors, description, dtype)


@pytest.mark.reference
def test_maps_of_formula_filled_b0(fill_by_formula, formula_image, check_moments):
    network = MixTransformer("mit_b0").double().eval()
    fill_by_formula(network, lambda name: name)
    one, two, three, four = network(formula_image)
    check_moments(one, (2, 32, 16, 24), "0.029677962 1.031968868 -1.092362361 -1.058346065 -0.650285266 -0.465420096")
    check_moments(two, (2, 64, 8, 12), "-0.009193622 0.995480040 0.065577472 0.170285310 -0.913832766 -1.016808360")
    check_moments(three, (2, 160, 4, 6), "0.000490499 1.010570874 0.379932757 -0.884985075 -1.451308962 -0.086521219")
    check_moments(four, (2, 256, 2, 3), "0.002690279 1.003946829 1.270047031 0.107954563 0.883226419 0.559039048")


@pytest.mark.reference
def test_maps_equal_those_of_another_implementation():
    other_encoders = pytest.importorskip("segmentation_models_pytorch.encoders")
    torch.manual_seed(0)
    network = MixTransformer("mit_b0").eval()
    for parameter in network.parameters():  # biases start at zero, which would hide a wrong one
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    other = other_encoders.get_encoder("mit_b0", weights=None).eval()
    other.load_state_dict(dict(network.state_dict()))
    image = torch.randn(2, 3, 72, 104)
    with torch.no_grad():
        for ours, theirs in zip(network(image), other(image)[-4:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 131)])
def test_any_size(size):
    network = MixTransformer("mit_b0")
    maps = network(torch.randn(1, 3, *size))
    expected = [tuple(math.ceil(n / stride) for n in size) for stride in network.strides]
    assert [tuple(features.shape[2:]) for features in maps] == expected
    assert tuple(features.shape[1] for features in maps) == network.channels


def test_stochastic_depth_drops_whole_branches_per_image():
    torch.manual_seed(0)
    block = Block(32, 1, 8, drop_path=0.5)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.3)
    tokens, size = torch.randn(1, 64, 32).expand(64, -1, -1), (8, 8)
    with torch.no_grad():
        found = block(tokens, size)
        outcomes = []
        for first, second in itertools.product((0.0, 2.0), repeat=2):  # dropped, or kept and scaled by 1 / 0.5
            after = tokens[:1] + first * block.attn(block.norm1(tokens[:1]), size)
            outcomes.append(after + second * block.mlp(block.norm2(after), size))
        distance = torch.stack([(found - outcome).abs().amax((1, 2)) for outcome in outcomes])  # 4 64
    assert distance.amin(0).max() < 1e-4
    assert set(distance.argmin(0).tolist()) == {0, 1, 2, 3}


def test_evaluation_is_deterministic():
    torch.manual_seed(0)
    network, image = MixTransformer("mit_b0", drop_path=0.9).eval(), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(network(image)[-1], network(image)[-1], rtol=0, atol=0)


def test_initial_values():
    torch.manual_seed(0)
    network = MixTransformer("mit_b1")
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert not module.bias.any(), name
        if isinstance(module, nn.Linear):
            _check_std(module.weight, 0.02, name)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
            _check_std(module.weight, math.sqrt(2 / fan_out), name)
        elif isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()) and not module.bias.any(), name


def _check_std(weight: Tensor, expected: float, name: str) -> None:
    assert abs(weight.std().item() / expected - 1) < 6 / math.sqrt(2 * weight.numel()), name
