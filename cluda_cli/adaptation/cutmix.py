"""Rectangles of one image pasted onto another (CutMix), and what is known about classes to choose them. H W pixels.

Every function takes its random numbers as arguments, 0..1 each, so that all devices choose alike.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.data.labels import IGNORE

Box = tuple[int, int, int, int]
"""Top, left, bottom and right of a rectangle, pixels; bottom and right lie outside."""


def draw_class(law: Tensor, uniform: float) -> int:
    """The first class whose cumulative probability exceeds `uniform`; `law` K sums to 1."""
    cumulative = law.double().cumsum(0)
    found = int(torch.searchsorted(cumulative, torch.tensor([uniform], dtype=torch.float64), right=True))
    return min(found, int(law.nonzero().max()))  # rounding may leave the sum below 1


def choose_box(mask: Tensor, min_share: float, uniforms: Sequence[float]) -> Box:
    """A rectangle that shows what `mask` H W, bool, marks (adaptive CutMix of AEL, arXiv 2110.05474).

    It bounds one of the parts of the mask with more than `min_share` of all pixels, each equally likely. Without such a
    part, or where the mask is everything and a paste would hide the other image, it is one of `random_box`. The first
    number chooses the part, the others the random rectangle.
    """
    height, width = mask.shape
    parts = find_parts(mask, min_share * height * width)
    if not parts or mask.all():
        return random_box((height, width), uniforms[1:])
    return parts[min(int(uniforms[0] * len(parts)), len(parts) - 1)]


def find_parts(mask: Tensor, min_pixels: float) -> list[Box]:
    """Bounding boxes of the 8-connected parts of `mask` H W, bool, that have more than `min_pixels` pixels."""
    part = label_parts(mask)  # H W
    counts = torch.bincount(part.flatten())
    counts[0] = 0
    boxes = []
    for number in (counts > min_pixels).nonzero().flatten().tolist():
        inside = part == number
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        boxes.append((int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1))
    return boxes


def label_parts(mask: Tensor) -> Tensor:
    """The number of the 8-connected part of each pixel of `mask` H W, bool; 0 outside.  # int64 H W

    Every pixel takes the largest number among its neighbours, and then the number that the pixel of this number has, so
    that even winding parts take a few rounds.
    """
    height, width = mask.shape
    number = torch.arange(1, height * width + 1, device=mask.device).view(height, width) * mask
    while True:
        # Numbers are exact in float64, and max pooling is not implemented for integers on all devices.
        near = F.max_pool2d(number[None, None].double(), 3, stride=1, padding=1)[0, 0].long() * mask
        flat = F.pad(near.flatten(), (1, 0))  # what the pixel of each number has; 0 has 0
        spread = flat[near]
        if torch.equal(spread, number):
            return number
        number = spread


def random_box(size: tuple[int, int], uniforms: Sequence[float]) -> Box:
    """A rectangle of half the area of H W, with a log-uniform aspect, anywhere (CutMix as AEL has it)."""
    first, second, third = uniforms
    share = 0.5**first
    height, width = round(share * size[0]), round(0.5 / share * size[1])
    top, left = round((size[0] - height) * second), round((size[1] - width) * third)
    return top, left, top + height, left + width


def zoom(image: Tensor, label: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Images B C H W and labels B H W enlarged by `scale` B, and cut to their size at a place that `shift` B 2 chooses.

    `shift` is 0..1, down and right. Where an image is made smaller, the rest is 0 and ignored.
    """
    room = (1 - 1 / scale)[:, None]  # B 1, as a share of the image on either side of its centre
    centre = room * (2 * shift.flip(1) - 1)  # B 2, x y in -1..1
    grow = torch.diag_embed((1 / scale)[:, None].expand(-1, 2))  # B 2 2
    grid = F.affine_grid(torch.cat([grow, centre[:, :, None]], dim=2), list(image.shape), align_corners=False)
    grid = grid.to(image)
    inside = (grid.abs() < 1).all(dim=3)  # B H W
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False) * inside[:, None]
    label = F.grid_sample(label[:, None].to(image), grid, mode="nearest", padding_mode="border", align_corners=False)
    return image, label[:, 0].round().to(label.dtype).long().where(inside, IGNORE)
