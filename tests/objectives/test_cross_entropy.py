"""Cross-entropy counts every pixel in its mean, whatever its weight."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.distributed import collectives
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.segmenter import Detail, Output
from cluda_cli.objectives import build_objectives
from cluda_cli.objectives.cross_entropy import CrossEntropy, hard_cross_entropy, hard_pixels, weighted_cross_entropy


def test_ignored_and_weightless_pixels_stay_in_the_mean() -> None:
    logits = torch.zeros(1, 4, 1, 4)
    label = torch.tensor([[[0, 1, 255, 3]]])
    weight = torch.tensor([[[1.0, 0.5, 1.0, 0.0]]])
    expected = (1.0 + 0.5) * torch.tensor(4.0).log() / 4
    torch.testing.assert_close(weighted_cross_entropy(logits, label, weight), expected)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["weighted", "plain", "all_ignored"])
def test_reference_vectors(case: str, dtype: torch.dtype, golden: Any) -> None:
    tensors, description = golden("13_mic/weighted_cross_entropy")
    bounds = description["tolerance_demanded"]["bounds"]
    logits = tensors["in.logits"].to(dtype).requires_grad_()
    label = tensors["in.labels"][:, 0].long()
    weight = tensors["in.weight"].to(dtype)
    if case == "all_ignored":
        label = torch.full_like(label, 255)
    value = weighted_cross_entropy(logits, label, weight if case == "weighted" else torch.ones_like(weight))
    value.backward()
    bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
    for key, actual in {f"{case}.loss": value, f"{case}.grad_logits": logits.grad}.items():
        expected = tensors[f"out64.{key}"].view(actual.shape)
        assert (actual.detach() - expected).abs().max() <= bounds[key][bits]


BOXES = Boxes(torch.tensor([[8, 0], [0, 16]]), (8, 8))


def seen(detail: bool = True) -> tuple[Output, View]:
    """Logits at stride 4 of the whole, and of the crops where wanted, with labels that include ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 4, 4, 6, generator=generator, requires_grad=True)
    part = (3 * torch.randn(2, 4, 2, 2, generator=generator)).requires_grad_()
    label = torch.randint(0, 4, (2, 16, 24), generator=generator)
    label[:, 9:11] = 255
    weight, image = torch.rand(2, 16, 24, generator=generator), torch.zeros(2, 3, 16, 24)
    detailed = Detail(BOXES, part, part) if detail else None
    return Output(whole, whole, (), image, detailed), View("mixed", image, label, weight, weight)


def by_hand(logits: Tensor, label: Tensor, weight: Tensor) -> float:
    """Pixel by pixel."""
    logits = F.interpolate(logits.detach(), label.shape[1:], mode="bilinear")
    total = 0.0
    for b, y, x in torch.cartesian_prod(*map(torch.arange, label.shape)).tolist():
        if label[b, y, x] != 255:
            scores = logits[b, :, y, x].double()
            total += weight[b, y, x].item() * (scores.logsumexp(0) - scores[label[b, y, x]]).item()
    return total / label.numel()


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_detail_has_its_share(share: float) -> None:
    output, view = seen()
    objective = CrossEntropy(settings.CrossEntropy(detail_weight=share), "mixed")
    whole = by_hand(output.logits, view.label, view.weight)
    assert output.detail is not None
    parts = [torch.stack([maps[0, 8:16, :8], maps[1, :8, 16:]]) for maps in (view.label, view.weight)]
    part = by_hand(output.detail.logits, *parts)
    assert not math.isclose(whole, part, rel_tol=0.05)
    value = objective(Seen(output, view))
    assert value.item() == pytest.approx((1 - share) * whole + share * part, rel=1e-5)
    value.backward()
    for logits, has_gradient in ((output.logits, share < 1), (output.detail.logits, share > 0)):
        assert logits.grad is not None and bool(logits.grad.abs().sum() > 0) is has_gradient


