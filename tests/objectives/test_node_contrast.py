"""Two masked views of the same pixels: what is compared, and what is left out."""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.node_contrast import NodeContrast, node_costs

CHANNELS = 6
PRECISIONS = [(torch.float64, "float64_max_abs"), (torch.float32, "float32_max_abs")]


@pytest.mark.reference
@pytest.mark.parametrize(("dtype", "bits"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["n01_node_contrast", "n02_identical", "n03_orthonormal"])
def test_the_contrast_of_the_reference(name: str, dtype: torch.dtype, bits: str, golden: Any) -> None:
    """Without labels all other nodes are negatives."""
    tensors, description = golden(f"29_gca/{name}")
    bounds = description["tolerance_demanded"]["bounds"]
    head: nn.Module = nn.Identity()
    views = [tensors[f"in.view{i}"].to(dtype).requires_grad_() for i in (1, 2)]
    if "param.fc1.weight" in tensors:
        head = NodeContrast(settings.NodeContrast(projection_channels=16), 16).to(dtype).head
        head[0], head[2] = nn.Linear(16, 12, dtype=dtype), nn.Linear(12, 16, dtype=dtype)
        for layer, key in ((head[0], "fc1"), (head[2], "fc2")):
            layer.load_state_dict({part: tensors[f"param.{key}.{part}"].to(dtype) for part in ("weight", "bias")})
    units = [F.normalize(head(view), dim=1) for view in views]
    costs = node_costs(*units, torch.arange(len(views[0])), description["settings"]["tau"])
    costs.mean().backward()
    found = {"loss": costs.mean(), "per_node": costs, "grad_view1": views[0].grad, "grad_view2": views[1].grad}
    for i, layer in enumerate(layer for layer in head.modules() if isinstance(layer, nn.Linear)):
        found[f"grad_param.fc{i + 1}.weight"] = layer.weight.grad
    assert found.keys() >= bounds.keys()
    for key, bound in bounds.items():
        expected = tensors[f"out64.{key}"]
        assert (found[key].detach().reshape(expected.shape) - expected).abs().max() <= bound[bits], key


def test_known_values() -> None:
    same, distinct = F.normalize(torch.ones(8, 8), dim=1), torch.arange(8)
    assert node_costs(same, same, distinct, 0.4).tolist() == [pytest.approx([math.log(15)] * 8)] * 2
    orthonormal = torch.eye(8)
    expected = math.log(1 + 14 * math.exp(-2.5))
    assert node_costs(orthonormal, orthonormal, distinct, 0.4).tolist() == [pytest.approx([expected] * 8)] * 2


def test_nodes_of_the_same_label_are_no_negatives() -> None:
    """Nor are those without a label; a node without a negative costs nothing."""
    generator = torch.Generator().manual_seed(0)
    one, other = (F.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    label = torch.tensor([0, 1, 0, 255, 2, 1])
    costs = node_costs(one, other, label, 0.4)
    for i in (0, 1, 2, 4, 5):
        rivals = [j for j in range(6) if label[j] not in (255, label[i])]
        for own, across, cost in ((one, other, costs[0, i]), (other, one, costs[1, i])):
            weight = [math.exp(float(own[i] @ across[j]) / 0.4) for j in [i, *rivals]]
            weight += [math.exp(float(own[i] @ own[j]) / 0.4) for j in rivals]
            assert cost.item() == pytest.approx(-math.log(weight[0] / sum(weight)), rel=1e-5)
    alone = one.requires_grad_()
    costs = node_costs(alone, other, torch.zeros(6, dtype=torch.long), 0.4)
    assert torch.equal(costs, torch.zeros(2, 6))
    (gradient,) = torch.autograd.grad(costs.sum(), alone)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def see(name: str, seed: int, cells: int = 8, images: int = 2) -> Seen:
    """Noise with labels 0, 1 and 2 in columns; the first row is ignored, the last has no weight."""
    generator = torch.Generator().manual_seed(seed)
    label = (torch.arange(2 * cells) * 3 // (2 * cells)).expand(images, 2 * cells, 2 * cells).clone()
    label[:, :2] = 255
    weight, probability = torch.ones(2, images, 2 * cells, 2 * cells)
    weight[:, -2:] = 0
    features = torch.randn(images, CHANNELS, cells, cells, generator=generator).requires_grad_()
    view = View(
        name, torch.zeros(images, 3, 2 * cells, 2 * cells), label, weight, probability, seed=torch.arange(images)
    )
    return Seen(Output(torch.zeros(images, 3, cells, cells), features, (), view.image), view)


def build(**section: Any) -> NodeContrast:
    torch.manual_seed(0)
    return NodeContrast(settings.NodeContrast(**{"projection_channels": 5, "nodes": 20} | section), CHANNELS)


def see_both() -> list[Seen]:
    return [see(name, seed) for seed, name in enumerate(NodeContrast.reads[0])]


def test_it_is_the_mean_over_labelled_cells_of_both_views() -> None:
    objective, seen = build(nodes=1000), see_both()
    units = [
        F.normalize(objective.head(one.output.features.movedim(1, -1)[:, 1:-1].flatten(0, 2)), dim=1) for one in seen
    ]
    label = seen[0].view.label[:, 2:-2:2, ::2].flatten()
    torch.testing.assert_close(objective(*seen), node_costs(*units, label, 0.4).mean())


def test_gradients_reach_the_same_cells_of_both_views_and_the_head() -> None:
    objective, seen = build(), see_both()
    objective(*seen).backward()
    touched = [one.output.features.grad.abs().sum(dim=1) > 0 for one in seen]
    assert torch.equal(*touched) and touched[0].sum() == 20
    assert not touched[0][:, 0].any() and not touched[0][:, -1].any()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


def test_two_ranks_contrast_the_nodes_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap binds. Each rank has one image; what the other one gathers is recorded first."""
    objective, seen = build(), see_both()
    expected = objective(*seen)
    (wanted,) = torch.autograd.grad(expected, seen[1].output.features, retain_graph=True)
    ranks = [[see_part(one, i) for one in seen] for i in range(2)]
    sent: list[list[Tensor]] = [[], []]
    for rank, rows in zip(ranks, sent, strict=True):
        monkeypatch.setattr(collectives, "all_gather_rows", lambda one, rows=rows: rows.append(one) or one)
        objective(*rank)
    joint = iter([torch.cat(pair) for pair in zip(*sent, strict=True)])
    monkeypatch.setattr(collectives, "all_gather_rows", lambda _: next(joint))
    value = objective(*ranks[0])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, seen[1].output.features)[0], wanted)


def see_part(seen: Seen, image: int) -> Seen:
    part = slice(image, image + 1)
    output = Output(seen.output.logits[part], seen.output.features[part], (), seen.output.image[part])
    return Seen(output, seen.view.part(part))


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on this device have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    with torch.device("meta"):
        seen, objective = see_both(), build()
    seen = [Seen(output, replace(view, seed=torch.tensor([1, 2]))) for output, view in seen]
    value = objective(*seen)
    assert value.device.type == "meta"
    value.backward()
    assert seen[0].output.features.grad is not None
