"""Strong augmentation against numbers measured on the operations that the published results used."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    gaussian_blur,
    gaussian_kernel,
    hsv_to_rgb,
    kernel_size,
    rgb_to_hsv,
    strong_augment,
)
from cluda_cli.models.normalisation import IMAGENET

ADJUST = {
    "brightness": lambda image, value: adjust_brightness(image, 1 + value),
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue_radians": lambda image, value: adjust_hue(image, value / (2 * math.pi)),
}


def augment(image: Tensor, mixing: settings.Mixing, seed: int = 0) -> Tensor:
    generators = [generator(1000 * (seed + 1) + i) for i in range(len(image))]
    return strong_augment(image, IMAGENET, mixing, generator(seed), generators)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wave(height: int, width: int) -> Tensor:
    """sin(0.3 h + 0.5 w + 1.1 c), 1 3 H W."""
    c, h, w = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.sin(0.3 * h + 0.5 * w + 1.1 * c)[None]


def numbers(image: Tensor) -> list[float]:
    """Mean, standard deviation, first three values and the last."""
    flat = image.flatten()
    return [flat.mean().item(), flat.std(correction=0).item(), *flat[:3].tolist(), flat[-1].item()]


@pytest.mark.parametrize(
    ("factors", "order", "expected"),
    [
        ([0.85, 1, 1, 0], [0], [0.34650982, 0.31950331, 0.35, 0.58971274, 0.77073550, 0.67514396]),
        ([1, 1.2, 1, 0], [1], [0.53121790, 0.38126534, 0.6, 0.88765538, 1, 0.99017274]),
        ([1, 1, 0.8, 0], [2], [0.53091165, 0.30982715, 0.58912116, 0.79172784, 0.92290932, 0.85731608]),
        ([1, 1, 1, -0.2], [3], [0.47789252, 0.33159350, 0.63047665, 0.99978679, 0.93160468, 0.61575526]),
        ([1.1, 0.9, 1.2, 0.1], [3, 0, 2, 1], [0.46288854, 0.33655619, 0.46800098, 0.69878566, 0.62380189, 0.89999998]),
    ],
)
def test_jitter_numbers(factors: list[float], order: list[int], expected: list[float]) -> None:
    jittered = color_jitter(0.5 + 0.5 * wave(12, 20), torch.tensor([factors]), torch.tensor([order]))
    assert numbers(jittered) == pytest.approx(expected, abs=2e-6)


def test_each_image_is_jittered_by_its_own_factors_in_its_own_order() -> None:
    image = (0.5 + 0.5 * wave(6, 8)).repeat(2, 1, 1, 1)
    factors = torch.tensor([[1.2, 0.8, 1.1, 0.1], [0.9, 1.1, 0.8, -0.2]])
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    both = color_jitter(image, factors, order)
    for i in (0, 1):
        assert torch.equal(both[i : i + 1], color_jitter(image[i : i + 1], factors[i : i + 1], order[i : i + 1]))
    swapped = color_jitter(image, factors, order.flip(0))
    assert not torch.allclose(both, swapped, atol=1e-3)


def test_grey_and_black_have_no_hue_to_turn() -> None:
    grey = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    torch.testing.assert_close(adjust_hue(grey, 0.3), grey)
    torch.testing.assert_close(adjust_saturation(grey, 1.2), grey)


@pytest.mark.parametrize(
    ("length", "taps"), [(32, 3), (48, 5), (128, 13), (256, 25), (384, 39), (512, 51), (768, 77), (1024, 103)]
)
def test_kernel_sizes(length: int, taps: int) -> None:
    assert kernel_size(length) == taps


def test_blur_numbers() -> None:
    blurred = gaussian_blur(wave(32, 48), torch.tensor([0.8]))
    expected = [-0.00661612, 0.64102791, 0.38105422, 0.56858724, 0.83134168, -0.02730807]
    assert numbers(blurred) == pytest.approx(expected, abs=2e-6)


def test_taps_left_out_of_a_large_kernel_cannot_be_measured() -> None:
    image = torch.randn(2, 3, 240, 310, dtype=torch.float64, generator=generator())
    sigma = torch.tensor([1.15, 0.15])
    rows, columns = kernel_size(240) // 2, kernel_size(310) // 2
    assert rows == 11 and columns == 15  # the shorter kernel of gaussian_blur has radius 9
    padded = F.pad(image, (columns, columns, rows, rows), mode="reflect").transpose(0, 1)  # 3 B H W, image = channel
    full = F.conv2d(padded, gaussian_kernel(sigma, rows)[:, None, :, None], groups=2)
    full = F.conv2d(full, gaussian_kernel(sigma, columns)[:, None, None, :], groups=2).transpose(0, 1)
    torch.testing.assert_close(gaussian_blur(image, sigma), full, rtol=0, atol=1e-9)


def test_each_image_is_blurred_by_its_own_sigma() -> None:
    image = torch.randn(2, 3, 40, 60, generator=generator())
    sigma = torch.tensor([0.2, 1.1])
    both = gaussian_blur(image, sigma)
    for i in (0, 1):
        torch.testing.assert_close(both[i : i + 1], gaussian_blur(image[i : i + 1], sigma[i : i + 1]))
    assert (both[1] - image[1]).abs().mean() > 10 * (both[0] - image[0]).abs().mean()


def test_blur_ignores_autocast() -> None:
    image = torch.randn(1, 3, 40, 60, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        blurred = gaussian_blur(image, torch.tensor([0.8]))
    assert torch.equal(blurred, gaussian_blur(image, torch.tensor([0.8])))


@pytest.mark.parametrize("size", [(1, 1), (3, 25), (21, 4)])
def test_small_images_can_be_augmented(size: tuple[int, int]) -> None:
    image = torch.zeros(1, 3, *size)
    on = settings.Mixing(jitter_probability=1, blur_probability=1)
    assert augment(image, on).shape == image.shape


def test_nothing_happens_with_probability_zero() -> None:
    image = torch.randn(2, 3, 40, 40, generator=generator())
    off = settings.Mixing(jitter_probability=0, blur_probability=0)
    assert all(torch.equal(augment(image, off, s), image) for s in range(20))


def test_batches_are_augmented_as_often_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "cluda_cli.adaptation.photometric"
    seen: list[tuple[int, str, int]] = []
    for operation in ("color_jitter", "gaussian_blur"):
        note = lambda image, *_, name=operation: seen.append((seed, name, len(image))) or image  # noqa: E731
        monkeypatch.setattr(f"{module}.{operation}", note)
    mixing = settings.Mixing(jitter_probability=0.8, blur_probability=0.5)
    for seed in range(1000):
        augment(torch.zeros(2, 3, 1, 1), mixing, seed)
    assert all(count == 2 for _, _, count in seen)  # decided for the batch
    jittered, blurred = ({s for s, name, _ in seen if name == n} for n in ("color_jitter", "gaussian_blur"))
    # Within four standard deviations; 0.4 = 0.8 * 0.5, the two are independent.
    shares = [len(steps) / 1000 for steps in (jittered, blurred, jittered & blurred)]
    assert shares == pytest.approx([0.8, 0.5, 0.4], abs=0.063)


def test_one_probability_does_not_change_what_the_other_draws() -> None:
    image = torch.randn(2, 3, 40, 40, generator=generator())
    jittered = settings.Mixing(jitter_probability=1, blur_probability=0)
    both = settings.Mixing(jitter_probability=1, blur_probability=1)
    blurred = settings.Mixing(jitter_probability=0, blur_probability=1)
    once = augment(image, jittered)
    torch.testing.assert_close(augment(image, both), augment(once, blurred))


def test_draws_cover_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []
    sigmas: list[Tensor] = []
    module = "cluda_cli.adaptation.photometric"
    monkeypatch.setattr(f"{module}.color_jitter", lambda image, f, o: drawn.append((f, o)) or image)
    monkeypatch.setattr(f"{module}.gaussian_blur", lambda image, s: sigmas.append(s) or image)
    mixing = settings.Mixing(jitter_probability=1, blur_probability=1, jitter_strength=0.3, blur_sigma=(0.5, 2.0))
    for seed in range(200):
        augment(torch.zeros(2, 3, 4, 4), mixing, seed)
    factors = torch.cat([f for f, _ in drawn])  # 400 4
    low, high = torch.tensor([0.7, 0.7, 0.7, -0.3]), torch.tensor([1.3, 1.3, 1.3, 0.3])
    assert torch.all(factors >= low) and torch.all(factors <= high)
    torch.testing.assert_close(factors.amin(dim=0), low, rtol=0, atol=0.02)
    torch.testing.assert_close(factors.amax(dim=0), high, rtol=0, atol=0.02)
    assert {tuple(row) for _, o in drawn for row in o.tolist()} >= {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert all(sorted(row) == [0, 1, 2, 3] for _, o in drawn for row in o.tolist())
    sigma = torch.cat(sigmas)
    assert 0.5 <= sigma.min() < 0.52 and 1.98 < sigma.max() <= 2.0
    for of_image in (factors, torch.cat([o for _, o in drawn]), sigma):
        assert not torch.equal(of_image[::2], of_image[1::2])


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjustments_as_the_reference(golden: Any, dtype: torch.dtype) -> None:
    tensors, description = golden("08_strong/colour_ops")
    image = tensors["in.rgb"].to(dtype)
    results = {}
    for key in description["tolerance_demanded"]["bounds"]:
        name, _, value = key.partition(".")
        if name in ADJUST:
            results[key] = ADJUST[name](image, float(value))
    assert len(results) == 16
    hue, saturation, value = rgb_to_hsv(image)
    results["hsv"] = torch.stack([hue * math.pi / 3, saturation, value], dim=1)
    results["rgb_again"] = hsv_to_rgb(hue, saturation, value)
    assert_within(results, tensors, description)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jitter_as_the_reference(golden: Any, dtype: torch.dtype) -> None:
    tensors, description = golden("08_strong/colour_jitter")
    mean, std = (torch.tensor(description["settings"][k]).view(3, 1, 1).to(dtype) for k in ("mean", "std"))
    results = {}
    for case in description["settings"]["cases"]:
        p = case["params"]
        names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
        factors = torch.tensor([p[n] for n in names], dtype=torch.float64).T
        factors[:, 3] *= torch.tensor(math.pi).item() / math.pi  # the reference's pi is rounded to float32
        image = tensors["in.image_batch2" if len(factors) == 2 else "in.image"].to(dtype)
        order = torch.tensor(p["order"]).expand(len(factors), 4)
        results[case["name"]] = (color_jitter((image * std + mean) / 255, factors, order) * 255 - mean) / std
        if dtype == torch.float32:
            ours = IMAGENET.apply(255 * color_jitter(IMAGENET.invert(image), factors, order))
            torch.testing.assert_close(ours, results[case["name"]], rtol=0, atol=2e-5)
    assert_within(results, tensors, description)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blur_as_the_reference(golden: Any, dtype: torch.dtype) -> None:
    tensors, description = golden("08_strong/gaussian_blur")
    results = {}
    for key in description["tolerance_demanded"]["bounds"]:
        sigma = torch.tensor([float(key.split("sigma")[1])], dtype=torch.float64)
        if key.startswith("blur"):
            results[key] = gaussian_blur(tensors["in.image"].to(dtype), sigma)
        else:
            taps = int(key.split(".")[1].removeprefix("k"))
            results[key] = gaussian_kernel(sigma, taps // 2)[0].to(dtype)
    assert len(results) == 11
    assert_within(results, tensors, description)
    for length, taps in description["settings"]["kernel_size_by_axis_length"].items():
        assert kernel_size(int(length)) == taps, length


def assert_within(results: dict[str, Tensor], tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Every result agrees with the reference within the bound measured for its precision."""
    for key, result in results.items():
        bound = description["tolerance_demanded"]["bounds"][key]
        bound = bound["float32_max_abs" if result.dtype == torch.float32 else "float64_max_abs"]
        difference = (result.double() - tensors[f"out64.{key}"]).abs().max().item()
        assert difference <= bound, f"{key}: {difference} > {bound}"
