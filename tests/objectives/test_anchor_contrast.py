"""Which pixels are anchors, and what is measured on them."""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives import anchor_contrast
from cluda_cli.objectives.anchor_contrast import LAST, AnchorContrast, anchor_places, mean_contrast

CHANNELS = 6


def by_hand(projected: Tensor, label: Tensor, temperature: float) -> float:
    """The loss written as loops, in float64."""
    unit = [row / row.norm() for row in projected.double()]
    costs = []
    for i in range(len(label)):
        if label[i] == 255:
            continue
        similar = [math.exp(float(unit[i] @ unit[j]) / temperature) for j in range(len(label))]
        positives = [j for j in range(len(label)) if j != i and label[j] == label[i]]
        negative = sum(similar[k] for k in range(len(label)) if label[k] not in (255, label[i]))
        if positives:
            costs.append(sum(-math.log(similar[j] / (similar[j] + negative)) for j in positives) / len(positives))
    return sum(costs) / len(costs)


def see(name: str = "source", seed: int = 0, cells: int = 12, stride: int = 2, images: int = 2) -> Seen:
    """Noise with labels 0, 1 and 2 in columns, the last one cell wide, and 255 in the first rows."""
    generator = torch.Generator().manual_seed(seed)
    side = cells * stride
    label = torch.tensor([0] * (side // 2) + [1] * (side - side // 2 - stride) + [2] * stride)
    label = label.expand(images, side, side).clone()
    label[:, :stride] = 255
    features, logits = (torch.randn(images, c, cells, cells, generator=generator) for c in (CHANNELS, 3))
    image, certain = torch.zeros(images, 3, side, side), torch.ones(2, images, side, side)
    view = View(name, image, label, *certain, seed=torch.arange(images) + 10 * seed)
    return Seen(Output(logits, features.requires_grad_(), (), view.image), view)


def build(*views: str, **section: Any) -> AnchorContrast:
    torch.manual_seed(0)
    return AnchorContrast(settings.AnchorContrast(projection_dim=5, **section), views or ("source",), CHANNELS)


@pytest.fixture
def contrasted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What the objective contrasts: projected anchors and their labels, 255 left out."""
    found = []

    def spy(projected: Tensor, label: Tensor, temperature: float) -> Tensor:
        found.append((projected[label != 255].detach(), label[label != 255]))
        return mean_contrast(projected, label, temperature)

    monkeypatch.setattr(anchor_contrast, "mean_contrast", spy)
    return found


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_value_is_that_of_plain_loops(temperature: float) -> None:
    """One anchor has no positive, it is a negative all the same; two are none."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    label = torch.tensor([0, 1, 255, 0, 2, 1, 1, 255, 0])
    value = mean_contrast(projected, label, temperature)
    assert value.item() == pytest.approx(by_hand(projected, label, temperature), rel=1e-12)
    without = mean_contrast(projected[label != 2], label[label != 2], temperature)
    assert without != value


def test_the_value_in_closed_form() -> None:
    """Two classes of two anchors, alike within a class, at right angles across."""
    projected = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 0.5]])
    expected = math.log(1 + 2 * math.exp(-1 / 0.1))
    assert mean_contrast(projected, torch.tensor([4, 4, 7, 7]), 0.1).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", [[0, 1, 2, 3], [0, 255, 255, 1], [255, 255, 255, 255], [2, 2, 2, 2]])
