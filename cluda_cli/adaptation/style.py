"""Style of an image: mean and deviation of each channel, amplitudes of the lowest frequencies.

The split of an image into content and style is inspired by Lee et al., AAAI 2021; the definition of style is ours.
B images, H W pixels, n the highest frequency that is looked at, in cycles per image.
"""

import torch
from torch import Tensor


def moments(image: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population deviation of each channel over the pixels of a region, both B 3 1 1.

    Images are B 3 H W, float, and regions B H W, bool. Both moments of an empty region are 0.
    """
    count = region.sum(dim=(1, 2)).clamp_min(1)[:, None, None, None]
    mean = (region[:, None] * image).sum(dim=(2, 3), keepdim=True) / count
    return mean, ((region[:, None] * (image - mean).square()).sum(dim=(2, 3), keepdim=True) / count).sqrt()


def remove_style(image: Tensor, inside: Tensor, epsilon: float) -> Tensor:
    """The image without its style, (x - mean) / (deviation + epsilon) in each channel, and 0 on padding.

    Images are B 3 H W, float; `inside` is B H W, bool, False on padding, which has no part in the moments. A positive
    gain and an offset of each channel change nothing, but for `epsilon`.
    """
    mean, deviation = moments(image, inside)
    return (image - mean) / (deviation + epsilon) * inside[:, None]


def transfer_moments(source: Tensor, region: Tensor, target: Tensor, inside: Tensor, epsilon: float) -> Tensor:
    """Source images whose region has the moments of the target image, by one affine map of each channel.

    Images are B 3 H W, float; `region` of the source and `inside` of the target, where it is no padding, are B H W,
    bool. Pixels outside of the region pass the same map.
    """
    mean, deviation = moments(source, region)
    new_mean, new_deviation = moments(target, inside)
    return (source - mean) / (deviation + epsilon) * new_deviation + new_mean


def low_amplitude(image: Tensor, band: int) -> Tensor:
    """Amplitudes of the frequencies up to `band`: B 3 H W -> B 3 2n+1 n+1, rows -n..n, columns 0..n.

    They do not depend on the size of the image; those of a cosine of amplitude a are a/2.
    """
    return _low(torch.fft.rfft2(image, norm="forward"), band).abs()


def replace_low_amplitude(image: Tensor, amplitude: Tensor) -> Tensor:
    """The image B 3 H W with other amplitudes, 3 2n+1 n+1 as in `low_amplitude`; phases stay."""
    band = amplitude.shape[-1] - 1
    spectrum = torch.fft.rfft2(image, norm="forward")
    low = _low(spectrum, band)
    spectrum[:, :, _rows(band), : band + 1] = torch.polar(amplitude.expand(low.shape), low.angle())
    return torch.fft.irfft2(spectrum, s=image.shape[-2:], norm="forward")


def _low(spectrum: Tensor, band: int) -> Tensor:
    return spectrum[:, :, _rows(band), : band + 1]


def _rows(band: int) -> Tensor:
    return torch.arange(-band, band + 1)  # negative frequencies stand at the end
