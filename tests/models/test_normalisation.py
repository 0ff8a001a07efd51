"""Images as encoders expect them."""

import pytest
import timm
import torch

from cluda_cli.models.normalisation import IMAGENET, Normalisation

MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@pytest.mark.parametrize("size", [(3, 5, 7), (2, 3, 33, 47)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_that_of_imagenet_is_exact_to_the_last_bit(size, dtype):
    image = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    normalised = IMAGENET.apply(image)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, (image.float() - MEAN[:, None, None]) * (1 / STD)[:, None, None])
    inverted = IMAGENET.invert(normalised)
    assert torch.equal(inverted, normalised * (STD / 255)[:, None, None] + (MEAN / 255)[:, None, None])
    torch.testing.assert_close(inverted, image.float() / 255, rtol=0, atol=1e-6)


def test_halves():
    half = Normalisation.from_timm(timm.get_pretrained_cfg("tf_efficientnet_lite0").to_dict())
    assert half == Normalisation(mean=(127.5,) * 3, std=(127.5,) * 3)
    image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    torch.testing.assert_close(half.apply(image), (image - 127.5) / 127.5)
    torch.testing.assert_close(half.invert(half.apply(image)), image / 255)


def test_channels_are_red_green_and_blue():
    normalisation = Normalisation(mean=(1.0, 2.0, 3.0), std=(1.0, 10.0, 100.0))
    image = torch.full((3, 1, 1), 103.0)
    torch.testing.assert_close(normalisation.apply(image).flatten(), torch.tensor([102.0, 10.1, 1.0]))


def test_timm_counts_pixels_in_0_to_1():
    assert Normalisation.from_timm(timm.get_pretrained_cfg("resnet18").to_dict()) == IMAGENET
