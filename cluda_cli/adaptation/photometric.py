"""Strong augmentation of mixed images: colour jitter and Gaussian blur (DACS).

B batch, H W pixels. The operations are those of kornia 0.5.8, with which the published results were made: brightness
is added and contrast multiplies, so torchvision's and newer kornia's jitter are different augmentations.
Random numbers are drawn on the CPU, so that every device augments alike; nothing is read back from the device.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.models.normalisation import Normalisation

NEGLIGIBLE = 1e-12  # blur weights below this share of the central one are left out


def strong_augment(
    image: Tensor,
    normalisation: Normalisation,
    mixing: settings.Mixing,
    generator: torch.Generator,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Jitter and blur normalised images (B 3 H W).

    `generator` decides for the batch whether to, `generators` decide for each image how much. Every number is drawn
    whether used or not, so that one probability does not change what the other one decides.
    """
    strength, (smallest, largest) = mixing.jitter_strength, mixing.blur_sigma
    jitter, blur = torch.rand(2, generator=generator).tolist()
    offset = strength * (2 * torch.stack([torch.rand(4, generator=g) for g in generators]) - 1)  # B 4
    order = torch.stack([torch.randperm(4, generator=g) for g in generators])  # B 4
    sigma = smallest + (largest - smallest) * torch.stack([torch.rand((), generator=g) for g in generators])  # B
    if jitter > 1 - mixing.jitter_probability:
        factors = offset + torch.tensor([1.0, 1.0, 1.0, 0.0])
        image = normalisation.apply(255 * color_jitter(normalisation.invert(image), factors, order))
    if blur > 1 - mixing.blur_probability:
        image = gaussian_blur(image, sigma)
    return image


def color_jitter(image: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Adjust RGB images in 0..1 (B 3 H W), each with its own factors and order of operations (both on the CPU).

    `factors` (B 4) holds brightness, contrast and saturation, 1 = unchanged, and hue in turns, 0 = unchanged. `order`
    (B 4) is a permutation of these four positions. Values may leave 0..1 by rounding only.
    """
    adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    jittered = []
    for one, factor, positions in zip(image, factors.tolist(), order.tolist(), strict=True):
        for position in positions:
            one = adjust[position](one, factor[position])
        jittered.append(one)
    return torch.stack(jittered)


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    """Add factor - 1 to RGB in 0..1 (... 3 H W)."""
    return (image + (factor - 1)).clamp(0, 1)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply RGB in 0..1 (... 3 H W) by the factor; black, not the mean, stays."""
    return (image * factor).clamp(0, 1)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of RGB in 0..1 (... 3 H W) by the factor."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue, (saturation * factor).clamp(0, 1), value)


def adjust_hue(image: Tensor, turns: float) -> Tensor:
    """Turn the hue of RGB in 0..1 (... 3 H W)."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue + 6 * turns, saturation, value)


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in sixths of a turn, [0, 6), saturation and value, 0..1 (each ... H W), of RGB in 0..1 (... 3 H W).

    Smith, "Color gamut transform pairs", 1978; the small number under the saturation is kornia's.
    """
    red, green, blue = image.unbind(dim=-3)
    value, smallest = image.amax(dim=-3), image.amin(dim=-3)
    spread = value - smallest
    divisor = torch.where(spread == 0, 1, spread)
    hue = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    return hue.remainder(6), spread / (value + 1e-6), value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB in 0..1 (... 3 H W) of hue in sixths of a turn, any real number, saturation and value, 0..1 (... H W).

    Each channel is at the value within a sixth of a turn around its own hue, at value * (1 - saturation) opposite to
    it, and linear between: the closed form of Smith's six cases.
    """
    channels = []
    for centre in (0, 2, 4):  # hues of red, green and blue
        distance = ((hue - centre + 3).remainder(6) - 3).abs()  # 0..3
        channels.append(value * (1 - saturation * (distance - 1).clamp(0, 1)))
    return torch.stack(channels, dim=-3)


def gaussian_blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur images (B 3 H W), each with its own standard deviation in pixels (`sigma`, B, on the CPU).

    Borders are reflected. The kernel of an axis is as long as `kernel_size` says, except that taps too small to be
    measured, as most are in a large image, are left out.
    """
    reach = math.ceil(float(sigma.max()) * math.sqrt(-2 * math.log(NEGLIGIBLE)))
    rows, columns = (min(kernel_size(length) // 2, reach) for length in image.shape[2:])
    padded = F.pad(image, (columns, columns, rows, rows), mode="reflect")
    vertical, horizontal = (gaussian_kernel(sigma, radius).to(image.dtype) for radius in (rows, columns))  # B taps
    return _weighted_shifts(_weighted_shifts(padded, vertical, dim=2), horizontal, dim=3)


def _weighted_shifts(image: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Correlate an axis of each image (B 3 H W) with its own kernel (B taps); the axis loses taps - 1 pixels.

    A sum of shifted images is quicker than a grouped convolution here, and keeps float32 where a convolution may be
    run in less (autocast, TF32).
    """
    length = image.shape[dim] - kernel.shape[1] + 1
    total = torch.zeros_like(image.narrow(dim, 0, length))
    kernel = kernel.to(image.device, non_blocking=True)
    for shift, weight in enumerate(kernel.unbind(dim=1)):
        total.addcmul_(image.narrow(dim, shift, length), weight[:, None, None, None])
    return total


def gaussian_kernel(sigma: Tensor, radius: int) -> Tensor:
    """Kernels exp(-d^2 / (2 sigma^2)), d = -radius..radius, of sum 1: sigma (B) -> B taps, float64."""
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return (-(distance**2) / (2 * sigma.double()[:, None] ** 2)).softmax(dim=1)


def kernel_size(length: int) -> int:
    """Taps of the blur for an image of this many pixels: a tenth, rounded up, less one where that is even (DACS)."""
    tenth = math.ceil(length / 10)
    return tenth if tenth % 2 else tenth - 1
