"""The views of a step."""

import copy
import itertools
from collections.abc import Set
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.masking import block_mask, importance_ratio
from cluda_cli.adaptation.style import moments
from cluda_cli.adaptation.teacher import PseudoLabels, label_logits
from cluda_cli.adaptation.views import Scene, View
from cluda_cli.data.batch import Batch, Crops, to_device
from cluda_cli.errors import SettingsError
from cluda_cli.models.boxes import Boxes, random_boxes
from cluda_cli.models.normalisation import IMAGENET
from cluda_cli.objectives import build_makers

PLAIN = settings.Mixing(jitter_probability=0, blur_probability=0)
STRONG = settings.Mixing(jitter_probability=1, blur_probability=1)
BLOCKS = settings.Masking(block=4, augment=False)
BOTH = frozenset({"source", "mixed"})
ALL = frozenset({"source", "mixed", "masked"})


class OneResolution:
    normalisation = IMAGENET

    def draw_boxes(self, *_: object) -> None:
        return None


class TwoResolutions:
    normalisation = IMAGENET

    def draw_boxes(self, count: int, image: tuple[int, int], generator: torch.Generator) -> Boxes:
        return random_boxes(count, image, (8, 8), 1, generator)


class StubTeacher:
    """Labels of the column, weight 0.25 where valid; remembers what it saw."""

    def __init__(self, network: Any = OneResolution) -> None:
        self.network = network()
        self.seen: list[Tensor] = []

    def pseudo_labels(self, image: Tensor, valid: Tensor) -> PseudoLabels:
        self.seen.append(image)
        label = (torch.arange(image.shape[3]) % 3).expand(valid.shape).clone()
        return PseudoLabels(label, 0.25 * valid.float(), 0.75 * valid.float())


class NoTeacher:
    network = OneResolution()

    def pseudo_labels(self, image: Tensor, valid: Tensor) -> PseudoLabels:
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
    return {
        "source": Crops(source, source_inside, label=label),
        "target": Crops(target, target_inside, valid=target_valid),
    }


def views_of(
    batch: Batch,
    mixing: settings.Mixing = PLAIN,
    masking: settings.Masking = BLOCKS,
    wanted: Set[str] = BOTH,
    seed: int = 0,
    step: int = 0,
    teacher: Any = None,
) -> dict[str, View]:
    chosen = settings.Settings(mixing=mixing, masking=masking)
    scene = Scene(batch, teacher or StubTeacher(), seed, step)
    return {name: make(scene) for name, make in build_makers(chosen, nn.ModuleDict()).items() if name in wanted}


def equal(first: View, second: View) -> bool:
    return all(torch.equal(getattr(first, k), getattr(second, k)) for k in ("image", "label", "weight"))


