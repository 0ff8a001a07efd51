"""The contrast of context and detail equals its plain form, in value and all gradients, whatever the crop and the mix.

N pixels, all tensors float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.objectives.contrast import tiles as contrast_tiles
from cluda_cli.objectives.contrast.kernel import multires_contrast, tiled_contrast

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def plain(
    features: Tensor, detail: Tensor, inside: Tensor, mix: Tensor, label: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    """The same mathematics, pixel by pixel of the definition, with N x N matrices and autograd."""
    valid = label != 255
    features, detail, inside, mix, label, weight = (x[valid] for x in (features, detail, inside, mix, label, weight))
    context, close = F.normalize(features, dim=1), F.normalize(torch.where(inside[:, None], detail, 0), dim=1)
    same = label[:, None] == label
    positive = same & ~torch.eye(len(label), dtype=torch.bool)
    share = torch.where(inside[:, None] & inside, mix[:, None] * mix, 0)

    def cost(others: Tensor, negative: Tensor) -> Tensor:
        similarity = context @ others.T / temperature
        negatives = torch.where(negative, similarity.exp(), 0).sum(dim=1, keepdim=True)
        return torch.log(similarity.exp() + negatives) - similarity

    pairs = (1 - share) * cost(context, ~same) + share * cost(close, ~same & inside)
    pairs = pairs * positive * weight[:, None] * weight
    return (pairs.sum(dim=1) / positive.sum(dim=1).clamp_min(1)).sum() / (2 * max(len(label), 1))


def value_and_gradients(form, inputs: Inputs, temperature: float, *options) -> tuple[Tensor, ...]:
    """The value and its gradients by features, detail and mix."""
    features, detail, inside, mix, label, weight = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (features, detail, mix)]
    value = form(leaves[0], leaves[1], inside, leaves[2], label, weight, temperature, *options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def problem(label: list[int] | Tensor, inside: float | list[int] | Tensor = 0.4, channels: int = 6) -> Inputs:
    """`inside`: the share of pixels in the crop, or the pixels themselves. Detail outside is far from zero."""
    generator = torch.Generator().manual_seed(7)
    label = torch.as_tensor(label)
    count = len(label)
    features, detail = torch.randn(2, count, channels, generator=generator, dtype=torch.float64)
    mix, weight, chance = torch.rand(3, count, generator=generator, dtype=torch.float64)
    inside = chance < inside if isinstance(inside, float) else torch.as_tensor(inside).bool()
    return features, detail, inside, mix, label, weight


UNEVEN = torch.tensor([4, 0, 255, 11, 18])[(torch.arange(70) ** 2 * 7 % 31 % 9).clamp_max(4)]
CASES = {
    "uneven classes": problem(UNEVEN),
    "no ignored pixels": problem(UNEVEN.clamp_max(20)),
    "many classes": problem(torch.arange(90) % 30),
    "nothing inside": problem(UNEVEN, 0.0),
    "everything inside": problem(UNEVEN, 1.0),
    "one pixel inside": problem([0, 1, 0, 1, 1], [0, 0, 1, 0, 0]),
    "a class of one pixel": problem([3, 3, 3, 7, 5, 5], [1, 1, 0, 1, 1, 1]),
    "a class with one pixel inside": problem([3, 3, 3, 7, 7, 7], [1, 1, 1, 1, 0, 0]),
    "one class": problem([4] * 7),
    "one class inside, no negatives there": problem([3, 3, 3, 7, 7], [1, 1, 1, 0, 0]),
    "only ignored pixels inside": problem([3, 3, 7, 7, 255, 255], [0, 0, 0, 0, 1, 1]),
    "all ignored": problem([255] * 5),
}
BOTH_CHOICES = pytest.mark.parametrize("masked", [False, True], ids=["sorted", "masked"])


@BOTH_CHOICES
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_form(name: str, temperature: float, masked: bool) -> None:
    expected = value_and_gradients(plain, CASES[name], temperature)
    actual = value_and_gradients(multires_contrast, CASES[name], temperature, 0, masked)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@BOTH_CHOICES
@pytest.mark.parametrize("tile", [3, 7, 32, 1000])
@pytest.mark.parametrize("name", ["uneven classes", "everything inside"])
def test_tiles_and_kept_exponentials_do_not_matter(
    name: str, tile: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = value_and_gradients(plain, CASES[name], 0.3)
    for budget in (0, 300, 10_000):
        monkeypatch.setattr(contrast_tiles, "KEPT", budget)
        actual = value_and_gradients(multires_contrast, CASES[name], 0.3, tile, masked)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_a_mix_of_zero_is_half_the_contrast_of_one_resolution(name: str) -> None:
    features, detail, inside, mix, label, weight = CASES[name]
    value, to_features, to_detail, _ = value_and_gradients(
        multires_contrast, (features, detail, inside, torch.zeros_like(mix), label, weight), 0.5
    )
    features = features.clone().requires_grad_()
    expected = tiled_contrast(features, label, weight, 0.5) / 2
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(to_features, torch.autograd.grad(expected, features)[0], rtol=1e-12, atol=1e-16)
    assert torch.equal(to_detail, torch.zeros_like(to_detail))


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_equals_the_plain_form_at_the_ends_of_the_mix(amount: float) -> None:
    features, detail, inside, mix, label, weight = CASES["uneven classes"]
    inputs = (features, detail, inside, torch.full_like(mix, amount), label, weight)
    actual, expected = (value_and_gradients(form, inputs, 0.2) for form in (multires_contrast, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_a_mix_of_one_everywhere_reads_the_context_as_anchors_only() -> None:
    """With the same features as detail it is half the contrast of one resolution again."""
    features, _, _, mix, label, weight = CASES["everything inside"]
    everywhere = torch.ones_like(label, dtype=torch.bool)
    value = multires_contrast(features, features, everywhere, torch.ones_like(mix), label, weight, 0.5)
    torch.testing.assert_close(value, tiled_contrast(features, label, weight, 0.5) / 2, rtol=1e-13, atol=0)


@BOTH_CHOICES
def test_nothing_to_contrast_is_exactly_zero_and_connected(masked: bool) -> None:
    for label in ([255] * 4, [4] * 4, [0, 1, 2, 3]):
        value, *gradients = value_and_gradients(multires_contrast, problem(label, 1.0), 1.0, 0, masked)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients)


def test_order_of_pixels_does_not_matter() -> None:
    inputs = CASES["uneven classes"]
    order = torch.randperm(len(UNEVEN), generator=torch.Generator().manual_seed(0))
    value, *gradients = value_and_gradients(multires_contrast, inputs, 0.3)
    permuted_value, *permuted = value_and_gradients(multires_contrast, tuple(x[order] for x in inputs), 0.3)
    torch.testing.assert_close(permuted_value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(permuted, [gradient[order] for gradient in gradients], rtol=1e-10, atol=1e-15)


def test_repeats_exactly() -> None:
    first, second = (value_and_gradients(multires_contrast, CASES["uneven classes"], 0.3, 32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BOTH_CHOICES
@pytest.mark.parametrize("filling", [0.0, 1e30, torch.nan])
def test_detail_and_mix_outside_the_crop_and_ignored_pixels_have_no_influence(filling: float, masked: bool) -> None:
    features, detail, inside, mix, label, weight = CASES["uneven classes"]
    expected = value_and_gradients(multires_contrast, CASES["uneven classes"], 0.3, 0, masked)
    unused = ~inside | (label == 255)
    assert unused.any()
    detail, mix = torch.where(unused[:, None], filling, detail), torch.where(unused, filling, mix)
    features = torch.where((label == 255)[:, None], filling, features)
    actual = value_and_gradients(multires_contrast, (features, detail, inside, mix, label, weight), 0.3, 0, masked)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not actual[2][unused].any()
    assert not actual[3][unused].any()


def test_detail_of_length_zero_is_similar_to_none_and_gets_no_gradient() -> None:
    features, detail, inside, mix, label, weight = CASES["everything inside"]
    detail = detail.clone()
    detail[::3] = 0
    inputs = (features, detail, inside, mix, label, weight)
    actual, expected = (value_and_gradients(form, inputs, 0.3) for form in (multires_contrast, plain))
    some = torch.arange(len(label)) % 3 != 0
    assert not actual[2][~some].any()
    torch.testing.assert_close(actual[2][some], expected[2][some], rtol=1e-10, atol=1e-13)
    for i in (0, 1, 3):
        torch.testing.assert_close(actual[i], expected[i], rtol=1e-10, atol=1e-13)


def test_off_the_cpu_nothing_is_read_back() -> None:
    inputs = tuple(tensor.to("meta") for tensor in CASES["uneven classes"])
    value, *gradients = value_and_gradients(multires_contrast, inputs, 0.3)
    assert value.device.type == "meta" and [g.shape for g in gradients] == [inputs[i].shape for i in (0, 1, 3)]


def test_gradients_agree_with_finite_differences() -> None:
    features, detail, inside, mix, label, weight = problem([0, 1, 1, 255, 2, 0, 1, 2], [1, 1, 0, 1, 1, 1, 1, 0], 3)
    leaves = (features.requires_grad_(), detail.requires_grad_(), mix.requires_grad_())
    assert torch.autograd.gradcheck(lambda f, d, m: multires_contrast(f, d, inside, m, label, weight, 0.5, 3), leaves)


def test_the_value_alone_is_the_same_and_gradients_scale() -> None:
    inputs = CASES["uneven classes"]
    alone = multires_contrast(*inputs, 1.0)
    assert not alone.requires_grad
    once = value_and_gradients(multires_contrast, inputs, 1.0)
    thrice = value_and_gradients(lambda *a: 3 * multires_contrast(*a), inputs, 1.0)
    torch.testing.assert_close(alone, once[0])
    torch.testing.assert_close(thrice, tuple(3 * tensor for tensor in once))


@pytest.mark.parametrize("leaf", [0, 1, 3], ids=["features", "detail", "mix"])
def test_one_input_alone_may_need_its_gradient(leaf: int) -> None:
    inputs = list(CASES["uneven classes"])
    expected = value_and_gradients(multires_contrast, CASES["uneven classes"], 1.0)[{0: 1, 1: 2, 3: 3}[leaf]]
    inputs[leaf] = inputs[leaf].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(multires_contrast(*inputs, 1.0), inputs[leaf])[0], expected)


@BOTH_CHOICES
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_float32_agrees(temperature: float, masked: bool) -> None:
    features, detail, inside, mix, label, weight = (x.float() if x.is_floating_point() else x for x in problem(UNEVEN))
    single = (features, detail, inside, mix, label, weight)
    double = tuple(x.double() if x.is_floating_point() else x for x in single)
    expected = value_and_gradients(plain, double, temperature)
    actual = value_and_gradients(multires_contrast, single, temperature, 0, masked)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    for ours, exact in zip(actual, expected, strict=True):
        assert (ours - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize(
    ("num_images", "weighted", "keep_ignored", "expected"),
    [
        (1, False, False, 1.30193210),
        (1, True, False, 0.55669453),
        (2, False, False, 1.53439761),
        (2, True, False, 0.70687114),
        (1, False, True, 1.46615207),
        (2, False, True, 1.73930216),
    ],
)
def test_values_of_the_specification(num_images: int, weighted: bool, keep_ignored: bool, expected: float) -> None:
    """Features B 4 3 5 and maps B 3 5 given by formulas; the crop lies elsewhere in each image."""
    b, c, h, w = (
        axis.double() for axis in torch.meshgrid(*(torch.arange(n) for n in (num_images, 4, 3, 5)), indexing="ij")
    )
    features = torch.sin(0.7 * c + 1.3 * h + 0.4 * w + 2.1 * b + 0.2)
    detail = torch.cos(0.5 * c + 0.9 * h - 0.6 * w + 1.7 * b)
    b, h, w = b[:, 0], h[:, 0], w[:, 0]
    inside = (h >= 1 - b) & (h <= 2 - b) & (w >= 1 + b) & (w <= 3 + b)
    mix = 0.2 + 0.05 * h + 0.03 * w + 0.1 * b
    label = torch.tensor([0, 6, 10, 255])[(2 * h + w + 3 * b).long() % 4]
    if keep_ignored:
        label = label.where(label != 255, 100)
    weight = torch.where(w % 2 == 0, 1 / (1 + h), torch.tensor(0.8).double()) if weighted else torch.ones_like(h)
    rows = [maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (features, detail * inside[:, None])]
    value = multires_contrast(*rows, inside.flatten(), mix.flatten(), label.flatten(), weight.flatten(), 1.0)
    assert value.item() == pytest.approx(expected, abs=6e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile", [0, 100])
def test_a_gpu_agrees(tile: int) -> None:
    inputs = problem(torch.arange(2000) ** 2 % 11, channels=16)
    expected = value_and_gradients(multires_contrast, inputs, 0.1)
    actual = value_and_gradients(multires_contrast, tuple(x.cuda() for x in inputs), 0.1, tile)
    torch.testing.assert_close([x.cpu() for x in actual], list(expected), rtol=1e-8, atol=1e-12)
