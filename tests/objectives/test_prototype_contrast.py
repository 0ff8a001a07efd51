"""What pixels are compared, with which statistics, and where these come from."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Domain, Seen, View
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.prototype_contrast import PrototypeContrast, leave_out_wrong, to_cells
from cluda_cli.objectives.prototypes.statistics import batch_statistics

CLASSES, FUSED, CELLS, STRIDE = 4, 6, 8, 4
kinds = pytest.mark.parametrize("statistics", ["mean", "bank", "distribution"])
taps = pytest.mark.parametrize("features", ["fused", "projection"])


def build(**section: Any) -> PrototypeContrast:
    torch.manual_seed(0)
    section = {"features": "fused", "projection_channels": 5, "temperature": 1.0} | section
    return PrototypeContrast(settings.PrototypeContrast(**section), CLASSES, (3, 4), FUSED)


def see(name: str = "source", seed: int = 0, images: int = 2, weight: float = 1.0) -> Seen:
    """Noise with labels 0, 1 and 2 in columns of cells, in the opposite order in all images but the first.

    3 is nowhere, and 255 in the first two rows of cells.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).repeat_interleave(STRIDE).expand(images, CELLS * STRIDE, -1).clone()
    label[1:] = label[1:].flip(2)
    label[:, : 2 * STRIDE] = 255
    maps = [torch.randn(images, c, CELLS // i, CELLS // i, generator=generator) for i, c in ((1, 3), (2, 4))]
    logits, fused = (torch.randn(images, c, CELLS, CELLS, generator=generator) for c in (CLASSES, FUSED))
    leaves = [tensor.requires_grad_() for tensor in (logits, fused, *maps)]
    view = View(name, torch.zeros(images, 3, *label.shape[1:]), label, *torch.full((2, *label.shape), weight))
    return Seen(Output(leaves[0], leaves[1], tuple(leaves[2:]), view.image), view)


def scene(seen: Seen, step: int = 0) -> Any:
    """A step whose source is that of the view, and whose teacher makes of it what the student has made."""
    view = seen.view
    source = Domain(view.image, view.label, view.weight, view.probability, torch.ones_like(view.label).bool())

    def output(image: Tensor, keep_statistics: bool = True) -> Output:
        assert image is source.image and not keep_statistics
        return seen.output.detach()

    return SimpleNamespace(source=source, step=step, teacher=SimpleNamespace(decay=0.9, output=output))


@torch.no_grad()
def update(objective: PrototypeContrast, *seen: Seen, step: int = 0) -> None:
    objective.update(scene(seen[0], step), [Seen(output.detach(), view) for output, view in seen])


def rows(seen: Seen) -> tuple[Tensor, Tensor]:
    """Unit fused features and labels of all cells."""
    label = seen.view.label[:, ::STRIDE, ::STRIDE]
    return F.normalize(seen.output.features, dim=1).movedim(1, -1).flatten(0, 2), label.flatten()


@pytest.mark.reference
def test_labels_reduced_by_majority_as_the_reference(golden: Any) -> None:
    tensors, description = golden("20_proto/p08_proto_majority_labels")
    bounds, label = description["tolerance_demanded"]["bounds"], tensors["in.labels_full"].long()
    cells, weight = to_cells(label, torch.ones(label.shape), (9, 9), 0.75, 19)
    assert torch.equal(cells, tensors["out.reduced_labels"].long())
    assert (weight[cells != 255] == 1).all()
    section = settings.PrototypeContrast(statistics="mean", features="fused", temperature=1)
    objective = PrototypeContrast(section, 19, (), 32)
    objective.known.mean.copy_(tensors["in.mean"])
    objective.known.count += 1
    features, image = tensors["in.feats"].float().requires_grad_(), torch.zeros(2, 3, 36, 36)
    view = View("mixed", image, label, *torch.ones(2, *label.shape))
    value = objective(Seen(Output(torch.zeros(2, 19, 9, 9), features, (), image), view))
    value.backward()
    for key, actual in {"loss": value, "grad_feats": features.grad}.items():
        assert actual is not None
        error = (actual.detach() - tensors[f"out64.{key}"].view(actual.shape)).abs().max()
        assert error <= bounds[key]["float32_max_abs"]


def test_a_cell_has_the_mean_weight_of_its_labelled_pixels() -> None:
    label, weight = torch.zeros(1, 4, 8, dtype=torch.long), torch.ones(1, 4, 8)
    label[0, 0, :4] = 255  # a quarter of the first cell is ignored, a half of the second has no weight
    weight[0, 1:, :4] = torch.tensor([0.2, 0.4, 0.6])[:, None]
    weight[0, :2, 4:] = 0
    cells, means = to_cells(label, weight, (1, 2), 0.75, CLASSES)
    assert cells.tolist() == [[[0, 255]]]
    assert means[0, 0, 0] == pytest.approx(0.4)
    assert torch.equal(to_cells(label, weight, (1, 2), 0.5, CLASSES)[0], torch.tensor([[[0, 0]]]))


@taps
@kinds
def test_the_first_step_knows_nothing_and_the_second_what_the_first_saw(statistics: str, features: str) -> None:
    objective, seen = build(statistics=statistics, features=features), see()
    value = objective(seen)
    assert value == 0
    value.backward()
    update(objective, seen)
    assert objective.known.met.tolist() == [True, True, True, False]
    for one in (see(), see("mixed", 1, weight=0.3)):
        value = objective(one)
        value.backward()
        assert value > 0
        reached = one.output.features.grad if features == "fused" else one.output.encoder[1].grad
        assert reached is not None and torch.isfinite(reached).all() and reached.any()
        assert one.output.logits.grad is None
    if features == "projection":
        assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


@taps
@kinds
def test_where_nothing_applies_the_term_is_exactly_zero_and_connected(statistics: str, features: str) -> None:
    objective, seen = build(statistics=statistics, features=features, uniformity_weight=1.0), see()
    update(objective, see())
    for part in ("label", "weight"):
        seen = see()
        seen.view.label.fill_(3 if part == "label" else 0)  # a class never met
        seen.view.weight.fill_(1.0 if part == "label" else 0.0)
        value = objective(seen)
        assert value == 0
        value.backward()
        leaf = seen.output.features if features == "fused" else seen.output.encoder[0]
        assert leaf.grad is not None and not leaf.grad.any()


@kinds
def test_ignored_and_weightless_pixels_do_not_matter(statistics: str) -> None:
    objective = build(statistics=statistics, uniformity_weight=0.5)
    update(objective, see())
    seen, changed = see("mixed", 1), see("mixed", 1)
    for one in (seen, changed):
        one.view.weight[:, -STRIDE:] = 0
    expected = objective(seen)
    with torch.no_grad():
        changed.output.features[:, :, [0, 1, -1]] += 7
        changed.view.label[:, -STRIDE:] = 0
        assert objective(changed) == expected
        changed.output.features[:, :3, 3] += 7
    assert objective(changed) != expected


@kinds
def test_images_side_by_side_are_a_batch(statistics: str) -> None:
    """Rows of features and labels belong together whatever the shape of the batch."""
    objective = build(statistics=statistics)
    update(objective, see())
    (output, view), objective_value = see("mixed", 1), objective(see("mixed", 1))
    joined = [torch.cat([one[:1], one[1:]], dim=-1) for one in (output.logits, output.features, view.image)]
    label, weight, certain = (
        torch.cat([one[:1], one[1:]], dim=-1) for one in (view.label, view.weight, view.probability)
    )
    wide = Seen(Output(joined[0], joined[1], (), joined[2]), View("mixed", joined[2], label, weight, certain))
    torch.testing.assert_close(objective(wide), objective_value)
    turned = Seen(
        Output(output.logits.flip(0), output.features.flip(0), (), view.image),
        View("mixed", view.image, view.label.flip(0), view.weight, view.probability),
    )
    torch.testing.assert_close(objective(turned), objective_value)


@kinds
def test_halves_are_computed_in_float32_under_autocast(statistics: str) -> None:
    objective, seen = build(statistics=statistics, features="projection"), see()
    update(objective, seen)
    expected = objective(seen)
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(seen)
        update(objective, seen)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert all(buffer.dtype != torch.bfloat16 for buffer in objective.buffers())


@kinds
def test_state_survives_a_round_trip(statistics: str) -> None:
    one, other = (build(statistics=statistics, features="projection", bank_length=2) for _ in range(2))
    for seed in range(3):
        update(one, see(seed=seed), step=seed)
    other.load_state_dict(one.state_dict())
    for objective in (one, other):
        update(objective, see(seed=3), step=3)
    assert torch.equal(one(see("mixed", 4)), other(see("mixed", 4)))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_the_regulariser_punishes_predictions_that_are_not_uniform_and_minus_one_rewards_them() -> None:
    """It is added to the mean loss of the pixels, with the mean feature of the same pixels."""
    seen, values = see("mixed", 1), {}
    for weight in (0.0, 1.0, -1.0):
        objective = build(uniformity_weight=weight)
        update(objective, see())
        values[weight] = objective(seen).item()
    assert values[1.0] - values[0.0] > 1  # the smallest value is 1, at the uniform prediction
    assert values[0.0] - values[-1.0] == pytest.approx(values[1.0] - values[0.0], abs=1e-5)


def test_statistics_are_those_of_source_pixels_with_ground_truth() -> None:
    objective, seen = build(), see()
    update(objective, seen, see("mixed", 1))
    features, label = rows(seen)
    expected = batch_statistics(features.detach(), label, CLASSES)
    assert torch.equal(objective.known.count, expected.count)
    torch.testing.assert_close(objective.known.mean, expected.mean)
    torch.testing.assert_close(objective.known.variance, expected.variance)


def test_statistics_of_the_student_come_from_all_micro_batches() -> None:
    whole, parts = build(statistics_from="student"), build(statistics_from="student")
    seen = see()
    update(whole, seen, see("mixed", 1))
    halves = []
    for i in (slice(0, 1), slice(1, 2)):
        output = Output(seen.output.logits[i], seen.output.features[i], (), seen.view.image[i])
        halves.append(Seen(output, seen.view.part(i)))
    with torch.no_grad():
        parts.update(SimpleNamespace(source=scene(seen).source), halves)
    torch.testing.assert_close(parts.known.mean, whole.known.mean)
    assert torch.equal(parts.known.count, whole.known.count)
    assert parts.average is None


def test_only_correct_source_pixels_count_and_are_collected() -> None:
    """The logits are right in the left half of the cells alone."""
    seen = see()
    label = seen.view.label[:, ::STRIDE, ::STRIDE]
    with torch.no_grad():
        seen.output.logits.copy_(10 * F.one_hot(label.where(label != 255, 0), CLASSES).movedim(-1, 1))
        seen.output.logits[:, :, :, CELLS // 2 :] = torch.tensor([0.0, 0, 0, 1])[:, None, None]
    right = leave_out_wrong(label, seen.output.logits)
    assert torch.equal(right[..., : CELLS // 2], label[..., : CELLS // 2]) and (right[..., CELLS // 2 :] == 255).all()
    strict, lax = build(only_correct_source=True), build()
    for objective in (strict, lax):
        update(objective, seen)
    assert strict.known.count.tolist() == [6 * 3, 6 * (1 + 2), 6 * 2, 0]
    assert lax.known.count.tolist() == [6 * (3 + 3), 6 * (3 + 3), 6 * (2 + 2), 0]
    lax.load_state_dict(strict.state_dict())
    left = see("mixed")
    left.view.label[:, :, CELLS * STRIDE // 2 :] = 255
    assert strict(seen) == lax(left)  # wrong source pixels are as good as ignored
    mixed = Seen(seen.output, see("mixed").view)
    assert strict(mixed) == lax(mixed)  # of target pixels nobody knows


def test_the_head_of_the_teacher_is_a_moving_average() -> None:
    objective = build(features="projection")
    assert objective.head is not None and objective.average is not None
    before = [parameter.detach().clone() for parameter in objective.head.parameters()]
    with torch.no_grad():
        for parameter in objective.head.parameters():
            parameter += 1
    update(objective, see(), step=2)
    decay = min(1 - 1 / 4, 0.9)
    for own, old in zip(objective.average.buffers(), before, strict=True):
        torch.testing.assert_close(own, old + (1 - decay))


def test_the_head_of_the_student_is_copied_for_its_statistics() -> None:
    objective, seen = build(features="projection", statistics_from="student"), see()
    with torch.no_grad():
        for parameter in objective.head.parameters():
            parameter += 0.1
    update(objective, seen)
    label = seen.view.label[:, ::STRIDE, ::STRIDE].flatten()
    features = objective.head(seen.output.encoder).detach().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(objective.known.mean, batch_statistics(features, label, CLASSES).mean)


def test_settings_say_what_is_kept_and_read() -> None:
    assert build().reads == (("source",), ("mixed",))
    assert build(target_view="strong target").reads == (("source",), ("strong target",))
    names = {
        "mean": {"known.count", "known.mean", "known.variance"},
        "bank": {"known.count", "known.means"},
    }
    assert all(set(build(statistics=kind).state_dict()) == kept for kind, kept in names.items())
    assert build(running="average", momentum=0.1).known.momentum == 0.1
    assert build(momentum=0.1).known.momentum is None
    assert build(statistics="bank", bank_length=7).known.means.shape == (CLASSES, 7, FUSED)