def test_without_a_positive_or_a_negative_it_is_exactly_zero_and_connected(label: list[int]) -> None:
    projected = torch.randn(4, 3, requires_grad=True)
    value = mean_contrast(projected, torch.tensor(label), 0.1)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, projected)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def chosen(label: Tensor, right: Tensor, count: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(2**31, label.shape, generator=torch.Generator().manual_seed(seed))
    return anchor_places(label, right, drawn, count)


@pytest.mark.parametrize(
    ("misclassified", "others", "count", "expected"),
    [
        (40, 60, 20, 10),
        (40, 60, 21, 11),
        (4, 60, 20, 4),
        (60, 4, 20, 16),
        (0, 60, 20, 0),
        (60, 0, 20, 20),
        (3, 5, 20, 3),
    ],
)
def test_half_of_the_anchors_are_misclassified_where_both_kinds_suffice(
    misclassified: int, others: int, count: int, expected: int
) -> None:
    right = torch.tensor([False] * misclassified + [True] * others)[None]
    places = chosen(torch.full_like(right, 5, dtype=torch.long), right, count)
    anchors = places < LAST
    assert anchors.sum() == min(count, misclassified + others)
    assert (anchors & ~right).sum() == expected


def test_anchors_are_bounded_in_every_class_of_every_image() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 0, 0, 0, 3, 3, 18, 255])[torch.randint(8, (3, 500), generator=generator)]
    label[2, label[2] == 18] = 255
    label[2, :2] = 18
    places = chosen(label, torch.rand(3, 500, generator=generator) < 0.7, 7)
    found = Counter((image, int(label[image, i])) for image, i in (places < LAST).nonzero().tolist())
    assert found == {(i, k): 7 for i in range(3) for k in (0, 3, 18)} | {(2, 18): 2}


