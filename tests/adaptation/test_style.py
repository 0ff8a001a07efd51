"""Moments and low frequencies: what is taken from an image and what is put in their place."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.adaptation.style import low_amplitude, moments, remove_style, replace_low_amplitude, transfer_moments

EPSILON = 1e-5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everywhere(image: Tensor) -> Tensor:
    return torch.ones(len(image), *image.shape[2:], dtype=torch.bool)


def within(actual: Tensor, tensors: dict[str, Tensor], description: dict[str, Any], name: str) -> bool:
    """Whether a float32 result is as near to the reference as its description demands."""
    expected = tensors.get(f"out64.{name}", tensors[f"out.{name}"]).double()
    bound = description["tolerance_demanded"]["bounds"][name]["float32_max_abs"]
    return (actual.double() - expected).abs().max().item() <= bound


@pytest.mark.reference
def test_zero_style_image_as_the_reference(golden: Any) -> None:
    tensors, description = golden("26_style_tail/z01_zero_style")
    image = tensors["in.image"].float()
    mean, deviation = moments(image, everywhere(image))
    assert within(mean[:, :, 0, 0], tensors, description, "mean")
    assert within(deviation[:, :, 0, 0], tensors, description, "std")
    assert within(remove_style(image, everywhere(image), EPSILON), tensors, description, "zero_style")
    changed = image * tensors["in.gain"].float() + tensors["in.offset"].float()
    again = remove_style(changed, everywhere(image), EPSILON)
    assert within(again, tensors, description, "zero_style_after_gain_offset")


def test_gain_and_offset_change_nothing() -> None:
    image = noise(2, 3, 12, 16)
    gain, offset = 0.2 + noise(2, 3, 1, 1, seed=1).abs(), noise(2, 3, 1, 1, seed=2)
    plain, changed = (remove_style(x, everywhere(x), EPSILON) for x in (image, gain * image + offset))
    torch.testing.assert_close(changed, plain, atol=2e-4, rtol=0)
    assert not torch.allclose(plain, image, atol=0.01)


def test_a_constant_channel_becomes_zero() -> None:
    image = noise(1, 3, 8, 8)
    image[:, 1] = 0.75
    plain = remove_style(image, everywhere(image), EPSILON)
    assert torch.all(plain[:, 1] == 0) and torch.isfinite(plain).all()


def test_padding_has_no_part_and_stays_zero() -> None:
    image, inside = noise(2, 3, 12, 16), torch.ones(2, 12, 16, dtype=torch.bool)
    inside[:, 9:], inside[1] = False, False
    padded = image * inside[:, None]
    plain = remove_style(padded, inside, EPSILON)
    assert torch.all(plain * ~inside[:, None] == 0)
    alone = image[:1, :, :9]
    torch.testing.assert_close(plain[:1, :, :9], remove_style(alone, everywhere(alone), EPSILON))
    assert torch.all(plain[1] == 0)  # nothing but padding


def test_a_region_gets_the_moments_of_the_target() -> None:
    source, target = noise(2, 3, 12, 12), 0.3 * noise(2, 3, 12, 12, seed=1) + 2
    region = noise(2, 12, 12, seed=2) > 0.7
    changed = transfer_moments(source, region, target, everywhere(target), EPSILON)
    for found, expected in zip(moments(changed, region), moments(target, everywhere(target)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    empty = torch.zeros_like(region)
    assert torch.isfinite(transfer_moments(source, empty, target, everywhere(target), EPSILON)).all()


def test_amplitudes_are_those_of_waves() -> None:
    """A wave along the columns, and one along both axes whose frequency is negative in the rows."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    one = 3 * torch.cos(2 * math.pi * (2 * columns / 24 + 0.1))
    two = 0.5 * torch.cos(2 * math.pi * (columns / 24 - rows / 16))
    found = low_amplitude((one + two).expand(1, 3, 16, 24), 2)
    expected = torch.zeros(1, 3, 5, 3)
    expected[:, :, 2, 2], expected[:, :, 1, 1] = 1.5, 0.25
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 24), (15, 17)])
def test_low_amplitudes_are_replaced_and_nothing_else(size: tuple[int, int]) -> None:
    image, other = noise(2, 3, *size), noise(1, 3, *size, seed=1)
    wanted = low_amplitude(other, 2)
    changed = replace_low_amplitude(image, wanted[0])
    torch.testing.assert_close(low_amplitude(changed, 2), wanted.expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(replace_low_amplitude(image[:1], low_amplitude(image[:1], 2)[0]), image[:1])
    change = torch.fft.rfft2(changed - image, norm="forward").abs()
    change[:, :, [0, 1, 2, -2, -1], :3] = 0
    assert change.max() < 1e-6
