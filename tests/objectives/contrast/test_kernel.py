"""The tiled contrast equals its definition, in value and gradient, whatever the labels and the tiles."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluda_cli.objectives.contrast import tiles as contrast_tiles
from cluda_cli.objectives.contrast.kernel import tiled_contrast
from cluda_cli.objectives.pixel_contrast import contrast

REFERENCE = [
    "c01_basic", "c02_fdist", "c03_pseudo_weight", "c04_fdist_pseudo_weight", "c05_single_pixel_class",
    "c06_one_class_only", "c07_all_distinct", "c08_all_ignore", "c09_batch1", "c10_temperature",
]  # fmt: skip


def value_and_gradient(form, features, label, weight, temperature, *options):
    features = features.clone().requires_grad_()
    value = form(features, label, weight, temperature, *options)
    (gradient,) = torch.autograd.grad(value, features)
    return value.detach(), gradient


def problem(label: list[int] | Tensor, channels: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.as_tensor(label)
    features = torch.randn(len(label), channels, generator=generator, dtype=torch.float64)
    return features, label, torch.rand(len(label), generator=generator, dtype=torch.float64)


def uneven(num_pixels: int, ids: list[int], seed: int = 0) -> Tensor:
    """Labels with shares that halve from class to class."""
    generator = torch.Generator().manual_seed(seed)
    shares = 0.5 ** torch.arange(len(ids))
    return torch.tensor(ids)[torch.multinomial(shares, num_pixels, replacement=True, generator=generator)]


LABELS = {
    "two classes": [0, 1, 0, 1, 1],
    "a class of one pixel": [3, 3, 3, 7, 5, 5],
    "ignored pixels": [2, 255, 2, 9, 9, 255, 255, 2],
    "largest and smallest id": [254, 0, 254, 0],
    "interleaved": [0, 1, 2] * 9,
    "uneven": uneven(150, [4, 0, 255, 11, 18, 1]),
    "many classes": torch.arange(120) % 40,
}


BOTH_CHOICES = pytest.mark.parametrize("masked", [False, True], ids=["sorted", "masked"])


@BOTH_CHOICES
@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("name", LABELS)
def test_equals_the_plain_form(name: str, temperature: float, masked: bool) -> None:
    expected = value_and_gradient(contrast, *problem(LABELS[name]), temperature)
    actual = value_and_gradient(tiled_contrast, *problem(LABELS[name]), temperature, 0, masked)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)


@BOTH_CHOICES
@pytest.mark.parametrize("tile", [1, 7, 64, 149, 1000])
def test_tiles_do_not_matter(tile: int, masked: bool) -> None:
    inputs = problem(uneven(150 if tile > 1 else 40, [4, 0, 255, 11, 18]))
    expected = value_and_gradient(tiled_contrast, *inputs, 0.3)
    actual = value_and_gradient(tiled_contrast, *inputs, 0.3, tile, masked)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@BOTH_CHOICES
@pytest.mark.parametrize("budget", [0, 500, 4000])
def test_the_budget_of_kept_exponentials_does_not_matter(
    budget: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(uneven(150, [4, 0, 255, 11, 18]))
    expected = value_and_gradient(tiled_contrast, *inputs, 0.3, 32)
    monkeypatch.setattr(contrast_tiles, "KEPT", budget)
    actual = value_and_gradient(tiled_contrast, *inputs, 0.3, 32, masked)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "label",
    [[255] * 5, [4] * 5, [0, 1, 2, 3, 4], [3, 255, 255, 255, 255]],
    ids=["all ignored", "one class", "all distinct", "one pixel"],
)
@BOTH_CHOICES
def test_nothing_to_contrast_is_exactly_zero_and_connected(label: list[int], masked: bool) -> None:
    value, gradient = value_and_gradient(tiled_contrast, *problem(label), 1.0, 0, masked)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gradient_agrees_with_finite_differences() -> None:
    features, label, weight = problem([0, 1, 1, 255, 2, 0, 1, 2, 2, 5])
    torch.autograd.gradcheck(lambda f: tiled_contrast(f, label, weight, 0.5, 4), features.requires_grad_())


def test_gradient_scales_with_what_comes_after() -> None:
    inputs = problem(LABELS["uneven"])
    _, once = value_and_gradient(tiled_contrast, *inputs, 1.0)
    _, thrice = value_and_gradient(lambda *a: 3 * tiled_contrast(*a), *inputs, 1.0)
    torch.testing.assert_close(thrice, 3 * once)


def test_cannot_be_differentiated_twice() -> None:
    features, label, weight = problem([0, 1, 0, 1])
    value = tiled_contrast(features.requires_grad_(), label, weight, 1.0)
    (gradient,) = torch.autograd.grad(value**2, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_value_alone_is_the_same() -> None:
    features, label, weight = problem(LABELS["uneven"])
    alone = tiled_contrast(features, label, weight, 1.0)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, value_and_gradient(tiled_contrast, features, label, weight, 1.0)[0])


@BOTH_CHOICES
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("arrangement", ["random", "separated", "confused"])
def test_float32_holds_at_every_temperature(arrangement: str, temperature: float, masked: bool) -> None:
    """Also where a class agrees and opposes all others, and where it opposes itself and agrees with another."""
    features, label, weight = problem(torch.arange(60) % 2, channels=4)
    axis = F.one_hot(torch.tensor(0), 4).double()
    sign = 1 - 2.0 * label if arrangement == "separated" else 1 - 2.0 * (torch.arange(60) // 2 % 2)
    if arrangement != "random":
        features = sign[:, None] * axis + 0.01 * features
    features, weight = features.float().double(), weight.float().double()
    expected = value_and_gradient(plain_in_logarithms, features, label, weight, temperature)
    actual = value_and_gradient(tiled_contrast, features.float(), label, weight.float(), temperature, 0, masked)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-12)
    error = (actual[1] - expected[1]).abs().max()
    assert error <= 1e-4 * expected[1].abs().max() + 1e-30  # what float32 cannot hold counts as zero


def plain_in_logarithms(features: Tensor, label: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """As `plain`, exact also where the terms are far below the precision of float64."""
    unit = F.normalize(features, dim=1)
    similarity = unit @ unit.T / temperature
    same = label[:, None] == label
    positive = same & ~torch.eye(len(label), dtype=torch.bool)
    level = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    cost = F.softplus(level - similarity, threshold=500)
    return ((cost * positive * weight[:, None] * weight).sum(dim=1) / positive.sum(dim=1)).mean()


def test_a_feature_of_length_zero_gets_no_gradient() -> None:
    """Dead pixels after a ReLU have no direction; dividing by their length would make their gradient enormous."""
    features, label, weight = problem([0, 1, 0, 1, 1])
    features[2] = 0
    value, gradient = value_and_gradient(tiled_contrast, features, label, weight, 1.0)
    torch.testing.assert_close(value, contrast(features, label, weight, 1.0))
    assert torch.equal(gradient[2], torch.zeros(6, dtype=torch.float64))
    assert gradient[[0, 1, 3, 4]].abs().min() > 0


@BOTH_CHOICES
@pytest.mark.parametrize("filling", [100.0, torch.nan])
def test_ignored_pixels_neither_act_nor_learn(filling: float, masked: bool) -> None:
    features, label, weight = problem(LABELS["uneven"])
    changed = torch.where(label[:, None] == 255, filling, features)
    first = value_and_gradient(tiled_contrast, features, label, weight, 1.0, 0, masked)
    second = value_and_gradient(tiled_contrast, changed, label, weight, 1.0, 0, masked)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[1][label == 255], torch.zeros(int((label == 255).sum()), 6, dtype=torch.float64))


@BOTH_CHOICES
def test_a_feature_that_is_no_number_shows(masked: bool) -> None:
    features, label, weight = problem([0, 1, 0, 1, 1])
    features[2, 0] = torch.nan
    assert value_and_gradient(tiled_contrast, features, label, weight, 1.0, 0, masked)[0].isnan()


def test_off_the_cpu_nothing_is_read_back() -> None:
    """Tensors on this device have no values, so that reading one (and, on a GPU, waiting for it) raises."""
    inputs = [tensor.to("meta") for tensor in problem(LABELS["uneven"])]
    value, gradient = value_and_gradient(tiled_contrast, *inputs, 1.0)
    assert value.device.type == "meta" and gradient.shape == inputs[0].shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        tiled_contrast(*inputs, 1.0, masked=False)


def test_repeats_exactly() -> None:
    features, label, weight = problem(uneven(3000, [5, 2, 8, 255, 1]), channels=16)
    inputs = features.float(), label, weight.float()
    first, second = (value_and_gradient(tiled_contrast, *inputs, 0.1) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("form", "quadratic"),
    [(contrast, True), (lambda *a: tiled_contrast(*a, 64), False), (lambda *a: tiled_contrast(*a, 64, True), False)],
    ids=["plain", "sorted", "masked"],
)
def test_no_tensor_is_quadratic_in_pixels(form, quadratic: bool) -> None:
    inputs = problem(uneven(1000, [5, 2, 8, 255, 1]), channels=8)
    with LargestTensor() as largest:
        value_and_gradient(form, *inputs, 1.0)
    assert (largest.numel > 100_000) == quadratic  # 64 x 64 and 1000 x 8 against 800 x 800


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", REFERENCE)
def test_reference_vectors(name: str, dtype: torch.dtype, golden) -> None:
    """The reference treats 255 as a class like any other, and its temperatures only scale the result."""
    tensors, description = golden(f"01_cluda_contrastive/{name}")
    settings, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    features = tensors["in.feats"].to(dtype).requires_grad_()  # B D h w
    label = tensors["in.labels"].flatten()
    weight = tensors.get("in.pseudo_weight", torch.ones(label.shape)).flatten().to(dtype)
    ordinary = label.masked_fill(label == 255, 100)
    value = tiled_contrast(features.permute(0, 2, 3, 1).flatten(0, 2), ordinary, weight, 1.0)
    value = value * settings["temperature"] / settings["base_temperature"]
    value.backward()
    bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
    for key, actual in {"loss_aligned": value, "grad_feats_aligned": features.grad}.items():
        expected = tensors[f"out64.{key}"].view(actual.shape)
        assert (actual.detach() - expected).abs().max() <= bounds[key][bits], json.dumps(bounds[key])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile", [0, 100])
def test_a_gpu_agrees(tile: int) -> None:
    features, label, weight = problem(uneven(3000, [5, 2, 8, 255, 1]), channels=16)
    expected = value_and_gradient(tiled_contrast, features, label, weight, 0.1)
    actual = value_and_gradient(tiled_contrast, features.cuda(), label.cuda(), weight.cuda(), 0.1, tile)
    torch.testing.assert_close([t.cpu() for t in actual], list(expected), rtol=1e-8, atol=1e-12)
