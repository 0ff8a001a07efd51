"""Regions of the target, pairs of them, and what the classifier and the features each learn of it."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.distributed import collectives
from cluda_cli.models.decoders import DeepLabV2Decoder
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.clustering import (
    Clustering,
    consistency_costs,
    label_costs,
    pair_costs,
    pool_regions,
    ramp_up,
    share_channels,
)

CHANNELS, CLASSES = 6, 4
PRECISIONS = [(torch.float64, "float64_max_abs"), (torch.float32, "float32_max_abs")]


class Student(nn.Module):
    """As much of a network as the objective asks for."""

    def __init__(self, channels: int = CHANNELS, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, num_classes, 1)

    @property
    def decoder(self) -> "Student":
        return self

    def classifiers(self) -> list[nn.Conv2d]:
        return [self.layer]


def build(student: Any = None, **section: Any) -> Clustering:
    torch.manual_seed(0)
    return Clustering(settings.Clustering(**{"top": 2} | section), student or Student(), CLASSES)


def assert_within(found: Tensor | None, expected: Tensor, bound: float, name: str) -> None:
    assert found is not None
    assert (found.detach().reshape(expected.shape) - expected).abs().max() <= bound, name


@pytest.mark.reference
@pytest.mark.parametrize(("dtype", "bits"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["d01_clusters", "d02_no_pairs", "d03_all_pairs"])
def test_losses_and_gradients_of_the_reference(name: str, dtype: torch.dtype, bits: str, golden: Any) -> None:
    """The released number is minus our value; the gradients are the same."""
    tensors, description = golden(f"25_cdac/{name}")
    s, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    views = [tensors[f"in.{view}"].to(dtype).requires_grad_() for view in ("weak", "strong1", "strong2")]
    student = Student(views[0].shape[1], s["classes"]).to(dtype)
    with torch.no_grad():
        student.layer.weight.copy_(tensors["param.classifier_weight"][:, :, None, None])
    objective = Clustering(settings.Clustering(cosine_classifier=True), student, s["classes"])  # type: ignore[arg-type]
    weight = student.layer.weight
    alike = share_channels(views[0].detach(), s["topk"], 1.0)
    assert torch.equal(alike, tensors["out.similarity"].bool())
    p, q = (objective._classify(view).softmax(dim=1) for view in views[:2])
    logits = [F.normalize(view, dim=1) @ weight[:, :, 0, 0].T / s["temperature"] for view in views]
    ramp = s["ramp_coefficient"] * ramp_up(torch.tensor(s["step"], dtype=dtype), s["ramp_length"])
    assert_within(ramp, tensors["out64.ramp_weight"], bounds["ramp_weight"][bits], "ramp")
    losses = {
        "aac": pair_costs(p, q, alike).mean(),
        "pl": label_costs(logits[0], logits[2], s["threshold"]).mean(),
        "con": ramp * consistency_costs(logits[1], logits[2]).mean(),
    }
    for key, loss in losses.items():
        sign = -1 if key == "aac" else 1
        assert_within(sign * loss, tensors[f"out64.{key}.loss"], bounds[f"{key}.loss"][bits], key)
        parts = dict(zip(("weight", "weak", "strong1", "strong2"), (weight, *views), strict=True))
        found = torch.autograd.grad(loss, list(parts.values()), retain_graph=True, allow_unused=True)
        for part, gradient in zip(parts, found, strict=True):
            expected = tensors[f"out64.{key}.grad_{part}"]
            found_one = torch.zeros_like(expected) if gradient is None else gradient
            assert_within(found_one, expected, bounds[f"{key}.grad_{part}"][bits], f"{key} {part}")


@pytest.mark.reference
def test_ramp_of_the_reference(golden: Any) -> None:
    tensors, description = golden("25_cdac/d04_ramp_and_lr")
    s, bound = description["settings"], description["tolerance_demanded"]["bounds"]["ramp"]
    for dtype, bits in PRECISIONS:
        ramp = s["coefficient"] * ramp_up(tensors["in.step"].to(dtype), s["ramp_length"])
        assert (ramp - tensors["out64.ramp"]).abs().max() <= bound[bits]


def test_ramp_in_numbers() -> None:
    steps = torch.tensor([0, 10_000, 20_000, 30_000])
    assert (30 * ramp_up(steps, 20_000)).tolist() == pytest.approx([0.2021, 8.595, 30, 30], abs=1e-3)
    assert ramp_up(steps, 0).tolist() == [1, 1, 1, 1]


def test_pairs_of_uniform_probabilities() -> None:
    uniform = torch.full((2, 19), 1 / 19)
    costs = pair_costs(uniform, uniform, torch.eye(2, dtype=torch.bool))
    assert costs.diagonal().tolist() == pytest.approx([2.9444] * 2, abs=1e-4)
    assert costs[0, 1].item() == pytest.approx(0.05407, abs=1e-5)


def test_certain_pairs_are_finite_with_their_gradients() -> None:
    logits = torch.tensor([[200.0, 0, 0], [0, 200, 0], [200, 0, 0.0]], requires_grad=True)
    p = logits.softmax(dim=1)
    for alike in (torch.ones(3, 3), torch.zeros(3, 3)):
        costs = pair_costs(p, p, alike.bool())
        (gradient,) = torch.autograd.grad(costs.sum(), logits, retain_graph=True)
        assert torch.isfinite(costs).all() and torch.isfinite(gradient).all()


def test_alike_is_symmetric_and_knows_no_order_of_channels() -> None:
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    for overlap in (1.0, 0.6, 0.4):
        alike = share_channels(features, 5, overlap)
        assert torch.equal(alike, alike.T) and alike.diagonal().all()
        assert torch.equal(alike, share_channels(features[:, torch.randperm(12)], 5, overlap))


def test_overlap_says_how_many_channels_must_agree() -> None:
    """Sets 0-4, 1-5 and 2-6: four in common are 4/6 of the union, three are 3/7."""
    features = torch.zeros(3, 8)
    for i in range(3):
        features[i, i : i + 5] = 1
    found = {overlap: share_channels(features, 5, overlap)[0].tolist() for overlap in (1.0, 2 / 3, 0.6, 3 / 7)}
    assert found == {
        1.0: [True, False, False],
        2 / 3: [True, True, False],
        0.6: [True, True, False],
        3 / 7: [True, True, True],
    }
    assert share_channels(features[:, :3], 5, 1.0).all()  # fewer channels than are asked for


def test_labels_count_from_the_threshold_on_and_have_no_gradient() -> None:
    weak = torch.tensor([[2.0, 0], [0, 1]], requires_grad=True)
    strong = torch.zeros(2, 2, requires_grad=True)
    bar = float(weak.detach().softmax(dim=1)[0, 0])
    costs = label_costs(weak, strong, bar)
    assert costs.tolist() == pytest.approx([math.log(2), 0])
    assert torch.autograd.grad(costs.sum(), weak, allow_unused=True) == (None,)


def test_regions_are_means_over_a_class_in_an_image() -> None:
    features = torch.arange(16.0).view(2, 2, 2, 2)
    label = torch.tensor([[[1, 1], [255, 3]], [[0, 255], [255, 0]]])
    rows, present = pool_regions(features, label, CLASSES)
    assert present.nonzero().flatten().tolist() == [1, 3, 4]
    assert rows[present].tolist() == [[0.5, 4.5], [3, 7], [9.5, 13.5]]
    assert not rows[~present].any()


def see(name: str, seed: int, cells: int = 6, images: int = 2) -> Seen:
    """Noise, with a class for each quarter of the columns or so; the first row is ignored, the last has no weight."""
    generator = torch.Generator().manual_seed(seed)
    label = (torch.arange(2 * cells) * CLASSES // (2 * cells)).expand(images, 2 * cells, 2 * cells).clone()
    label[:, :2] = 255
    features, logits = (torch.randn(images, c, cells, cells, generator=generator) for c in (CHANNELS, CLASSES))
    weight, probability = torch.ones(2, images, 2 * cells, 2 * cells)
    weight[:, -2:] = 0
    view = View(name, torch.zeros(images, 3, 2 * cells, 2 * cells), label, weight, probability)
    return Seen(Output(3 * logits.requires_grad_(), features.requires_grad_(), (), view.image), view)


def see_all(images: int = 2) -> list[Seen]:
    return [see(name, seed, images=images) for seed, name in enumerate(Clustering.reads[0])]


@torch.no_grad()
def test_the_value_is_that_of_plain_loops() -> None:
    objective, seen = build(threshold=0.5, ramp_steps=0, overlap=1), see_all()
    label = seen[0].view.label[:, ::2, ::2].clone()
    label[:, -1] = 255
    regions = [(b, k) for b in range(2) for k in range(CLASSES)]
    means = [[one.output.features[b][:, label[b] == k].mean(dim=1) for b, k in regions] for one in seen[:2]]
    p, q = ([objective.student.layer(row[:, None, None])[:, 0, 0].softmax(0) for row in rows] for rows in means)
    tops = [set(row.topk(2).indices.tolist()) for row in means[0]]
    costs = [
        -math.log(p[i] @ q[j] + 1e-7) if tops[i] == tops[j] else -math.log(1 - p[i] @ q[j] + 1e-7)
        for i in range(8)
        for j in range(8)
    ]
    cells = []
    for b, row, column in (label != 255).nonzero().tolist():
        weak, strong, second = (one.output.logits[b, :, row, column] for one in seen)
        best = float(weak.softmax(0).max())
        cost = -float(second.log_softmax(0)[weak.argmax()]) if best >= 0.5 else 0
        cells.append(cost + 3 * float((strong.softmax(0) - second.softmax(0)).square().mean()))
    expected = sum(costs) / len(costs) + sum(cells) / len(cells)
    assert objective(*seen).item() == pytest.approx(expected, rel=1e-5)


def test_features_learn_to_cluster_and_the_classifier_the_opposite() -> None:
    seen, objective = see_all(), build(consistency=0, threshold=1)
    value = objective(*seen)
    parts = [seen[0].output.features, seen[1].output.features, *objective.student.layer.parameters()]
    found = torch.autograd.grad(value, parts)
    for sign, part, gradient in zip((-1, -1, 1, 1), parts, found, strict=True):
        with torch.no_grad():
            part += sign * 1e-3 * gradient / gradient.norm()
            assert objective(*seen) < value
            part -= sign * 1e-3 * gradient / gradient.norm()


def test_a_classifier_of_several_pixels_sees_a_region_everywhere() -> None:
    decoder = DeepLabV2Decoder(settings.DeepLabV2(dilations=(1, 2)), [CHANNELS], CLASSES)
    row = torch.randn(1, CHANNELS)
    logits = build(SimpleNamespace(decoder=decoder))._classify(row)
    torch.testing.assert_close(logits[0], decoder.classify(row[..., None, None].expand(1, -1, 9, 9))[0, :, 4, 4])


def test_a_step_counts_and_notes_the_share_of_pairs_that_are_alike() -> None:
    objective, scene = build(overlap=1e-9), SimpleNamespace(notes={})
    objective.update(scene, see_all())  # type: ignore[arg-type]
    assert objective.steps == 1 and objective.state_dict()["steps"] == 1
    rows, _ = objective._pool(see_all()[0], see_all()[0])
    assert scene.notes["clustering/pairs alike"] == 1
    strict = build(overlap=1, top=1)
    strict.update(scene, see_all())  # type: ignore[arg-type]
    best = rows.argmax(dim=1)
    same = (best[:, None] == best).sum() - len(best)
    torch.testing.assert_close(scene.notes["clustering/pairs alike"], same / (len(best) * (len(best) - 1)))


def test_the_consistency_grows_with_the_steps() -> None:
    objective, seen = build(threshold=1), see_all()
    early = objective(*seen)
    objective.steps.fill_(20_000)
    late = objective(*seen)
    objective.steps.fill_(10**6)
    assert early < late == objective(*seen)


def test_two_ranks_cluster_the_regions_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has one image; what the other one gathers and sums is recorded first. Values and gradients agree."""
    objective, seen = build(threshold=0.5), see_all()
    expected = objective(*seen)
    weight = objective.student.layer.weight
    wanted = torch.autograd.grad(expected, [weight, seen[1].output.features], retain_graph=True)
    ranks = [[see_part(one, i) for one in seen] for i in range(2)]
    sent: list[list[Tensor]] = [[], []]
    sums: list[list[Tensor]] = [[], []]
    for rank, rows, counts in zip(ranks, sent, sums, strict=True):
        monkeypatch.setattr(collectives, "all_gather_rows", lambda one, rows=rows: rows.append(one) or one)
        monkeypatch.setattr(collectives, "all_reduce_sum", lambda one, counts=counts: counts.append(one) or one)
        objective(*rank)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    values = []
    for rank in ranks:
        joint = iter([torch.cat(pair) for pair in zip(*sent, strict=True)])
        total = iter([sum(pair) for pair in zip(*sums, strict=True)])
        monkeypatch.setattr(collectives, "all_gather_rows", lambda _, joint=joint: next(joint))
        monkeypatch.setattr(collectives, "all_reduce_sum", lambda _, total=total: next(total))
        values.append(objective(*rank))
    torch.testing.assert_close(sum(values) / 2, expected)
    found = torch.autograd.grad(sum(values) / 2, [weight, seen[1].output.features])
    torch.testing.assert_close(found, wanted)


def see_part(seen: Seen, image: int) -> Seen:
    part = slice(image, image + 1)
    output = Output(seen.output.logits[part], seen.output.features[part], (), seen.output.image[part])
    return Seen(output, seen.view.part(part))


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on this device have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    with torch.device("meta"):
        seen, objective = see_all(), build()
    objective.update(SimpleNamespace(notes={}), seen)  # type: ignore[arg-type]
    value = objective(*seen)
    assert value.device.type == "meta"
    value.backward()
    assert seen[0].output.features.grad is not None
