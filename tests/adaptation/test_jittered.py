"""Two views of a target image differ in light alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.adaptation.jittered import FIRST, SECOND, MakeJittered
from cluda_cli.adaptation.views import Scene, View
from cluda_cli.data.batch import Batch, Crops
from cluda_cli.models.normalisation import IMAGENET


class NoTeacher:
    """A network of one resolution that must not be asked for labels."""

    normalisation = IMAGENET

    @property
    def network(self) -> "NoTeacher":
        return self

    def draw_boxes(self, *_: object) -> None:
        return None


@pytest.fixture
def batch() -> Batch:
    """The second image is padded at the right."""
    image = torch.randint(60, 180, (2, 3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(2, 12, 16, dtype=torch.bool)
    inside[1, :, 13:] = False
    return {"target": Crops(image * inside[:, None], inside, valid=inside)}


def make(batch: Batch, name: str = FIRST, step: int = 0, **strength: Any) -> View:
    scene = Scene(batch, NoTeacher(), 0, step)  # type: ignore[arg-type]
    return MakeJittered(name, **{"brightness": 0.1, "contrast": 0.3} | strength)(scene)


def test_labels_only_tell_images_from_padding(batch: Batch) -> None:
    view, inside = make(batch), batch["target"].inside
    assert torch.equal(view.label, torch.where(inside, 0, 255)) and view.label.dtype == torch.int64
    assert torch.all(view.weight == 1) and torch.all(view.image * ~inside[:, None] == 0)


def test_without_strength_the_image_is_as_it_is(batch: Batch) -> None:
    one, other = (make(batch, name, brightness=0.0, contrast=0.0) for name in (FIRST, SECOND))
    assert torch.equal(one.image, other.image)
    plain = IMAGENET.apply(batch["target"].image) * batch["target"].inside[:, None]
    torch.testing.assert_close(one.image, plain, atol=1e-5, rtol=0)


def test_every_image_of_every_view_has_one_offset_and_one_factor(batch: Batch) -> None:
    """Within what 0..1 cuts off, each channel is stretched about its mean and shifted, by numbers that all share."""
    lines = []
    for name in (FIRST, SECOND):
        shown = IMAGENET.invert(make(batch, name).image)
        for image, plain, inside in zip(shown, batch["target"].image / 255, batch["target"].inside, strict=True):
            x, y = plain[:, inside], image[:, inside]
            gain, offset = fit((x - x.mean(dim=1, keepdim=True)).flatten(), (y - x.mean(dim=1, keepdim=True)).flatten())
            assert 0.7 <= gain <= 1.3 and abs(offset) <= 0.1
            lines.append((round(gain, 4), round(offset, 4)))
    assert len(set(lines)) == 4


def fit(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Gain and offset of the line through points, all of which lie on it."""
    i, j = x.argmin(), x.argmax()
    gain = (y[j] - y[i]) / (x[j] - x[i])
    torch.testing.assert_close(y, y[i] + gain * (x - x[i]), atol=1e-4, rtol=0)
    return float(gain), float(y[i] - gain * x[i])


def test_steps_differ_and_repeat(batch: Batch) -> None:
    assert torch.equal(make(batch, step=3).image, make(batch, step=3).image)
    assert not torch.equal(make(batch, step=3).image, make(batch, step=4).image)
    assert MakeJittered(FIRST, 0.1, 0.2) == MakeJittered(FIRST, 0.1, 0.2) != MakeJittered(FIRST, 0.1, 0.3)
