"""Cross-entropy counts every pixel in its mean, whatever its weight."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.segmenter import Detail, Output
from cluda_cli.objectives.cross_entropy import CrossEntropy, weighted_cross_entropy


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
