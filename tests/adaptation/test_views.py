"""The views of a step."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.teacher import labels_and_weights
from cluda_cli.adaptation.views import View, make_views
from cluda_cli.data.streams import Batch
from cluda_cli.data.transforms import normalise

PLAIN = settings.Mixing(jitter_probability=0, blur_probability=0)
BOTH = frozenset({"source", "mixed"})


class StubTeacher:
    """Labels of the column, weight 0.25 where valid; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def pseudo_labels(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(image)
        return (torch.arange(image.shape[3]) % 3).expand(valid.shape).clone(), 0.25 * valid.float()


class NoTeacher:
    def pseudo_labels(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("the teacher was asked")


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(1, 256, (2, 2, 3, 24, 32), dtype=torch.uint8, generator=generator)
    label = torch.randint(10, 19, (2, 24, 32), dtype=torch.uint8, generator=generator)
    source_inside, target_inside = torch.ones(2, 2, 24, 32, dtype=torch.bool)
    source_inside[0, 20:] = False
    target_inside[1, :, 28:] = False
    target_valid = target_inside.clone()
    target_valid[:, :3] = False
    label[~source_inside] = 255
    source[~source_inside[:, None].expand(-1, 3, -1, -1)] = 0
    target[~target_inside[:, None].expand(-1, 3, -1, -1)] = 0
    return Batch(source, label, source_inside, target, target_inside, target_valid)


def views_of(
    batch: Batch, mixing: settings.Mixing = PLAIN, seed: int = 0, step: int = 0, teacher: Any = None
) -> dict[str, View]:
    return {v.name: v for v in make_views(batch, teacher or StubTeacher(), BOTH, mixing, seed, step)}  # type: ignore


def equal(first: View, second: View) -> bool:
    return all(torch.equal(getattr(first, k), getattr(second, k)) for k in ("image", "label", "weight"))


def test_source_view_is_the_normalised_batch_with_zero_padding(batch: Batch) -> None:
    view = views_of(batch)["source"]
    inside = batch.source_inside[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(view.image[inside], normalise(batch.source_image)[inside])
    assert torch.all(view.image[~inside] == 0)
    assert torch.equal(view.label, batch.source_label.long()) and view.label.dtype == torch.int64
    assert torch.all(view.weight == 1) and view.weight.dtype == torch.float32
    assert view.pseudo_label is None


def test_every_mixed_pixel_is_wholly_of_the_source_or_of_the_target(batch: Batch) -> None:
    teacher = StubTeacher()
    views = views_of(batch, teacher=teacher)
    source, mixed = views["source"], views["mixed"]
    pasted = mixed.label >= 10  # source labels are 10..18 and 255, pseudo-labels 0..2
    assert 0.2 < pasted.float().mean() < 0.8
    assert torch.equal(mixed.label[pasted], source.label[pasted])
    assert torch.equal(mixed.image, torch.where(pasted[:, None], source.image, teacher.seen[0]))
    assert torch.equal(mixed.weight, torch.where(pasted, 1, 0.25 * batch.target_valid))
    assert mixed.image.dtype == mixed.weight.dtype == torch.float32 and mixed.label.dtype == torch.int64


def test_teacher_sees_target_images_with_zero_padding(batch: Batch) -> None:
    teacher = StubTeacher()
    views_of(batch, settings.Mixing(jitter_probability=1, blur_probability=1), teacher=teacher)
    expected = normalise(batch.target_image) * batch.target_inside[:, None]
    assert len(teacher.seen) == 1 and torch.equal(teacher.seen[0], expected)
    assert torch.all(teacher.seen[0][1, :, :, 28:] == 0)


def test_pseudo_label_of_the_mixed_view_is_of_the_target_alone(batch: Batch) -> None:
    pseudo_label = views_of(batch)["mixed"].pseudo_label
    assert pseudo_label is not None
    columns = (torch.arange(32) % 3).expand(2, 24, 32)
    assert torch.equal(pseudo_label, torch.where(batch.target_valid, columns, 255))


def test_strong_augmentation_changes_the_image_alone(batch: Batch) -> None:
    plain = views_of(batch)
    strong = views_of(batch, settings.Mixing(jitter_probability=1, blur_probability=1))
    assert equal(plain["source"], strong["source"])
    assert not torch.allclose(plain["mixed"].image, strong["mixed"].image, atol=0.1)
    assert torch.equal(plain["mixed"].label, strong["mixed"].label)
    assert torch.equal(plain["mixed"].weight, strong["mixed"].weight)


def test_views_follow_from_seed_and_step(batch: Batch) -> None:
    strong = settings.Mixing(jitter_probability=1, blur_probability=1)
    first = views_of(batch, strong, seed=3, step=5)["mixed"]
    assert equal(first, views_of(batch, strong, seed=3, step=5)["mixed"])
    for seed, step in ((3, 6), (4, 5)):
        other = views_of(batch, strong, seed=seed, step=step)["mixed"]
        assert not torch.equal(first.image, other.image) and not torch.equal(first.label, other.label)


def test_mixed_view_is_the_same_without_the_source_view(batch: Batch) -> None:
    (alone,) = make_views(batch, StubTeacher(), {"mixed"}, settings.Mixing(), 0, 1)  # type: ignore
    assert equal(alone, views_of(batch, settings.Mixing(), step=1)["mixed"])


def test_views_nobody_wants_are_never_made(batch: Batch) -> None:
    assert [v.name for v in make_views(batch, NoTeacher(), {"source"}, PLAIN, 0, 0)] == ["source"]  # type: ignore
    assert list(make_views(batch, NoTeacher(), set(), PLAIN, 0, 0)) == []  # type: ignore


def test_a_view_is_made_only_when_asked_for(batch: Batch) -> None:
    views = make_views(batch, NoTeacher(), BOTH, PLAIN, 0, 0)  # type: ignore
    assert next(views).name == "source"
    with pytest.raises(AssertionError, match="the teacher was asked"):
        next(views)


def test_global_generator_and_batch_stay_as_they_are(batch: Batch) -> None:
    before, copied = torch.get_rng_state(), copy.deepcopy(batch)
    views_of(batch, settings.Mixing(jitter_probability=1, blur_probability=1))
    assert torch.equal(torch.get_rng_state(), before)
    for field in dataclasses.fields(batch):
        assert torch.equal(getattr(batch, field.name), getattr(copied, field.name))


def test_nothing_is_read_back_from_the_device(batch: Batch) -> None:
    class DeviceTeacher:
        def pseudo_labels(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            return labels_and_weights(image[:, :, ::4, ::4], 0.9, valid)

    # Tensors on this device have no values, so that reading one (and, on a GPU, waiting for it) raises.
    views = views_of(
        batch.to(torch.device("meta")),
        settings.Mixing(jitter_probability=1, blur_probability=1),
        teacher=DeviceTeacher(),
    )
    assert views["mixed"].image.device.type == views["mixed"].label.device.type == "meta"
