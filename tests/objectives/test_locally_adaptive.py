"""Scores are merged with those of neighbours of the same label; losses have a power mean."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.locally_adaptive import LocallyAdaptive, merge_neighbours, merged_cross_entropy, power_mean


def problem(seed: int = 0, classes: int = 4, side: int = 7) -> tuple[Tensor, Tensor]:
    """Logits 2 classes side side, float64, and labels in blocks with some 255."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (2, 4, 4), generator=generator).repeat_interleave(2, 1).repeat_interleave(2, 2)
    label = label[:, :side, :side].clone()
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    return torch.randn(2, classes, side, side, generator=generator).double().requires_grad_(), label


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["l01_window3_k5", "l02_window1_is_ce", "l03_constant", "l04_all_ignored"])
def test_a_second_computation_from_the_specification_agrees(name: str, dtype: torch.dtype, golden: Any) -> None:
    """Losses of windows first, then value and gradient."""
    tensors, description = golden(f"23_lal/{name}")
    bounds, bits = description["tolerance_demanded"]["bounds"], "float64" if dtype == torch.float64 else "float32"
    label = tensors["in.labels"].long()
    for case, given in description["settings"].items():
        logits = tensors["in.logits"].to(dtype).requires_grad_()
        section = settings.LocallyAdaptive(window=given["window"], stride=given["stride"], spread=given["s"])
        merged, centre = merge_neighbours(logits, label, section.window, section.stride, section.spread)
        losses = F.cross_entropy(merged, centre, ignore_index=255, reduction="none")
        weight = torch.ones(label.shape, dtype=dtype)
        value = merged_cross_entropy(logits, label, weight, section, given["k"])
        (gradient,) = torch.autograd.grad(value, logits)
        for key, actual in {"window_losses": losses, "loss": value, "grad_logits": gradient}.items():
            error = (actual.detach() - tensors[f"out64.{case}.{key}"].view(actual.shape)).abs().max()
            assert error <= bounds[f"{case}.{key}"][f"{bits}_max_abs"], f"{case}.{key}"


@pytest.mark.parametrize(("window", "stride", "spread"), [(3, 1, 1.0), (5, 2, 0.7), (5, 3, 2.0), (1, 2, 1.0)])
def test_scores_are_merged_as_loops_do_it(window: int, stride: int, spread: float) -> None:
    logits, label = problem()
    merged, centre = merge_neighbours(logits, label, window, stride, spread)
    places = range(0, 7, stride)
    assert centre.shape == (2, len(places), len(places))
    for image, (i, y), (j, x) in itertools.product(range(2), enumerate(places), enumerate(places)):
        assert centre[image, i, j] == label[image, y, x]
        if label[image, y, x] == 255:
            continue
        total, weights = torch.zeros(4, dtype=torch.float64), 0.0
        for v, u in itertools.product(range(7), repeat=2):
            distance = max(abs(v - y), abs(u - x))
            if distance <= window // 2 and label[image, v, u] == label[image, y, x]:
                weight = math.exp(-(distance**2) / (2 * spread**2))
                total, weights = total + weight * logits[image, :, v, u], weights + weight
        torch.testing.assert_close(merged[image, :, i, j], total / weights)


def test_window_1_and_order_1_is_the_mean_cross_entropy_of_labelled_pixels() -> None:
    logits, label = problem()
    section = settings.LocallyAdaptive(window=1)
    value = merged_cross_entropy(logits, label, torch.ones(label.shape).double(), section, 1.0)
    torch.testing.assert_close(value, F.cross_entropy(logits, label, ignore_index=255))


def test_the_loss_of_a_window_is_at_most_the_mean_of_its_pixels() -> None:
    """Cross-entropy is convex in the scores."""
    logits, label = problem()
    merged, centre = merge_neighbours(logits, label, 5, 1, 1.0)
    of_window = F.cross_entropy(merged, centre, ignore_index=255, reduction="none")
    of_pixels = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    mean = merge_neighbours(of_pixels[:, None], label, 5, 1, 1.0)[0][:, 0]
    assert (of_window <= mean + 1e-12)[label != 255].all()
    assert (of_window < mean - 1e-3)[label != 255].any()


