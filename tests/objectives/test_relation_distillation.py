"""Relations between pixels: what is measured, which pixels are compared, and how prototypes move."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.teacher import PseudoLabels
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.relation_distillation import (
    RelationDistillation,
    assign,
    attract,
    find_neighbours,
    log_relations,
    move_prototypes,
    sample_places,
    share_prototype,
    soft_relations,
)
from tests.conftest import Golden

FORMS = ("soft", "neighbours", "prototypes")


def attract_by_log_sum(student: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """The third-party form, with which `attract` is compared: the sum of the positives inside the logarithm."""
    return -log_relations(student, temperature).masked_fill(~positive, -torch.inf).logsumexp(dim=1).mean()


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["r01_relations", "r02_teacher_equals_student", "r03_identical_embeddings"])
def test_relations_of_the_specification(case: str, dtype: torch.dtype, golden: Golden) -> None:
    tensors, description = golden(f"24_rekd/{case}")
    bounds = description["tolerance_demanded"]["bounds"]
    student, teacher = tensors["in.student"].to(dtype).requires_grad_(), tensors["in.teacher"].to(dtype)
    section = description["settings"]
    temperature = section["tau_student"]
    near = find_neighbours(teacher, section["k"])
    values = {
        "soft": soft_relations(student, teacher, temperature, section["tau_teacher"]),
        "topk_mean": attract(student, near, temperature),
        "topk_logsum": attract_by_log_sum(student, near, temperature),
    }
    found: dict[str, Tensor] = {}
    if "in.bank" in tensors:
        bank = tensors["in.bank"].to(dtype)
        values["proto"] = attract(student, share_prototype(teacher, bank), temperature)
        found["proto.bank_after"] = move_prototypes(bank, teacher, 0.99)
        assert torch.equal(assign(teacher, bank), tensors["out.proto.assignment"])
        neighbours = torch.zeros(24, 24, dtype=torch.bool).scatter(1, tensors["out.topk_neighbours"], value=True)
        assert torch.equal(near, neighbours)
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        found |= {f"{name}.loss": value, f"{name}.grad_student": gradient}
    bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
    checked = [name for name in bounds if name in found]
    assert len(checked) == len([name for name, bound in bounds.items() if bound != "exact"])
    for name in checked:
        expected = tensors[f"out64.{name}"].view(found[name].shape)
        assert (found[name].detach() - expected).abs().max() <= bounds[name][bits], name


def test_known_values() -> None:
    same = torch.ones(16, 4)
    assert soft_relations(same, same, 0.1, 0.1) == 0
    assert attract(same, find_neighbours(same, 5), 0.1).item() == pytest.approx(math.log(15), abs=1e-5)
    assert attract_by_log_sum(same, find_neighbours(same, 5), 0.1).item() == pytest.approx(math.log(3), abs=1e-5)


def test_rotations_change_nothing_and_the_teacher_learns_nothing() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(12, 5).double(), torch.randn(12, 7).double().requires_grad_()
    turn, other = (torch.linalg.qr(torch.randn(side, side).double())[0] for side in (5, 7))
    value = soft_relations(student.requires_grad_(), teacher, 0.1, 0.2)
    torch.testing.assert_close(soft_relations(3 * student @ turn, teacher @ other, 0.1, 0.2), value)
    value.backward()
    assert student.grad is not None and student.grad.any() and teacher.grad is None


def test_pixels_without_a_positive_leave_the_mean() -> None:
    torch.manual_seed(0)
    student, positive = torch.randn(6, 4), torch.zeros(6, 6, dtype=torch.bool)
    assert attract(student, positive, 0.1) == 0
    positive[1, 4] = positive[4, 1] = positive[4, 2] = True
    costs = -log_relations(student, 0.1)
    expected = (costs[1, 4] + (costs[4, 1] + costs[4, 2]) / 2) / 2
    torch.testing.assert_close(attract(student, positive, 0.1), expected)


def test_no_more_neighbours_than_there_are_pixels() -> None:
    assert torch.equal(find_neighbours(torch.randn(3, 4), 5), ~torch.eye(3, dtype=torch.bool))


def test_rows_without_a_pixel_stay_and_empty_ones_get_none() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    teacher = torch.tensor([[-5.0, -1.0], [-1.0, 0.5]])
    assert assign(teacher, bank).tolist() == [1, 1]
    moved = move_prototypes(bank, teacher, 0.5)
    assert torch.equal(moved[0], bank[0]) and torch.equal(moved[2], bank[2])
    assert moved[1].norm().item() == pytest.approx(1)
    assert not torch.equal(moved[1], bank[1])
    assert not share_prototype(teacher, torch.zeros(3, 2)).any()


def test_places_are_the_same_in_maps_of_other_sizes() -> None:
    """On a map whose values are its coordinates, at the centre of each cell of a coarser and of a finer grid."""
    rows, columns = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(12) + 0.5) / 12, indexing="ij")
    maps = torch.stack([rows, columns])[None]
    found = sample_places(maps, torch.tensor([[0, 5, 11]]), (3, 4))[0]
    torch.testing.assert_close(found, torch.tensor([[1 / 6, 1 / 8], [3 / 6, 3 / 8], [5 / 6, 7 / 8]]))
    own = sample_places(maps, torch.arange(96)[None], (8, 12))
    torch.testing.assert_close(own[0].T.view(2, 8, 12), maps[0])


def see(seed: int = 0, images: int = 2, cells: int = 6) -> Seen:
    """Noise; the first rows are ignored, the last columns are outside the valid frame."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 * cells
    features = torch.randn(images, 4, cells, cells, generator=generator).requires_grad_()
    guide = torch.randn(images, 5, cells, cells, generator=generator)
    label, probability = torch.zeros(images, side, side, dtype=torch.long), torch.full((images, side, side), 0.3)
    label[:, :4] = 255
    probability[:, :, -2:] = 0
    image, seeds = torch.zeros(images, 3, side, side), torch.arange(images) + 10 * seed
    view = View("target", image, label, torch.zeros_like(probability), probability, seed=seeds, guide=guide)
    return Seen(Output(features, features, (), image), view)