def test_without_detail_its_share_does_not_matter() -> None:
    output, view = seen(detail=False)
    values = [
        CrossEntropy(settings.CrossEntropy(detail_weight=share), "mixed")(Seen(output, view))
        for share in (0.0, 0.1, 1.0)
    ]
    assert values[0] == values[1] == values[2]
    assert values[0].item() == pytest.approx(by_hand(output.logits, view.label, view.weight), rel=1e-5)


def test_crop_without_labels_counts_as_zero() -> None:
    output, view = seen()
    view.label[0, 8:16, :8] = 255
    view.label[1, :8, 16:] = 255
    objective = CrossEntropy(settings.CrossEntropy(), "mixed")
    value = objective(Seen(output, view))
    assert value.item() == pytest.approx(0.9 * by_hand(output.logits, view.label, view.weight), rel=1e-5)
    value.backward()
    assert output.detail is not None and torch.all(output.detail.logits.grad == 0)


def test_halves_are_computed_in_float32_under_autocast() -> None:
    output, view = seen()
    objective = CrossEntropy(settings.CrossEntropy(), "mixed")
    expected = objective(Seen(output, view))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(Seen(output, view)), expected)


@pytest.mark.parametrize("detail", [False, True])
def test_class_weights_act_on_ground_truth_alone(detail: bool) -> None:
    output, view = seen(detail)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    objective = CrossEntropy(settings.CrossEntropy(detail_weight=0.3), "mixed", weights)
    plain = CrossEntropy(settings.CrossEntropy(detail_weight=0.3), "mixed")
    truth = torch.rand(view.label.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    by_class = torch.where(truth, weights[view.label.clamp(max=3)], 1.0)
    expected = plain(Seen(output, replace(view, weight=view.weight * by_class)))
    torch.testing.assert_close(objective(Seen(output, replace(view, truth=truth))), expected)
    assert not math.isclose(expected.item(), plain(Seen(output, view)).item(), rel_tol=0.01)
    assert objective(Seen(output, replace(view, truth=torch.zeros_like(truth)))) == plain(Seen(output, view))
    assert objective.state_dict() == {}


def losses(*probabilities: list[float]) -> Tensor:
    """Of pixels in one row of each image, by the probability of their label."""
    return -torch.tensor(probabilities)[:, None].log()


@pytest.mark.parametrize(
    ("threshold", "min_share", "expected"),
    [
        (0.5, 0.01, [[1, 1, 0, 0], [1, 0, 0, 0]]),  # below the threshold; the hardest one of an image without any
        (0.5, 0.5, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (0.5, 0.51, [[1, 1, 1, 0], [1, 1, 1, 0]]),  # rounded up
        (0.65, 0.5, [[1, 1, 1, 0], [1, 1, 0, 0]]),
        (1.0, 0.01, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (0.01, 1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (0.01, 0.01, [[1, 0, 0, 0], [1, 0, 0, 0]]),
    ],
)
def test_hard_pixels_are_below_the_threshold_and_at_least_a_share_of_every_image(
    threshold: float, min_share: float, expected: list[list[int]]
) -> None:
    loss = losses([0.1, 0.3, 0.6, 0.9], [0.7, 0.8, 0.9, 0.95])
    assert (
        hard_pixels(loss, torch.ones_like(loss, dtype=torch.bool), threshold, min_share)[:, 0].int().tolist()
        == expected
    )


def test_unlabelled_pixels_are_neither_kept_nor_counted() -> None:
    """Half of the two labelled pixels of the first image is the hardest of them; the second has none."""
    loss = losses([0.1, 0.8, 0.9, 0.2], [0.1, 0.1, 0.1, 0.1])
    labelled = torch.tensor([[[False, True, True, False]], [[False] * 4]])
    kept = hard_pixels(loss, labelled, 0.5, 0.5)
    assert kept[:, 0].tolist() == [[False, True, False, False], [False] * 4]


def test_the_mean_is_that_of_the_hard_pixels() -> None:
    """Logits ln p of probabilities 0.25, 0.5 and 0.9 of class 0, with weights; an ignored pixel and one without weight
    take no part, though they are the hardest."""
    probability = torch.tensor([0.25, 0.5, 0.9, 0.01, 0.01])
    logits = torch.stack([probability, 1 - probability]).log()[None, :, None].requires_grad_()  # 1 2 1 5
    label = torch.tensor([[[0, 0, 0, 255, 0]]])
    weight = torch.tensor([[[1.0, 3.0, 1.0, 1.0, 0.0]]])
    value = hard_cross_entropy(logits, label, weight, settings.HardPixels(threshold=0.7, min_share=0.1))
    assert value.item() == pytest.approx((math.log(4) + 3 * math.log(2)) / 2, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[0, 0, 0].tolist() == pytest.approx([-0.75 / 2, -3 * 0.5 / 2, 0, 0, 0], abs=1e-6)


def test_hard_pixels_of_all_equal_the_mean_over_labelled_pixels() -> None:
    output, view = seen(detail=False)
    everything = settings.HardPixels(threshold=1.0, min_share=1.0)
    value = hard_cross_entropy(output.logits, view.label, view.weight, everything)
    share = (view.label != 255).double().mean().item()
    assert value.item() == pytest.approx(by_hand(output.logits, view.label, view.weight) / share, rel=1e-5)


def test_settings_choose_hard_pixels_for_the_crop_and_its_detail() -> None:
    output, view = seen()
    section = settings.SupervisedCrossEntropy(hard_pixels=settings.HardPixels(threshold=0.2))
    value = CrossEntropy(section, "source", hard_pixels=section.hard_pixels)(Seen(output, view))
    assert section.hard_pixels is not None and output.detail is not None
    whole = hard_cross_entropy(output.logits, view.label, view.weight, section.hard_pixels)
    parts = (BOXES.crop(view.label), BOXES.crop(view.weight))
    part = hard_cross_entropy(output.detail.logits, *parts, section.hard_pixels)
    assert value == torch.lerp(whole, part, 0.1)
    assert value != CrossEntropy(section, "source")(Seen(output, view))
    chosen = settings.Objectives(source=section, mixed=False, feature_distance=False, pixel_contrast=False)
    student = SimpleNamespace(decoder=SimpleNamespace(classifiers=lambda: [nn.Conv2d(4, 3, 1)]))
    built = build_objectives(chosen, student, ClassTable(CITYSCAPES))  # type: ignore[arg-type]
    assert built["source"](Seen(output, view)) == value


def test_hard_pixels_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with an image each, of which different numbers of pixels are hard: the mean of their values."""
    output, view = seen()
    hard = settings.HardPixels(threshold=0.2)
    images = [tensor[i : i + 1] for i in range(2) for tensor in (output.logits, view.label, view.weight)]
    expected = hard_cross_entropy(output.logits, view.label, view.weight, hard)
    kept: list[Tensor] = []
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda count: kept.append(count) or count)
    for rank in (images[:3], images[3:]):
        hard_cross_entropy(*rank, hard)
    assert kept[0] != kept[1]
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda _: sum(kept))
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    values = [hard_cross_entropy(*rank, hard) for rank in (images[:3], images[3:])]
    torch.testing.assert_close(sum(values) / 2, expected)


def test_hard_pixels_without_labels_are_exactly_zero_and_connected() -> None:
    output, view = seen()
    view.label.fill_(255)
    section = settings.SupervisedCrossEntropy(hard_pixels=settings.HardPixels())
    value = CrossEntropy(section, "source", hard_pixels=section.hard_pixels)(Seen(output, view))
    assert value == 0
    value.backward()
    assert output.logits.grad is not None and not output.logits.grad.any()
