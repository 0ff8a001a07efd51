"""Confidence of classes, the laws and rates that follow from it, and the weights of pixels: AEL's own values."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.adaptation.class_confidence import (
    class_law,
    keep_pixels,
    keep_rates,
    move_confidence,
    paste_law,
    sum_confidence,
    weigh_pixels,
)
from cluda_cli.adaptation.cutmix import draw_class
from cluda_cli.adaptation.teacher import ema_decay
from cluda_cli.data.labels import IGNORE
from cluda_cli.objectives.cross_entropy import hard_pixels, measure_pixels

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float64, "float64_max_abs"), (torch.float32, "float32_max_abs")], ids=str
)
CONFIDENCE = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
ALL = torch.ones(3, dtype=torch.bool)


def within(found: Tensor, expected: Tensor, bound: float) -> bool:
    return bool((found.detach().double() - expected).abs().max() <= bound)


@pytest.mark.reference
@PRECISIONS
def test_confidence_of_the_reference_where_absent_classes_hold(dtype: torch.dtype, bits: str, golden: Any) -> None:
    tensors, description = golden("21_ael/a01_confidence_bank")
    bounds, confidence = description["tolerance_demanded"]["bounds"], tensors["in.conf0"].to(dtype)
    seen = torch.ones(19, dtype=torch.bool)
    for step in range(3):
        label = tensors[f"in.step{step}.labels"].long()
        sums = sum_confidence(tensors[f"in.step{step}.logits"].to(dtype), label, label != IGNORE)
        batch, expected = sums[0] / sums[1].clamp_min(1), tensors[f"out64.step{step}.batch_confidence"]
        assert within(batch, expected, bounds[f"step{step}.batch_confidence"][bits])
        confidence = move_confidence(confidence, seen, sums, description["settings"]["momentum"])
        name = f"step{step}.conf"
        assert within(confidence, tensors[f"out64_consistent.{name}"], bounds[f"consistent.{name}"][bits])


def test_a_class_takes_its_first_confidence_whole_and_keeps_it_while_absent() -> None:
    sums = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 2.0]])
    seen = torch.tensor([False, False, True])
    moved = move_confidence(torch.tensor([0.0, 0.2, 0.9]), seen, sums, 0.75)
    torch.testing.assert_close(moved, torch.tensor([0.75, 0.2, 0.8]))


@pytest.mark.reference
@PRECISIONS
def test_laws_and_rates_of_the_reference(dtype: torch.dtype, bits: str, golden: Any) -> None:
    tensors, description = golden("21_ael/a02_laws")
    bounds, confidence = description["tolerance_demanded"]["bounds"], tensors["in.conf"].to(dtype)
    law, seen = class_law(confidence, 1.0), torch.ones(19, dtype=torch.bool)
    assert within(law, tensors["out64.sampling_law"], bounds["sampling_law"][bits])
    name = "copy_paste_law_all_classes"
    assert within(paste_law(confidence), tensors[f"out64_consistent.{name}"], bounds[f"consistent.{name}"][bits])
    excluded = description["settings"]["copy_paste_excluded_classes"]
    some = paste_law(confidence, excluded)
    pasted = [k for k in range(19) if k not in excluded]
    assert within(some[pasted], tensors["out64.copy_paste_law"], bounds["copy_paste_law"][bits])
    assert not some[excluded].any()
    for exponent in (1.0, 0.5):
        rates = keep_rates(confidence, seen, exponent)
        assert within(rates, tensors[f"out64.keep_rate_beta{exponent}"], bounds[f"keep_rate_beta{exponent}"][bits])
    if dtype == torch.float64:
        drawn = tensors["in.u"].tolist()
        assert [draw_class(law, u) for u in drawn] == tensors["out.drawn_class"].tolist()
        expected = tensors["out.drawn_copy_paste_class"].tolist()
        assert [draw_class(some, u) for u in drawn] in (expected, [pasted[k] for k in expected if k < len(pasted)])


def test_laws_and_rates_by_hand() -> None:
    torch.testing.assert_close(
        class_law(CONFIDENCE, 1.0), torch.tensor([0.2120, 0.3162, 0.4718]).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        paste_law(CONFIDENCE), torch.tensor([0.2293, 0.3390, 0.4317]).double(), atol=1e-4, rtol=0
    )
    rates = keep_rates(CONFIDENCE, ALL, 0.5)
    torch.testing.assert_close(rates, torch.tensor([0.3333, 0.7454, 1.0]).double(), atol=1e-4, rtol=0)
    cold = class_law(CONFIDENCE, 0.01)
    assert cold[2] > 0.999


def test_drawn_classes_follow_the_law() -> None:
    law, generator = class_law(CONFIDENCE, 1.0), torch.Generator().manual_seed(0)
    drawn = [draw_class(law, u) for u in torch.rand(4000, generator=generator, dtype=torch.float64).tolist()]
    shares = torch.bincount(torch.tensor(drawn)) / len(drawn)
    torch.testing.assert_close(shares.double(), law, atol=0.03, rtol=0)
    assert draw_class(torch.tensor([0.5, 0.5, 0.0]), 1.0) == 1


def test_classes_that_were_never_seen_keep_all_pixels_and_do_not_lower_others() -> None:
    seen = torch.tensor([True, True, False])
    torch.testing.assert_close(keep_rates(CONFIDENCE, seen, 1.0), torch.tensor([0.2, 1.0, 1.0]).double())
    assert (keep_rates(torch.zeros(3), ~ALL, 1.0) == 1).all()
    assert (keep_rates(torch.ones(3), ALL, 1.0) == 1).all()
    assert (keep_rates(CONFIDENCE, ALL, 0.0) == 1).all()


@pytest.mark.reference
@PRECISIONS
@pytest.mark.parametrize("name", ["a03_dr_aes", "a04_dr_only", "a05_dr_aes_threshold", "a06_dr_all_ignored"])
def test_weights_of_the_reference(name: str, dtype: torch.dtype, bits: str, golden: Any) -> None:
    """The class of a pixel is the student's there. The mean over counted pixels is the loss of the paper's formula."""
    tensors, description = golden(f"21_ael/{name}")
    s, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    logits = tensors["in.student_logits"].to(dtype).requires_grad_()
    probability, label = tensors["in.teacher_confidence"].to(dtype), tensors["in.pseudo_labels"].long()
    kept = torch.ones_like(label, dtype=torch.bool)
    if s["aes"]:
        rates = keep_rates(tensors["in.conf"].to(dtype), torch.ones(19, dtype=torch.bool), s["beta"])
        predicted = logits.argmax(1)
        drawn = tensors["in.uniform"].to(dtype)[
            predicted, torch.arange(13 if "a03" in name else label.shape[1])[:, None], torch.arange(label.shape[2])
        ]
        kept = keep_pixels(predicted, rates, drawn)
    counted = (label != IGNORE) & (probability >= s["threshold"])
    weight = weigh_pixels(probability, kept, counted, s["gamma"])
    loss = (weight * measure_pixels(logits, label)).sum() / counted.sum().clamp_min(1)
    (gradient,) = torch.autograd.grad(loss, logits)
    found = {"loss": loss, "grad_logits": gradient, "weight_map": weight / counted.sum().clamp_min(1)}
    for key, value in found.items():
        consistent = f"out64_consistent.{key}"
        bound = bounds.get(f"consistent.{key}", bounds.get(key))
        if consistent in tensors:
            assert within(value.reshape(tensors[consistent].shape), tensors[consistent], bound[bits]), key
    if "out_consistent.kept" in tensors:
        assert torch.equal((kept & counted).to(torch.uint8), tensors["out_consistent.kept"] * counted)


def test_weights_by_hand_have_a_mean_of_one() -> None:
    probability = torch.tensor([[[0.5, 1.0, 0.9, 0.8]]], dtype=torch.float64)
    counted = torch.tensor([[[True, True, False, True]]])
    kept = torch.tensor([[[True, True, True, False]]])
    weight = weigh_pixels(probability, kept, counted, 2.0)
    torch.testing.assert_close(weight, torch.tensor([[[0.6, 2.4, 0.0, 0.0]]]).double())
    assert weight.sum() == pytest.approx(int(counted.sum()))
    loss = torch.tensor([2.0, 1.0, 7.0, 7.0]).double()
    assert (weight * loss).sum() / 3 == pytest.approx(1.2)
    assert not weigh_pixels(probability, kept, torch.zeros_like(counted), 2.0).any()


def test_the_class_of_a_pixel_decides_whether_it_counts() -> None:
    rates = torch.tensor([0.0, 0.25, 1.0])
    drawn = torch.tensor([[[0.9, 0.7, 0.8, 0.01, 0.5]]])
    label = torch.tensor([[[0, 1, 1, 2, 255]]])
    assert keep_pixels(label, rates, drawn)[0, 0, :4].tolist() == [False, False, True, True]


@pytest.mark.reference
@PRECISIONS
def test_hard_pixels_of_the_reference(dtype: torch.dtype, bits: str, golden: Any) -> None:
    """The reference counts the least number in the whole batch; here its two images are laid side by side."""
    tensors, description = golden("21_ael/a11_ohem")
    s, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    logits, label = tensors["in.logits"].to(dtype).requires_grad_(), tensors["in.labels"].long()
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    labelled = label != IGNORE
    share = s["min_kept"] / int(labelled.sum())
    kept = hard_pixels(loss.detach().flatten()[None, None], labelled.flatten()[None, None], s["thresh"], share)
    assert torch.equal(kept.view_as(label).to(torch.uint8), tensors["out.kept"])
    mean = loss[kept.view_as(label)].mean()
    assert within(mean.reshape(1), tensors["out64.loss"], bounds["loss"][bits])
    (gradient,) = torch.autograd.grad(mean, logits)
    assert within(gradient, tensors["out64.grad_logits"], bounds["grad_logits"][bits])


@pytest.mark.reference
def test_the_decay_of_the_reference(golden: Any) -> None:
    tensors, _ = golden("21_ael/a12_teacher_decay")
    found = [ema_decay(step, 0.99) for step in tensors["in.step"].tolist()]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), tensors["out64.decay"], rtol=1e-12, atol=0)