@pytest.mark.parametrize("order", [1.0, 5.0])
def test_power_mean_in_closed_form(order: float) -> None:
    values = torch.tensor([[[1.0, 3.0, 100.0]]], dtype=torch.float64)
    counted = torch.tensor([[[True, True, False]]])
    value = power_mean(values, torch.ones_like(values), counted, order)
    assert value.item() == pytest.approx((0.5 * (1 + 3**order)) ** (1 / order))
    if order == 5:
        assert value.item() == pytest.approx(2.6138, abs=1e-4)
    weight = torch.tensor([[[0.5, 0.25, 1.0]]], dtype=torch.float64)  # the count is that of the values, not of weights
    expected = ((0.5 + 0.25 * 3**order) / 2) ** (1 / order)
    assert power_mean(values, weight, counted, order).item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_power_means_of_extreme_losses_are_finite(scale: float) -> None:
    values = (scale * torch.tensor([[[1.0, 3.0]]])).requires_grad_()
    value = power_mean(values, torch.ones(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool), 5.0)
    assert value.item() == pytest.approx(2.6138 * scale, rel=1e-4)
    (gradient,) = torch.autograd.grad(value, values)
    assert torch.isfinite(gradient).all() and gradient[0, 0, 1] > gradient[0, 0, 0] > 0


@pytest.mark.parametrize("ignored", ["label", "weight"])
def test_ignored_and_weightless_pixels_are_neither_centres_nor_neighbours(ignored: str) -> None:
    logits, label = problem()
    weight = torch.ones(label.shape).double()
    if ignored == "label":
        label[:, 2:4] = 255
    else:
        weight[:, 2:4] = 0
    changed = logits.detach().clone()
    changed[:, :, 2:4] += torch.randn(2, 4, 2, 7)
    section = settings.LocallyAdaptive(window=5)
    assert torch.equal(
        merged_cross_entropy(changed, label, weight, section, 5.0),
        merged_cross_entropy(logits, label, weight, section, 5.0),
    )
    weight.zero_()
    value = merged_cross_entropy(logits, label, weight, section, 5.0)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_pixels_of_another_label_do_not_influence_a_window() -> None:
    logits, label = torch.randn(1, 3, 1, 5).double(), torch.tensor([[[0, 0, 1, 2, 2]]])
    merged, _ = merge_neighbours(logits, label, 5, 1, 1.0)
    changed = logits.clone()
    changed[..., 2] += 7
    again, _ = merge_neighbours(changed, label, 5, 1, 1.0)
    assert torch.equal(again[..., [0, 1, 3, 4]], merged[..., [0, 1, 3, 4]])


def view(name: str) -> View:
    _, label = problem()
    return View(name, torch.zeros(2, 3, 7, 7), label, *torch.full((2, 2, 7, 7), 0.5))


def test_ground_truth_and_pseudo_labels_have_orders_of_their_own() -> None:
    logits, label = problem()
    output = Output(logits.float(), logits.float(), (), torch.zeros(2, 3, 7, 7))
    section = settings.LocallyAdaptive(views=("source", "masked"), order=4, pseudo_label_order=2)
    objective = LocallyAdaptive(section)
    assert objective.reads == (("source",), ("masked",))
    for name, order in (("source", 4.0), ("masked", 2.0)):
        expected = merged_cross_entropy(logits.float(), label, torch.full((2, 7, 7), 0.5), section, order)
        assert objective(Seen(output, view(name))) == expected


def test_with_window_1_and_order_1_it_is_cross_entropy_but_for_the_number_of_pixels() -> None:
    """Class weights included; cross-entropy divides by all pixels."""
    logits, label = problem()
    shown = view("source")
    shown = View(*(getattr(shown, n) for n in ("name", "image", "label", "weight", "probability")), truth=label != 255)
    seen = Seen(Output(logits.float(), logits.float(), (), shown.image), shown)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    value = LocallyAdaptive(settings.LocallyAdaptive(window=1, order=1), weights)(seen)
    plain = CrossEntropy(settings.CrossEntropy(), "source", weights)(seen)
    torch.testing.assert_close(value * (label != 255).double().mean(), plain.double(), check_dtype=False)


def test_two_ranks_have_the_power_mean_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has one image; what the other one gathers and sums is put in its place."""
    logits, label = problem()
    losses, counted = logits.square().sum(dim=1), label != 255
    weight = torch.ones_like(losses)
    expected = power_mean(losses, weight, counted, 5.0)
    (wanted,) = torch.autograd.grad(expected, losses, retain_graph=True)
    other = power_mean_parts(losses[1:], counted[1:], losses.detach().amax())
    gathers = iter([losses[1:].detach().amax()[None], other[None]])
    monkeypatch.setattr(collectives, "all_gather_rows", lambda one: torch.cat([one, next(gathers)]))
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda _: counted.sum())
    value = power_mean(losses[:1], weight[:1], counted[:1], 5.0)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient[:1], wanted[:1])


def power_mean_parts(losses: Tensor, counted: Tensor, scale: Tensor) -> Tensor:
    return ((losses.detach() / scale) ** 5 * counted).sum()


def test_a_window_without_a_centre_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"objectives\.locally_adaptive\.window must be odd"):
        settings.Settings.model_validate({"objectives": {"locally_adaptive": {"window": 4}}})
