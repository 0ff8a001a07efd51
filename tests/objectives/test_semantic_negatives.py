"""Contrast of regions, change head, and the views they are measured on."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluda_cli import presets, settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.engine.step import training_step
from cluda_cli.errors import SettingsError
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.semantic_negatives import (
    RESTYLED,
    SWAPPED,
    SemanticNegatives,
    agreement,
    change_loss,
    combine,
    region_contrast,
)

ON = {"objectives": {"semantic_negatives": {"max_share": 0.9}}}
VIEWS = ("original", "synonym", "antonym")


def near(actual: Tensor, tensors: dict[str, Tensor], description: dict[str, Any], key: str) -> bool:
    """Whether a float64 result is as near to the reference as its description demands."""
    expected = tensors[f"out64.{key}"]
    bound = description["tolerance_demanded"]["bounds"][key]["float64_max_abs"]
    return (actual.detach() - expected.view(actual.shape)).abs().max().item() <= bound


@pytest.mark.reference
@pytest.mark.parametrize("case", ["c03_dense_counterpart", "c04_dense_zero_similarity"])
def test_reference_vectors(case: str, golden: Any) -> None:
    tensors, description = golden(f"30_cline/{case}")
    features = [tensors[f"in.{name}"].double().requires_grad_() for name in VIEWS]
    head = nn.Linear(features[0].shape[1], 3).double()
    head.load_state_dict({name: tensors[f"param.change_head.{name}"].double() for name in ("weight", "bias")})
    label, region = tensors["in.labels"].long(), tensors["in.regions"].long()
    contrast = region_contrast(*features, region.where(label != 255, 0), description["settings"]["tau"])
    change = change_loss(head, features[1], features[2], region, label == 255)
    (contrast + change).backward()
    assert near(contrast, tensors, description, "contrast") and near(change, tensors, description, "change")
    for name, tensor in zip(VIEWS, features, strict=True):
        assert tensor.grad is not None and near(tensor.grad, tensors, description, f"grad_{name}")
    if case == "c04_dense_zero_similarity":
        assert contrast.item() == pytest.approx(math.log(2), rel=1e-9)


@pytest.mark.reference
@pytest.mark.parametrize("case", ["c01_three_terms_zero", "c02_log_vars"])
def test_sentence_term_and_combination_as_the_reference(case: str, golden: Any) -> None:
    """Of the language parts only the values of their terms are taken."""
    tensors, description = golden(f"30_cline/{case}")
    pooled = tensors["in.pooled"].double().requires_grad_()
    original, synonym, antonym = pooled.chunk(3)
    sentence = agreement((original * synonym).mean(dim=1), (original * antonym).mean(dim=1)).mean()
    assert near(sentence, tensors, description, "term.sentence")
    log_variances = tensors["param.log_vars"].double().requires_grad_()
    others = [tensors[f"out64.term.{name}"][0] for name in ("mlm", "token")]
    total = combine(torch.stack([*others, sentence]), log_variances)
    total.backward()
    assert near(total, tensors, description, "loss")
    assert pooled.grad is not None and near(pooled.grad, tensors, description, "grad_pooled")
    assert log_variances.grad is not None
    assert near(log_variances.grad, tensors, description, "grad_param.log_vars")


def test_without_regions_or_cells_it_is_exactly_zero_and_connected() -> None:
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    nowhere = torch.zeros(2, 3, 3, dtype=torch.int64)
    contrast = region_contrast(features, features, features, nowhere, 0.5)
    change = change_loss(nn.Linear(4, 3), features, features, nowhere, torch.ones_like(nowhere, dtype=torch.bool))
    assert contrast == change == 0
    (gradient,) = torch.autograd.grad(contrast + change, features)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def see(name: str, features: Tensor, label: Tensor) -> Seen:
    view = View(name, torch.zeros(len(label), 3, *label.shape[1:]), label, *torch.ones(2, *label.shape))
    return Seen(Output(features, features, (), view.image), view)


def test_regions_are_where_the_swapped_label_differs_and_the_original_has_one() -> None:
    """Two classes are swapped in, on cells of two pixels; one cell of the original has no label."""
    torch.manual_seed(0)
    method = SemanticNegatives(settings.SemanticNegatives(temperature=0.5), 5)
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[:, 0:2, 0:2] = 255
    swapped = label.clone()
    swapped[:, 0:2, 0:6], swapped[:, 6:8] = 4, 9
    features = torch.randn(3, 1, 5, 4, 4)
    seen = [see(n, f, swapped if n == SWAPPED else label) for n, f in zip(method.reads[0], features, strict=True)]
    region, ignored = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.bool)
    region[:, 0, 1:3], region[:, 3], ignored[:, 0, 0] = 1, 2, True
    expected = region_contrast(*features, region, 0.5) + change_loss(method.head, *features[1:], region, ignored)
    assert method(*seen) == expected
    with torch.no_grad():
        learned = SemanticNegatives(settings.SemanticNegatives(temperature=0.5, learned_weights=True), 5)
        learned.head.load_state_dict(method.head.state_dict())
        torch.testing.assert_close(learned(*seen), expected)


def test_views_and_terms_of_a_step(start: Any) -> None:
    """Restyled images keep their labels; swapped ones differ from the source exactly where labels do, but for seams."""
    run, stream = start(ON)
    batch = next(stream)
    result = training_step(run, batch)
    assert list(result.terms) == ["source/source", f"source+{RESTYLED}+{SWAPPED}/semantic_negatives"]
    source, restyled, swapped = result.views
    assert torch.equal(restyled.label, source.label)
    assert (restyled.image - source.image).abs().mean() > 0.05
    region = swapped.label != source.label
    assert region.any()
    assert torch.equal(swapped.label[region], source.label.roll(-1, 0)[region])
    # The kernel of the seam reaches two pixels in so small a crop.
    near_region = torch.nn.functional.max_pool2d(region[:, None].float(), 5, stride=1, padding=2) > 0
    assert torch.equal((swapped.image - source.image) * ~near_region, torch.zeros_like(source.image))
    assert list(run.networks) == ["student"]


def test_learned_weights_move(start: Any) -> None:
    run, stream = start({"objectives": {"semantic_negatives": {"max_share": 0.9, "learned_weights": True}}})
    for _ in range(2):
        training_step(run, next(stream))
    weights = run.objectives["semantic_negatives"].log_variances
    assert torch.all(weights != 0) and torch.isfinite(weights).all()


@pytest.mark.parametrize("learned", [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(assert_resume_is_exact: Any, learned: bool) -> None:
    assert_resume_is_exact({"objectives": {"semantic_negatives": {"max_share": 0.9, "learned_weights": learned}}})


def test_a_batch_of_one_image_has_nothing_to_swap() -> None:
    with pytest.raises(SettingsError, match=r"objectives\.semantic_negatives needs a data\.batch_size of 2 or more"):
        presets.load(["daformer-semantic-negatives"], {"data": {"batch_size": 1}})