def test_the_first_places_are_shared_equally_by_all_classes() -> None:
    """By number of the anchor in its class: a cap takes as many of every class, the frequent one included."""
    label = torch.tensor([[0] * 90 + [1] * 10, [0] * 50 + [2] * 50])
    places = chosen(label, torch.ones_like(label, dtype=torch.bool), 10)
    for cap, each in ((4, 1), (8, 2), (40, 10)):
        first = places.flatten().argsort()[:cap]
        assert Counter((int(i) // 100, int(label.flatten()[i])) for i in first) == dict.fromkeys(
            [(0, 0), (0, 1), (1, 0), (1, 2)], each
        )


def test_other_draws_choose_other_anchors_and_all_pixels_are_chosen_in_time() -> None:
    label, right = torch.zeros(1, 30, dtype=torch.long), torch.arange(30)[None] % 3 > 0
    sets = [(chosen(label, right, 6, seed) < LAST)[0] for seed in range(200)]
    assert len({tuple(one.tolist()) for one in sets}) > 100
    share = torch.stack(sets).double().mean(dim=0)
    assert torch.all((share[::3] > 0.15) & (share[::3] < 0.45))  # 3 of 10
    assert torch.all((share[1::3] > 0.05) & (share[1::3] < 0.3))  # 3 of 20


def test_the_objective_is_the_contrast_of_the_cells_it_chose(contrasted: list[tuple[Tensor, Tensor]]) -> None:
    """All cells of both views here; a cell has the label of its upper left pixel."""
    seen = [see("source", 1, cells=4, stride=4), see("mixed", 2, cells=4, stride=4)]
    objective = build("source", "mixed")
    value = objective(*seen)
    rows = torch.cat([output.features.detach().permute(0, 2, 3, 1).flatten(0, 2) for output, _ in seen])
    label = torch.cat([view.label[:, ::4, ::4].flatten() for _, view in seen])
    assert value.item() == pytest.approx(by_hand(objective.head(rows).detach(), label, 0.1), rel=1e-5)
    ((_, anchors),) = contrasted
    assert sorted(anchors.tolist()) == sorted(label[label != 255].tolist())


def test_gradients_reach_the_features_of_both_views_and_the_head() -> None:
    seen = [see("source", 1), see("mixed", 2)]
    objective = build("source", "mixed", anchors=4)
    objective(*seen).backward()
    for output, _ in seen:
        assert output.features.grad is not None
        touched = output.features.grad.abs().sum(dim=1) > 0  # B h w
        assert 0 < touched.sum() <= 2 * 3 * 4
        assert not touched[:, 0].any()  # ignored
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


def test_without_anchors_the_term_is_exactly_zero_and_connected() -> None:
    seen = see()
    seen.view.weight.zero_()
    objective = build()
    value = objective(seen)
    assert value == 0
    value.backward()
    assert seen.output.features.grad is not None and not seen.output.features.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_uncertain_and_weightless_pixels_are_no_anchors(contrasted: list[tuple[Tensor, Tensor]]) -> None:
    """The columns of class 1 are uncertain in one image, those of class 2 have no weight in the other."""
    seen = see("mixed")
    seen.view.probability[0, seen.view.label[0] == 1] = 0.9
    seen.view.weight[1, seen.view.label[1] == 2] = 0
    build("mixed", anchors=3)(seen)
    build("mixed", anchors=3, min_probability=0.9)(seen)
    (_, strict), (_, lax) = contrasted
    assert Counter(strict.tolist()) == {0: 6, 1: 3, 2: 3}
    assert Counter(lax.tolist()) == {0: 6, 1: 6, 2: 3}


def test_misclassified_is_what_the_student_predicts_otherwise(contrasted: list[tuple[Tensor, Tensor]]) -> None:
    """All cells of class 0 but one row are right, so half of their anchors are of this row, marked by its features."""
    seen = see(cells=12, images=1)
    label = seen.view.label[:, ::2, ::2]
    with torch.no_grad():
        seen.output.logits.copy_(torch.nn.functional.one_hot(label.where(label != 255, 0), 3).permute(0, 3, 1, 2))
        seen.output.logits[0, 1, 5] += 2
        seen.output.features.zero_()
        seen.output.features[:, 0] = 1
        seen.output.features[:, :, 5] = torch.arange(CHANNELS)[:, None].float()
    objective = build(anchors=4)
    objective(seen)
    ((projected, anchors),) = contrasted
    marked = torch.isclose(projected, objective.head(torch.arange(CHANNELS).float()), atol=1e-6).all(dim=1)
    assert Counter(anchors.tolist()) == {0: 4, 1: 4, 2: 4}
    assert marked[anchors == 0].sum() == 2
    assert marked[anchors == 2].sum() == 1  # it has no more of them


def test_the_number_of_pairs_does_not_depend_on_pixels_and_is_bounded_in_the_batch(
    contrasted: list[tuple[Tensor, Tensor]],
) -> None:
    """Three classes: 30 anchors in an image and view, until the cap of 100."""
    objective = build("source", "mixed", anchors=10, max_anchors=100)
    for images, cells in ((1, 12), (1, 24), (2, 12), (4, 12), (8, 12)):
        objective(see("source", 1, cells, images=images), see("mixed", 2, cells, images=images))
    assert [len(label) for _, label in contrasted] == [60, 60, 100, 100, 100]
    counts = Counter(contrasted[-1][1].tolist())  # 6 or 7 of each of the 16 x 3 classes and images
    assert max(counts.values()) - min(counts.values()) <= 16


def test_draws_follow_the_seed_of_the_view(contrasted: list[tuple[Tensor, Tensor]]) -> None:
    objective = build(anchors=4)
    for seed in ([1, 2], [1, 2], [1, 3]):
        output, view = see()
        objective(Seen(output, replace(view, seed=torch.tensor(seed))))
    (one, _), (again, _), (other, _) = contrasted
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_two_ranks_choose_and_contrast_the_anchors_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap binds. Each rank has one image of every view; what the other one gathers is recorded first."""
    objective = build("source", "mixed", anchors=10, max_anchors=40)
    seen = [see("source", 1), see("mixed", 2)]
    expected = objective(*seen)
    (wanted,) = torch.autograd.grad(expected, seen[1].output.features, retain_graph=True)
    ranks = [
        [Seen(replace(o, logits=o.logits[i], features=o.features[i]), v.part(i)) for o, v in seen]
        for i in (slice(0, 1), slice(1, 2))
    ]
    sent: list[list[Tensor]] = [[], []]
    for rank, rows in zip(ranks, sent, strict=True):
        monkeypatch.setattr(collectives, "all_gather_rows", lambda one, rows=rows: rows.append(one) or one)
        objective(*rank)
    joint = iter([torch.cat(pair) for pair in zip(*sent, strict=True)])
    monkeypatch.setattr(collectives, "all_gather_rows", lambda _: next(joint))
    value = objective(*ranks[0])
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, seen[1].output.features)
    torch.testing.assert_close(gradient, wanted)


def test_halves_are_computed_in_float32_under_autocast() -> None:
    seen, objective = see(), build(anchors=4)
    expected = objective(seen)
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(seen)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on this device have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    with torch.device("meta"):
        output, view = see()
        objective = build(anchors=4)
    value = objective(Seen(output, replace(view, seed=torch.tensor([1, 2]))))
    assert value.device.type == "meta"
    value.backward()
    assert output.features.grad is not None
