"""Decoding, resizing and normalising. Values from OpenCV were measured with OpenCV 4."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cluda_cli.data.transforms import (
    fit_box,
    read_image,
    read_label,
    resize_image,
    resize_label_region,
    resize_region,
)
from cluda_cli.errors import DataError


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pixels(height: int = 6, width: int = 8) -> np.ndarray:
    return noise(height, width, 3).numpy()


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((1052, 1914), (720, 1280), (704, 1280)),  # GTA5
        ((1052, 1914), (1440, 2560), (1407, 2560)),
        ((760, 1280), (760, 1280), (760, 1280)),  # SYNTHIA
        ((760, 1280), (1520, 2560), (1520, 2560)),
        ((1024, 2048), (512, 1024), (512, 1024)),  # Cityscapes
        ((1024, 2048), (1024, 2048), (1024, 2048)),
        ((1080, 1920), (540, 960), (540, 960)),  # ACDC, Dark Zurich
        ((1080, 1920), (1080, 1920), (1080, 1920)),
        ((1914, 1052), (720, 1280), (1280, 704)),  # a portrait in a landscape box
        ((1052, 1914), (1280, 720), (704, 1280)),  # a landscape in a portrait box
        ((333, 77), None, (333, 77)),
        ((1, 4000), (10, 20), (1, 20)),  # never empty
    ],
)
def test_fit_box(size, box, expected):
    assert fit_box(size, box) == expected


@pytest.mark.parametrize("target", [(20, 31), (37, 53), (37, 20), (50, 53), (77, 101), (1, 1)])
def test_resize_is_bilinear_with_half_pixel_centres(target):
    image = noise(3, 37, 53)
    expected = F.interpolate(image[None].double(), size=target, mode="bilinear", align_corners=False)[0]
    assert (resize_image(image, target).double() - expected).abs().max() <= 0.5 + 1e-4


def test_resize_is_close_to_opencv():
    image = (torch.arange(35) ** 2 % 251).to(torch.uint8).reshape(1, 5, 7).expand(3, 5, 7)
    smaller = torch.tensor([[18, 31, 49, 74], [207, 9, 69, 134], [103, 114, 68, 154]])
    larger = torch.tensor([[0, 0, 2, 4, 7, 11, 16, 23, 30, 36], [21, 25, 31, 37, 45, 53, 63, 73, 85, 94]])
    assert (resize_image(image, (3, 4)).long() - smaller).abs().max() <= 1
    assert (resize_image(image, (8, 10))[:, :2].long() - larger).abs().max() <= 1


def test_resize_rounds_to_nearest():
    image = torch.tensor([[[0, 1], [2, 4]]], dtype=torch.uint8).expand(3, 2, 2)
    assert resize_image(image, (1, 1)).flatten().tolist() == [2, 2, 2]  # 1.75


@pytest.mark.parametrize("target", [(70, 127), (150, 290), (105, 191)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_region_equals_crop_of_whole(target, interleaved):
    image = noise(105, 191, 3).permute(2, 0, 1) if interleaved else noise(3, 105, 191)
    whole = resize_image(image, target)
    height, width = target
    for top, left, h, w in [(0, 0, 33, 40), (height - 33, width - 40, 33, 40), (17, 29, 50, 1), (5, 0, 1, width)]:
        region = resize_region(image, target, top, left, h, w)
        assert torch.equal(region, whole[:, top : top + h, left : left + w])
        assert region.is_contiguous()


def test_region_needs_no_other_pixels():
    image = noise(3, 40, 60)
    expected = resize_region(image, (20, 30), 5, 10, 8, 9)
    image[:, :10], image[:, 26:], image[:, :, :20], image[:, :, 38:] = 0, 0, 0, 0
    assert torch.equal(resize_region(image, (20, 30), 5, 10, 8, 9), expected)


@pytest.mark.parametrize("target", [(20, 31), (37, 53), (77, 101)])
def test_label_is_nearest(target):
    label = noise(37, 53)
    rows = [int(y * 37 / target[0] + 1e-9) for y in range(target[0])]
    columns = [int(x * 53 / target[1] + 1e-9) for x in range(target[1])]
    whole = resize_label_region(label, target, 0, 0, *target)
    assert torch.equal(whole, label[rows][:, columns])
    assert torch.equal(resize_label_region(label, target, 3, 5, 9, 11), whole[3:12, 5:16])


def test_label_rounds_as_opencv():
    # At 17 * 6 / 34 = 3 exactly, OpenCV's arithmetic falls just short.
    expected = [0] * 6 + [1] * 6 + [2] * 6 + [3] * 5 + [4] * 6 + [5] * 5
    ramp = torch.arange(6, dtype=torch.uint8)
    assert resize_label_region(ramp[None], (1, 34), 0, 0, 1, 34)[0].tolist() == expected
    assert resize_label_region(ramp[:, None], (34, 1), 0, 0, 34, 1)[:, 0].tolist() == expected


def test_resized_label_lies_on_resized_image():
    """An edge in the image and in the label stay within a pixel of each other."""
    label = torch.zeros(100, 140, dtype=torch.uint8)
    label[37:, 61:] = 200
    image = label.expand(3, 100, 140)
    for target in [(50, 70), (67, 94), (151, 211)]:
        resized = resize_image(image, target)[0]
        nearest = resize_label_region(label, target, 0, 0, *target)
        for a, b in [(resized[-1], nearest[-1]), (resized[:, -1], nearest[:, -1])]:
            assert abs(int((a > 100).sum()) - int((b > 100).sum())) <= 1


def test_modes_of_images(tmp_path):
    rgb = pixels()
    grey = rgb[:, :, 0]
    alpha = np.full((6, 8, 1), 7, dtype=np.uint8)
    images = {
        "rgb": (Image.fromarray(rgb), rgb),
        "alpha": (Image.fromarray(np.concatenate([rgb, alpha], 2)), rgb),  # dropped, not blended
        "grey": (Image.fromarray(grey), grey[:, :, None].repeat(3, 2)),
        "grey-alpha": (Image.fromarray(np.stack([grey, alpha[:, :, 0]], 2)), grey[:, :, None].repeat(3, 2)),
        "bits": (Image.fromarray(grey > 99), (grey > 99)[:, :, None].repeat(3, 2) * 255),
    }
    for name, (image, expected) in images.items():
        image.save(tmp_path / f"{name}.png")
        result = read_image(tmp_path / f"{name}.png")
        assert result.dtype == torch.uint8 and np.array_equal(result.permute(1, 2, 0).numpy(), expected), name


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 2))
    image.putdata([0, 1, 2, 1])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    assert read_image(tmp_path / "p.png")[:, 1, 0].tolist() == [70, 80, 90]
    assert read_label(tmp_path / "p.png").tolist() == [[0, 1], [2, 1]]


def test_cmyk_and_upright(tmp_path):
    Image.fromarray(np.full((6, 8, 3), 200, dtype=np.uint8)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert (read_image(tmp_path / "cmyk.jpg").int() - 200).abs().max() <= 4
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels()).save(tmp_path / "rotated.jpg", exif=rotated)
    assert read_image(tmp_path / "rotated.jpg").shape == (3, 8, 6)  # upright


def test_broken_files_are_data_errors(tmp_path):
    Image.fromarray(pixels(60, 80)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "huge.png").write_bytes(content[:16] + struct.pack(">II", 200_000, 200_000) + content[24:])
    Image.fromarray(np.zeros((3, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    for name in ["cut.png", "text.png", "empty.png", "huge.png", "missing.png", "float.tiff"]:
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_colour_labels_are_refused(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "label.png")
    with pytest.raises(DataError, match="RGB"):
        read_label(tmp_path / "label.png")