def test_source_view_is_the_normalised_batch_with_zero_padding(batch: Batch) -> None:
    view = views_of(batch)["source"]
    inside = batch["source"].inside[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(view.image[inside], IMAGENET.apply(batch["source"].image)[inside])
    assert torch.all(view.image[~inside] == 0)
    assert torch.equal(view.label, batch["source"].label.long()) and view.label.dtype == torch.int64
    assert torch.all(view.weight == 1) and view.weight.dtype == torch.float32
    assert view.pseudo_label is None


def test_every_mixed_pixel_is_wholly_of_the_source_or_of_the_target(batch: Batch) -> None:
    teacher = StubTeacher()
    views = views_of(batch, teacher=teacher)
    source, mixed = views["source"], views["mixed"]
    pasted = mixed.label >= 10  # source labels are 10..18 and 255, pseudo-labels 0..2
    assert 0.2 < pasted.float().mean() < 0.8
    assert torch.equal(mixed.label[pasted], source.label[pasted])
    assert mixed.truth is not None and torch.equal(mixed.truth, pasted)
    assert source.truth is not None and bool(source.truth.all())
    assert torch.equal(mixed.image, torch.where(pasted[:, None], source.image, teacher.seen[0]))
    assert torch.equal(mixed.weight, torch.where(pasted, 1, 0.25 * batch["target"].valid))
    assert mixed.image.dtype == mixed.weight.dtype == torch.float32 and mixed.label.dtype == torch.int64


def test_rare_classes_are_pasted_with_the_moments_of_the_target(batch: Batch) -> None:
    tail, frequencies = settings.Mixing(jitter_probability=0, blur_probability=0, tail=settings.Tail()), [0.25] * 3
    chosen = settings.Settings(mixing=tail)
    teacher = StubTeacher()
    makers = build_makers(chosen, nn.ModuleDict(), [*frequencies, *[0.0] * 9, 0.005, 0.004, *[0.04] * 5])
    scene = Scene(batch, teacher, 0, 0)  # type: ignore[arg-type]
    view = makers["mixed"](scene)
    pasted = view.truth
    assert pasted is not None
    label = batch["source"].label.long()
    assert set(view.label[pasted].tolist()) <= {12, 13} and pasted.flatten(1).any(dim=1).all()
    assert torch.equal(view.label, torch.where(pasted, label, scene.target.label))
    kept = ~pasted[:, None].expand_as(view.image)
    assert torch.equal(view.image[kept], scene.target.image[kept])
    for found, expected in zip(
        moments(view.image, pasted), moments(scene.target.image, batch["target"].inside), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_without_a_rare_class_there_is_no_law() -> None:
    chosen = settings.Settings(mixing=settings.Mixing(tail=settings.Tail(share=0.3)))
    with pytest.raises(SettingsError, match=r"mixing\.tail\.share: no class .* less than 30 % .* -> raise it"):
        build_makers(chosen, nn.ModuleDict(), [0.5, 0.5, 0.0])


def test_source_images_are_augmented_where_wanted(batch: Batch) -> None:
    plain = views_of(batch, STRONG)
    changed = STRONG.model_copy(update={"source_jitter_strength": 0.4})
    strong, again = views_of(batch, changed, step=4), views_of(batch, changed, step=4)
    assert equal(strong["source"], again["source"])
    assert not torch.allclose(plain["source"].image, strong["source"].image, atol=0.1)
    assert torch.equal(plain["source"].label, strong["source"].label)
    # What is pasted is not augmented twice.
    assert torch.equal(plain["mixed"].image, views_of(batch, changed)["mixed"].image)


def test_teacher_sees_target_images_with_zero_padding(batch: Batch) -> None:
    teacher = StubTeacher()
    views_of(batch, STRONG, teacher=teacher)
    expected = IMAGENET.apply(batch["target"].image) * batch["target"].inside[:, None]
    assert len(teacher.seen) == 1 and torch.equal(teacher.seen[0], expected)
    assert torch.all(teacher.seen[0][1, :, :, 28:] == 0)


def test_pseudo_label_of_the_mixed_view_is_of_the_target_alone(batch: Batch) -> None:
    pseudo_label = views_of(batch)["mixed"].pseudo_label
    assert pseudo_label is not None
    columns = (torch.arange(32) % 3).expand(2, 24, 32)
    assert torch.equal(pseudo_label, torch.where(batch["target"].valid, columns, 255))


def test_strong_augmentation_changes_the_image_alone(batch: Batch) -> None:
    plain = views_of(batch)
    strong = views_of(batch, STRONG)
    assert equal(plain["source"], strong["source"])
    assert not torch.allclose(plain["mixed"].image, strong["mixed"].image, atol=0.1)
    assert torch.equal(plain["mixed"].label, strong["mixed"].label)
    assert torch.equal(plain["mixed"].weight, strong["mixed"].weight)


@pytest.mark.parametrize("masking", [BLOCKS, settings.Masking(block=4)])
def test_views_follow_from_seed_and_step(batch: Batch, masking: settings.Masking) -> None:
    first = views_of(batch, STRONG, masking, ALL, seed=3, step=5)
    again = views_of(batch, STRONG, masking, ALL, seed=3, step=5)
    assert all(equal(view, again[name]) for name, view in first.items())
    for seed, step in ((3, 6), (4, 5)):
        other = views_of(batch, STRONG, masking, ALL, seed=seed, step=step)
        assert equal(first["source"], other["source"])
        assert not torch.equal(first["mixed"].image, other["mixed"].image)
        assert not torch.equal(first["mixed"].label, other["mixed"].label)
        assert not torch.equal(visible(first["masked"]), visible(other["masked"]))


@pytest.mark.parametrize("wanted", [set(c) for n in (1, 2) for c in itertools.combinations(sorted(ALL), n)])
def test_views_are_the_same_whichever_are_wanted(batch: Batch, wanted: set[str]) -> None:
    masking = settings.Masking(block=4, with_source=True)
    teachers = [StubTeacher(TwoResolutions) for _ in range(2)]
    every = views_of(batch, settings.Mixing(), masking, ALL, step=1, teacher=teachers[0])
    some = views_of(batch, settings.Mixing(), masking, wanted, step=1, teacher=teachers[1])
    assert list(every) == ["source", "mixed", "masked"] and set(some) == wanted
    for name, view in some.items():
        assert equal(view, every[name])
        assert view.boxes is not None and every[name].boxes is not None
        assert torch.equal(view.boxes.corner, every[name].boxes.corner)


def test_views_nobody_wants_are_never_made(batch: Batch) -> None:
    assert list(views_of(batch, wanted={"source"}, teacher=NoTeacher())) == ["source"]
    assert views_of(batch, wanted=set(), teacher=NoTeacher()) == {}


def test_the_teacher_is_asked_only_for_a_view_that_needs_it(batch: Batch) -> None:
    with pytest.raises(AssertionError, match="the teacher was asked"):
        views_of(batch, wanted={"mixed"}, teacher=NoTeacher())


def test_probability_is_the_teachers_and_1_on_ground_truth(batch: Batch) -> None:
    views = views_of(batch, wanted=ALL | {"target"})
    valid = batch["target"].valid
    assert torch.all(views["source"].probability == 1)
    assert torch.equal(views["target"].probability, 0.75 * valid.float())
    pasted = views["mixed"].label >= 10
    assert torch.equal(views["mixed"].probability, torch.where(pasted, 1, 0.75 * valid.float()))
    assert torch.equal(views["masked"].probability, views["target"].probability)


def test_target_view_is_the_target_with_its_pseudo_labels(batch: Batch) -> None:
    teacher = StubTeacher()
    view = views_of(batch, wanted={"target"}, teacher=teacher)["target"]
    assert torch.equal(view.image, teacher.seen[0])
    assert torch.equal(view.label, (torch.arange(32) % 3).expand(2, 24, 32))


def test_strong_target_view_is_the_augmented_target_with_the_pseudo_labels_of_the_plain_one(batch: Batch) -> None:
    teacher = StubTeacher()
    views = views_of(batch, STRONG, wanted={"target", "strong target", "mixed"}, teacher=teacher)
    strong, plain = views["strong target"], views["target"]
    assert not torch.equal(strong.image, plain.image)
    assert torch.equal(teacher.seen[0], plain.image) and len(teacher.seen) == 1
    assert all(torch.equal(getattr(strong, k), getattr(plain, k)) for k in ("label", "weight", "probability", "truth"))
    again = views_of(batch, STRONG, wanted={"strong target"})["strong target"]
    assert equal(strong, again) and not equal(
        strong, views_of(batch, STRONG, wanted={"strong target"}, step=1)[again.name]
    )


def test_global_generator_and_batch_stay_as_they_are(batch: Batch) -> None:
    before, copied = torch.get_rng_state(), copy.deepcopy(batch)
    masking = settings.Masking(with_source=True)
    views_of(batch, STRONG, masking, ALL, teacher=StubTeacher(TwoResolutions))
    assert torch.equal(torch.get_rng_state(), before)
    for name, crops in batch.items():
        for value, before in zip(vars(crops).values(), vars(copied[name]).values(), strict=True):
            assert value is None and before is None or torch.equal(value, before)


def test_nothing_is_read_back_from_the_device(batch: Batch) -> None:
    class DeviceTeacher:
        network = TwoResolutions()

        def pseudo_labels(self, image: Tensor, valid: Tensor) -> PseudoLabels:
            return label_logits(image[:, :, ::4, ::4], 0.9, valid)

    # Tensors on this device have no values, so that reading one (and, on a GPU, waiting for it) raises.
    masking = settings.Masking(with_source=True)
    views = views_of(to_device(batch, torch.device("meta")), STRONG, masking, ALL, teacher=DeviceTeacher())
    for view in views.values():
        assert view.image.device.type == view.label.device.type == view.weight.device.type == "meta"
        assert view.boxes is not None and view.boxes.corner.device.type == "meta"


# Masked images


def visible(view: View) -> Tensor:
    """Where an image shows anything; no pixel of the batch is exactly the mean colour.  # B H W"""
    return (view.image != 0).any(dim=1)


def test_masked_view_hides_parts_of_the_target_and_keeps_its_pseudo_labels(batch: Batch) -> None:
    teacher = StubTeacher()
    view = views_of(batch, wanted={"masked"}, teacher=teacher)["masked"]
    columns = (torch.arange(32) % 3).expand(2, 24, 32)
    assert torch.equal(view.label, columns) and view.label.dtype == torch.int64
    assert torch.equal(view.weight, 0.25 * batch["target"].valid)  # hidden pixels count, margins do not
    assert view.image.dtype == view.weight.dtype == torch.float32 and view.pseudo_label is None
    shown = visible(view)
    assert torch.equal(view.image, teacher.seen[0] * shown[:, None])
    blocks = shown[:, :, :28].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)  # without the padding of the second image
    assert torch.equal(blocks.all(3), blocks.any(3)) and blocks.any() and not blocks.all()


def test_share_of_hidden_pixels_is_the_ratio(batch: Batch) -> None:
    for ratio in (0.0, 0.3, 0.7):
        masking = settings.Masking(block=2, augment=False, ratio=ratio)
        views = [views_of(batch, PLAIN, masking, {"masked"}, step=step)["masked"] for step in range(10)]
        hidden = [~visible(view)[0] for view in views]  # the first image, which has no padding
        blocks = 10 * 12 * 16
        assert torch.stack(hidden).float().mean().item() == pytest.approx(ratio, abs=5 * (0.25 / blocks) ** 0.5)


def test_hidden_share_is_noted_where_importance_decides(batch: Batch) -> None:
    """The teacher of this test is equally certain everywhere, so boundaries alone tell blocks apart."""
    masking = settings.Masking(block=2, augment=False, importance="boundary", ratio=0.5, cap=0.8)
    scene = Scene(batch, StubTeacher(), 0, 0)  # type: ignore[arg-type]
    makers = build_makers(settings.Settings(mixing=PLAIN, masking=masking), nn.ModuleDict())
    shown = visible(makers["masked"](scene))[0]
    assert list(scene.notes) == ["masked/hidden"] and 0 < scene.notes["masked/hidden"] < 0.8
    other = visible(makers["second masked"](scene))[0]
    assert list(scene.notes) == ["masked/hidden", "second masked/hidden"]
    assert not torch.equal(shown, other)
    plain = Scene(batch, StubTeacher(), 0, 0)  # type: ignore[arg-type]
    build_makers(settings.Settings(masking=BLOCKS), nn.ModuleDict())["masked"](plain)
    assert not plain.notes


@pytest.mark.parametrize("importance", ["uncertainty", "boundary", "rarity"])
def test_importance_is_that_of_what_is_shown(batch: Batch, importance: Any) -> None:
    """Source images in place of target images have their own labels, of which the teacher's certainty is 1."""
    section = settings.Masking(block=4, augment=False, with_source=True, importance=importance, ratio=0.4)
    scene = Scene(batch, StubTeacher(), 0, 0)  # type: ignore[arg-type]
    view = build_makers(settings.Settings(masking=section), nn.ModuleDict())["masked"](scene)
    ratio = importance_ratio(section, view.label, view.probability)
    assert torch.equal(
        visible(view)[:, :20, :28], block_mask((24, 32), 4, ratio, scene.generators("masking"))[:, :20, :28]
    )


def test_blocks_grow_with_the_crop() -> None:
    assert settings.Masking().block_pixels((512, 512)) == 32 and settings.Masking().block_pixels((1024, 1024)) == 64
    assert settings.Masking(block=7).block_pixels((512, 512)) == 7


def test_target_is_augmented_before_it_is_masked_if_asked_to(batch: Batch) -> None:
    masking = settings.Masking(block=4, augment=True)
    teacher = StubTeacher()
    strong = views_of(batch, STRONG, masking, {"masked"}, teacher=teacher)["masked"]
    unchanged = views_of(batch, PLAIN, masking, {"masked"})["masked"]
    never = views_of(batch, STRONG, BLOCKS, {"masked"})["masked"]
    shown = visible(unchanged)
    assert torch.equal(unchanged.image, teacher.seen[0] * shown[:, None])
    assert torch.equal(never.image, teacher.seen[0] * visible(never)[:, None])
    # Hidden pixels stay exactly 0: blur does not smear what is visible into them. The second image has padding.
    change = (strong.image - unchanged.image)[0]
    assert torch.all(strong.image[0, :, ~shown[0]] == 0) and change[:, shown[0]].abs().mean() > 0.05
    assert torch.equal(strong.label, unchanged.label) and torch.equal(strong.weight, unchanged.weight)


@pytest.mark.parametrize(("count", "ours"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_half_of_the_masked_images_may_be_source(batch: Batch, count: int, ours: int) -> None:
    images = torch.arange(count) % 2
    larger, teacher = {name: crops.select(images) for name, crops in batch.items()}, StubTeacher()
    masking = settings.Masking(block=4, augment=False, with_source=True)
    views = views_of(larger, PLAIN, masking, {"source", "masked"}, teacher=teacher)
    source, view = views["source"], views["masked"]
    theirs = count - ours
    image = torch.cat([source.image[:ours], teacher.seen[0][:theirs]])
    assert torch.equal(view.image, image * visible(view)[:, None])
    assert 0 < visible(view).float().mean() < 0.8
    columns = (torch.arange(32) % 3).expand(theirs, 24, 32)
    assert torch.equal(view.label, torch.cat([source.label[:ours], columns]))
    assert torch.equal(view.weight, torch.cat([torch.ones(ours, 24, 32), 0.25 * larger["target"].valid[:theirs]]))


def test_source_is_masked_without_augmentation(batch: Batch) -> None:
    masking = settings.Masking(block=4, augment=True, with_source=True)
    views = views_of(batch, STRONG, masking, {"source", "masked"})
    image, source = views["masked"].image[0], views["source"].image[0]
    shown = (image != 0).any(dim=0)
    assert torch.equal(image, source * shown) and shown.any()


def test_teacher_is_asked_once_for_mixed_and_masked(batch: Batch) -> None:
    teacher = StubTeacher()
    views_of(batch, wanted=ALL, teacher=teacher)
    assert len(teacher.seen) == 1


def test_mixed_images_are_not_what_is_masked(batch: Batch) -> None:
    views = views_of(batch, wanted=ALL)
    assert torch.all(views["masked"].label < 3) and torch.any(views["mixed"].label >= 10)
    assert torch.all(views["masked"].weight <= 0.25)


# Detail crops


def corners(batch: Batch, step: int = 0, seed: int = 0, **options: Any) -> dict[str, tuple[int, int] | None]:
    views = views_of(batch, wanted=ALL, step=step, seed=seed, teacher=StubTeacher(TwoResolutions), **options)
    for view in views.values():  # one place for all images
        assert view.boxes is None or torch.equal(view.boxes.corner, view.boxes.corner[:1].expand(len(view.image), 2))
    return {name: view.boxes and tuple(view.boxes.corner[0].tolist()) for name, view in views.items()}


def test_every_view_of_every_step_has_a_detail_crop_of_its_own(batch: Batch) -> None:
    drawn = [corner for step in range(5) for corner in corners(batch, step).values()]
    assert len(set(drawn)) > 12  # of 15, among 17 x 25 places
    assert corners(batch, 3) == corners(batch, 3) != corners(batch, 3, seed=1)


def test_detail_crops_do_not_depend_on_mixing_and_masking(batch: Batch) -> None:
    other = corners(batch, mixing=STRONG, masking=settings.Masking(with_source=True, ratio=0.1))
    assert corners(batch) == other


def test_networks_of_one_resolution_have_none(batch: Batch) -> None:
    assert all(view.boxes is None for view in views_of(batch, wanted=ALL).values())


def test_mixed_images_show_the_least_certain_detail_from_a_step_on(batch: Batch) -> None:
    mixing = settings.Mixing(jitter_probability=0, blur_probability=0, uncertain_detail_from=4)
    for step, chosen in ((3, False), (4, True), (5, True)):
        usual, found = corners(batch, step), corners(batch, step, mixing=mixing)
        assert (found.pop("mixed") is None) is chosen
        del usual["mixed"]
        assert found == usual
    at_once = settings.Mixing(uncertain_detail_from=0)
    assert corners(batch, 0, mixing=at_once)["mixed"] is None


def test_part_of_a_view(batch: Batch) -> None:
    views = views_of(batch, wanted=ALL, teacher=StubTeacher(TwoResolutions))
    for view in views.values():
        part = view.part(slice(1, 2))
        assert part.name == view.name
        for name in ("image", "label", "weight"):
            assert torch.equal(getattr(part, name), getattr(view, name)[1:2])
        assert part.boxes is not None and view.boxes is not None and part.boxes.size == view.boxes.size
        assert torch.equal(part.boxes.corner, view.boxes.corner[1:2])
    pseudo_label, part = views["mixed"].pseudo_label, views["mixed"].part(slice(1))
    assert pseudo_label is not None and part.pseudo_label is not None
    assert torch.equal(part.pseudo_label, pseudo_label[:1]) and views["source"].part(slice(1)).pseudo_label is None
    plain = views_of(batch)["mixed"].part(slice(1))
    assert plain.boxes is None and len(plain.image) == 1