def build(relations: str = "soft", **section: Any) -> RelationDistillation:
    chosen = settings.RelationDistillation(relations=relations, **section)
    return RelationDistillation(chosen, channels=5)


@pytest.mark.parametrize("samples", [6, 20, 1000])
def test_as_many_labelled_places_of_each_image_as_asked_for(samples: int) -> None:
    seen = see()
    objective = build(samples=samples)
    value = objective(seen)
    (gradient,) = torch.autograd.grad(value, seen.output.features)
    reached = gradient.any(dim=1)  # B h w
    assert reached.flatten(1).sum(dim=1).tolist() == [min(samples // 2, 4 * 5)] * 2
    assert not reached[:, :2].any() and not reached[:, :, -1].any()


def test_other_steps_compare_other_places() -> None:
    seen, objective = see(), build(samples=8)
    other = Seen(seen.output, replace(seen.view, seed=torch.tensor([7, 8])))
    assert objective(seen) == objective(seen) != objective(other)


def test_teacher_like_student_costs_nothing() -> None:
    seen = see()
    same = Seen(seen.output, replace(seen.view, guide=seen.output.features.detach()))
    assert build()(same).item() == pytest.approx(0, abs=1e-5)
    assert build()(seen) > 0.01


@pytest.mark.parametrize("relations", FORMS)
def test_every_form_is_finite_connected_and_zero_without_labels(relations: str) -> None:
    seen, objective = see(), build(relations, prototypes=4)
    objective.update(SimpleNamespace(), [seen])  # type: ignore[arg-type]
    value = objective(seen)
    (gradient,) = torch.autograd.grad(value, seen.output.features)
    assert value > 0 and torch.isfinite(gradient).all() and gradient.any()
    for label in (torch.full_like(seen.view.label, 255), one_labelled(seen.view.label)):
        nothing = objective(Seen(seen.output, replace(seen.view, label=label)))
        assert nothing == 0
        assert torch.equal(torch.autograd.grad(nothing, seen.output.features)[0], torch.zeros_like(gradient))


def one_labelled(label: Tensor) -> Tensor:
    """A single labelled cell, which there is nothing to compare with."""
    alone = torch.full_like(label, 255)
    alone[0, 8, 8] = 0
    return alone


def test_prototypes_begin_as_features_and_are_state() -> None:
    seen, objective = see(), build("prototypes", prototypes=50, samples=40)
    assert objective.updates and not build().updates
    first = objective(seen)
    assert first == 0 and first.requires_grad
    objective.update(SimpleNamespace(), [seen])  # type: ignore[arg-type]
    lengths = objective.bank.norm(dim=1)
    assert torch.allclose(lengths[:40], torch.ones(40)) and not lengths[40:].any()
    objective.update(SimpleNamespace(), [see(1), Seen(see(2).output, replace(see(2).view, name="mixed"))])  # type: ignore[arg-type]
    assert objective.bank.any(dim=1).all()
    other = build("prototypes", prototypes=50, samples=40)
    other.load_state_dict(objective.state_dict())
    assert other(see(3)) == objective(see(3)) > 0


def test_micro_batches_move_prototypes_like_the_batch() -> None:
    seen = see()
    whole, parts = build("prototypes", prototypes=6), build("prototypes", prototypes=6)
    features = seen.output.features
    one = [Seen(replace(seen.output, features=features[i : i + 1]), seen.view.part(slice(i, i + 1))) for i in range(2)]
    whole.update(SimpleNamespace(), [seen])  # type: ignore[arg-type]
    parts.update(SimpleNamespace(), one)  # type: ignore[arg-type]
    assert torch.equal(whole.bank, parts.bank)


def test_target_images_come_with_what_the_teacher_made_of_them() -> None:
    features = torch.ones(2, 5, 6, 6)
    scene = SimpleNamespace(pseudo_labels=PseudoLabels(*torch.ones(3, 2, 4, 4), features=features))
    view, objective = replace(see().view, guide=None), build()
    assert objective.edit(view, scene).guide is features  # type: ignore[arg-type]
    assert objective.edit(replace(view, name="mixed"), scene).guide is None  # type: ignore[arg-type]


def test_pixels_of_all_ranks_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first of two ranks, of which the other one has the second image."""
    seen = see()
    first = Seen(replace(seen.output, features=seen.output.features[:1]), seen.view.part(slice(0, 1)))
    second = Seen(replace(seen.output, features=seen.output.features[1:]), seen.view.part(slice(1, 2)))
    expected, objective = build(samples=20)(seen), build(samples=20)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    sent: list[Tensor] = []
    monkeypatch.setattr(collectives, "all_gather_rows", lambda rows: sent.append(rows) or rows)
    objective(second)
    theirs = iter(sent[:3])
    monkeypatch.setattr(collectives, "all_gather_rows", lambda rows: torch.cat([rows, next(theirs)]))
    torch.testing.assert_close(objective(first), expected)
