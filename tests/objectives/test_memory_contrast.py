"""What is remembered, what is mixed, and what is measured on both."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives import memory_contrast
from cluda_cli.objectives.memory_contrast import (
    MemoryContrast,
    Mixes,
    contrast_costs,
    find_hardest,
    mix,
    pick,
    push,
)

CHANNELS, CLASSES = 6, 4
PRECISIONS = [(torch.float64, "float64_max_abs"), (torch.float32, "float32_max_abs")]


def assert_within(found: Tensor, tensors: dict[str, Tensor], name: str, bound: float) -> None:
    expected = tensors.get(f"out64.{name}", tensors.get(f"out.{name}"))
    assert expected is not None
    assert (found.detach().reshape(expected.shape) - expected).abs().max() <= bound, name


def similar(query: Tensor, mixed: Tensor) -> Tensor:
    return torch.einsum("ae,ame->am", query, mixed)


def assert_same_rows(hard: Tensor, count: Tensor, expected: Tensor) -> None:
    """In any order; the reference sorts them by their number."""
    for rows, many, wanted in zip(hard.tolist(), count.flatten().tolist(), expected.tolist(), strict=True):
        assert sorted(rows[:many]) == [row for row in wanted if row >= 0]


@pytest.mark.reference
@pytest.mark.parametrize(("dtype", "bits"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["m04_dense_class_memory", "m05_dense_no_mixing"])
def test_the_dense_contrast_of_the_reference(name: str, dtype: torch.dtype, bits: str, golden: Any) -> None:
    tensors, description = golden(f"22_mochi/{name}")
    s, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    raw = tensors["in.query"].to(dtype).requires_grad_()
    query = F.normalize(raw, dim=1)
    memory = F.normalize(tensors["in.bank"].to(dtype), dim=2).flatten(0, 1)
    filled = torch.arange(s["K"]) < tensors["in.bank_length"][:, None]
    known = torch.arange(s["classes"])[:, None].where(filled, 255).flatten()
    label = tensors["in.labels"][:, None]
    positive, negative = known == label, (known != label) & (known != 255)
    similarity = query @ memory.T
    hard, count = find_hardest(similarity, negative, s["N"])
    partners = (tensors[f"in.partner_{n}"].clamp_min(0) for n in "ijq")
    first, second, alone = partners
    mixes = Mixes(first, second, tensors["in.a"].to(dtype), alone, tensors["in.b"].to(dtype))
    mixed = similar(query, mix(query, memory, mixes))
    similarities = (part / s["tau"] for part in (similarity, similarity, mixed))
    costs, used = contrast_costs(*similarities, positive, negative)
    loss = costs.sum() / used.sum()
    loss.backward()
    assert torch.equal(used, tensors["out.anchor_used"].bool())
    assert_same_rows(hard[used], count[used], tensors["out.hard_indices"][used])
    assert_within(loss, tensors, "loss", bounds["loss"][bits])
    assert_within(raw.grad, tensors, "grad_query", bounds["grad_query"][bits])


@pytest.mark.reference
@pytest.mark.parametrize(("dtype", "bits"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["m01_both_types", "m02_warmup_sequence", "m03_masked_duplicates"])
def test_the_contrast_of_images_of_the_reference(name: str, dtype: torch.dtype, bits: str, golden: Any) -> None:
    """One ring for all; the positive is the key of the same image, and the ring's own entries of an image are masked.

    The reference mixes in steps after its start, we from the start on.
    """
    tensors, description = golden(f"22_mochi/{name}")
    s, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    queue = F.normalize(tensors["in.queue0"].to(dtype), dim=1)[None].clone()
    pointer, length = tensors["in.pointer0"].clone(), torch.tensor([queue.shape[1]])
    owner = torch.full((queue.shape[1],), -1)
    for i, step in enumerate(s["steps"]):
        raw = tensors[f"in.step{i}.query"].to(dtype).requires_grad_()
        key, ids = F.normalize(tensors[f"in.step{i}.key"].to(dtype), dim=1), tensors[f"in.step{i}.file_ids"]
        query, memory = F.normalize(raw, dim=1), queue[0].clone()
        negative, positive = owner != ids[:, None], torch.ones(len(key), 1, dtype=torch.bool)
        none = torch.zeros(len(key), 0)
        given = [tensors.get(f"in.step{i}.{n}", none) for n in ("partner_i", "partner_j", "a", "partner_q", "b")]
        first, second, share, alone, own = given
        assert (first.numel() > 0, alone.numel() > 0) == (step >= s["start1_hard"] + 1, step >= s["start2_hard"] + 1)
        mixes = Mixes(first.long(), second.long(), share.to(dtype), alone.long(), own.to(dtype))
        mixed = mix(query, memory, mixes)
        own = (query * key).sum(dim=1, keepdim=True)
        similarities = (part / s["T"] for part in (own, query @ memory.T, similar(query, mixed)))
        costs, used = contrast_costs(*similarities, positive, negative)
        costs.mean().backward()
        assert used.all()
        assert_within(costs.mean(), tensors, f"step{i}.loss", bounds[f"step{i}.loss"][bits])
        assert_within(raw.grad, tensors, f"step{i}.grad_query", bounds[f"step{i}.grad_query"][bits])
        if f"out.step{i}.hard_indices" in tensors:
            hard, count = find_hardest(query @ memory.T, negative, s["n_hard"])
            assert_same_rows(hard, count, tensors[f"out.step{i}.hard_indices"])
        for kind, part in zip((1, 2), mixed.split([first.shape[1], alone.shape[1]], dim=1), strict=True):
            if part.numel():
                assert_within(part, tensors, f"step{i}.mixed_type{kind}", bounds[f"step{i}.mixed_type{kind}"][bits])
        owner[(int(pointer) + torch.arange(len(ids))) % len(owner)] = ids
        push(queue, pointer, length, key, torch.zeros(len(key), dtype=torch.long))
        assert torch.equal(pointer, tensors[f"out.step{i}.pointer"])
        if f"out.step{i}.queue_after" in tensors:
            assert_within(queue[0], tensors, f"step{i}.queue_after", bounds[f"step{i}.queue_after"][bits])


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_a_mixture_with_the_query_is_harder_than_its_negative() -> None:
    query, memory = unit(1, 8), unit(1000, 8, seed=1)
    rows, none = torch.arange(1000)[None], torch.zeros(1, 0)
    share = 0.5 * torch.rand(1, 1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed = mix(query, memory, Mixes(none.long(), none.long(), none, rows, share))
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(1, 1000, dtype=torch.float64))
    assert torch.all(mixed @ query[0] > (memory @ query[0])[None])


def test_mixtures_in_closed_form() -> None:
    """Negatives at right angles to each other: equally similar ones are sqrt(2) harder when mixed half and half."""
    query = torch.tensor([[0.6, 0.6, math.sqrt(0.28)]])
    memory = torch.eye(3)
    half, none = torch.full((1, 1), 0.5), torch.zeros(1, 0)
    pair = mix(query, memory, Mixes(torch.tensor([[0]]), torch.tensor([[1]]), half, none.long(), none))
    assert (pair[0] @ query[0]).item() == pytest.approx(0.6 * math.sqrt(2), rel=1e-6)
    own = mix(memory[:1], memory, Mixes(none.long(), none.long(), none, torch.tensor([[1]]), half))
    assert (own[0] @ memory[0]).item() == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_mixing_never_lowers_the_cost_and_the_memory_has_no_gradient() -> None:
    query, memory = unit(5, 8).requires_grad_(), unit(30, 8, seed=1).requires_grad_()
    known, label = torch.arange(30) % 3, torch.arange(5)[:, None] % 3
    masks = known == label, known != label
    similarity = query @ memory.detach().T
    hard, count = find_hardest(similarity, masks[1], 7)
    assert count.flatten().tolist() == [7] * 5 and torch.all(known[hard] != label)
    drawn = torch.rand(5, 5, 4, generator=torch.Generator().manual_seed(3))
    first, second, alone = (hard.gather(1, pick(drawn[i], count)) for i in range(3))
    mixed = mix(query, memory, Mixes(first, second, drawn[3], alone, drawn[4] / 2))
    plain, _ = contrast_costs(10 * similarity, 10 * similarity, similarity[:, :0], *masks)
    costs, _ = contrast_costs(10 * similarity, 10 * similarity, 10 * similar(query, mixed), *masks)
    assert not mixed.requires_grad
    assert torch.all(costs > plain)


def test_positions_stay_below_the_count() -> None:
    uniform, count = torch.tensor([[0.0, 0.5, 1 - 2**-24]]).expand(3, 3), torch.tensor([[0], [1], [512]])
    assert pick(uniform, count).tolist() == [[0, 0, 0], [0, 0, 0], [0, 256, 511]]


def test_a_ring_forgets_the_oldest_and_survives_as_state() -> None:
    memory, pointer, length = torch.zeros(2, 3, 1), torch.zeros(2).long(), torch.zeros(2).long()

    def write(rows: list[float], label: list[int]) -> None:
        push(memory, pointer, length, torch.tensor(rows).float()[:, None], torch.tensor(label))

    write([1, 2, 3], [0, 255, 1])
    assert memory[..., 0].tolist() == [[1, 0, 0], [3, 0, 0]] and (pointer.tolist(), length.tolist()) == ([1, 1], [1, 1])
    write([4, 5, 6], [0, 0, 0])
    assert memory[0, :, 0].tolist() == [6, 4, 5] and (pointer.tolist(), length.tolist()) == ([1, 1], [3, 1])
    write([7, 8, 9, 10, 11], [1, 1, 1, 1, 1])  # more than the ring holds: the last three, as if one came after another
    assert memory[1, :, 0].tolist() == [9, 10, 11] and (pointer.tolist(), length.tolist()) == ([1, 0], [3, 3])
    write([12], [255])
    assert memory[..., 0].tolist() == [[6, 4, 5], [9, 10, 11]] and (pointer.tolist(), length.tolist()) == (
        [1, 0],
        [3, 3],
    )


def see(seed: int = 0, cells: int = 12, stride: int = 2, images: int = 2) -> Seen:
    """Noise with labels 0, 1 and 2 in columns, the last one cell wide, and 255 in the first rows."""
    generator = torch.Generator().manual_seed(seed)
    side = cells * stride
    label = torch.tensor([0] * (side // 2) + [1] * (side - side // 2 - stride) + [2] * stride)
    label = label.expand(images, side, side).clone()
    label[:, :stride] = 255
    features = torch.randn(images, CHANNELS, cells, cells, generator=generator)
    image = torch.randn(images, 3, side, side, generator=generator)
    view = View("mixed", image, label, *torch.ones(2, images, side, side), seed=torch.arange(images) + 10 * seed)
    return Seen(Output(torch.zeros(images, CLASSES, cells, cells), features.requires_grad_(), (), image), view)


class Teacher:
    """Its features are the colours of the image and their squares."""

    decay = 0.9

    def output(self, image: Tensor, *, keep_statistics: bool) -> Output:
        assert not keep_statistics
        pooled = F.avg_pool2d(image, 2)
        return Output(pooled, torch.cat([pooled, pooled**2], dim=1), (), image)


SCENE: Any = SimpleNamespace(step=5000, teacher=Teacher())


def build(**section: Any) -> MemoryContrast:
    torch.manual_seed(0)
    small = {"projection_channels": 5, "anchors": 30, "memory": 8, "pushed": 3, "hardest": 4, "mixed_pairs": 3}
    return MemoryContrast(settings.MemoryContrast(**small | {"mixed_queries": 2} | section), CLASSES, CHANNELS)


def filled(*seeds: int, **section: Any) -> MemoryContrast:
    objective = build(**section)
    for seed in seeds or (1, 2):
        objective.update(SCENE, [see(seed)])
    return objective


def test_a_step_remembers_a_few_pixels_of_every_class_and_image() -> None:
    objective, seen = build(pushed=3, memory=8), see(1)
    objective.update(SCENE, [seen])
    assert objective.length.tolist() == objective.pointer.tolist() == [6, 6, 6, 0]
    maps = Teacher().output(seen.view.image, keep_statistics=False).features
    for train_id in range(3):
        cells = seen.view.label[:, ::2, ::2] == train_id
        known = F.normalize(objective.average(maps.movedim(1, -1)[cells]), dim=1)
        similarity = objective.memory[train_id, :6] @ known.T
        torch.testing.assert_close(similarity.max(dim=1).values, torch.ones(6))
        assert similarity.argmax(dim=1).unique().numel() == 6
    objective.update(SCENE, [see(2)])
    assert objective.length.tolist() == [8, 8, 8, 0] and objective.pointer.tolist() == [4, 4, 4, 0]


def test_the_head_of_the_memory_follows_at_the_pace_of_the_teacher() -> None:
    objective = build()
    with torch.no_grad():
        before = objective.head[0].bias.clone()
        objective.head[0].bias += 1
    objective.update(SCENE, [see()])
    torch.testing.assert_close(objective.average.get_buffer("0_bias"), before + 0.1)


def test_the_first_step_has_an_empty_memory_and_is_exactly_zero_and_connected() -> None:
    seen, objective = see(), build()
    value = objective(seen)
    assert value == 0
    value.backward()
    assert seen.output.features.grad is not None and not seen.output.features.grad.any()


def test_one_class_in_memory_has_no_negative() -> None:
    objective = filled()
    objective.length[1:] = 0
    assert objective(see()) == 0


def test_the_value_is_that_of_plain_loops() -> None:
    """Without mixtures: all labelled cells against all rows."""
    objective, seen = filled(mixed_pairs=0, mixed_queries=0, anchors=1000), see(3)
    features = seen.output.features.detach().movedim(1, -1).flatten(0, 2)
    queries = F.normalize(objective.head(features), dim=1).detach()
    costs = []
    for q, k in zip(queries, seen.view.label[:, ::2, ::2].flatten().tolist(), strict=True):
        if k == 255:
            continue
        weight = [(objective.memory[c, : int(objective.length[c])] @ q / 0.1).exp() for c in range(CLASSES)]
        rivals = sum(float(w.sum()) for c, w in enumerate(weight) if c != k)
        costs.append(sum(-math.log(w / (w + rivals)) for w in weight[k].tolist()) / len(weight[k]))
    assert objective(seen).item() == pytest.approx(sum(costs) / len(costs), rel=1e-5)


def test_gradients_reach_features_and_head_but_not_the_memory() -> None:
    seen, objective = see(), filled()
    objective(seen).backward()
    touched = seen.output.features.grad.abs().sum(dim=1) > 0  # B h w
    assert 0 < touched.sum() <= 30 and not touched[:, 0].any()
    assert all(p.grad is not None and p.grad.any() for p in objective.head.parameters())


def test_weightless_pixels_are_neither_anchors_nor_remembered() -> None:
    seen, objective = see(), build()
    seen.view.weight[:, :, 12:] = 0
    objective.update(SCENE, [seen])
    assert objective.length.tolist() == [6, 0, 0, 0]
    objective = filled()
    objective(seen).backward()
    assert not seen.output.features.grad[..., 6:].any() and seen.output.features.grad.any()


def test_micro_batches_remember_what_the_batch_does() -> None:
    seen, whole, parts = see(1), build(), build()
    whole.update(SCENE, [seen])
    halves = [Seen(seen.output, seen.view.part(images)) for images in (slice(0, 1), slice(1, 2))]
    parts.update(SCENE, halves)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), buffer)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for numbers in (2**20, 7 * (32 + 5 * 5)):
        monkeypatch.setattr(memory_contrast, "AT_ONCE", numbers)
        seen, objective = see(), filled()
        values.append(torch.autograd.grad(value := objective(seen), seen.output.features) + (value,))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other)


def test_draws_follow_the_seed_of_the_view() -> None:
    objective, seen = filled(anchors=5), see()
    assert objective(seen) == objective(seen)
    assert objective(seen) != objective(Seen(seen.output, replace(seen.view, seed=torch.tensor([7, 8]))))


def test_two_ranks_contrast_and_remember_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap binds. Each rank has one image; what the other one gathers is recorded first."""
    objective, seen = filled(), see(3)
    expected = objective(seen)
    (wanted,) = torch.autograd.grad(expected, seen.output.features, retain_graph=True)
    ranks = [
        Seen(replace(seen.output, features=seen.output.features[i]), seen.view.part(i))
        for i in (slice(0, 1), slice(1, 2))
    ]
    for what in (lambda o, s: o(s), lambda o, s: o.update(SCENE, [s])):
        sent: list[list[Tensor]] = [[], []]
        for rank, rows in zip(ranks, sent, strict=True):
            monkeypatch.setattr(collectives, "all_gather_rows", lambda one, rows=rows: rows.append(one) or one)
            what(filled_copy(objective), rank)
        joint = iter([torch.cat(pair) for pair in zip(*sent, strict=True)])
        monkeypatch.setattr(collectives, "all_gather_rows", lambda _, joint=joint: next(joint))
        on_rank = filled_copy(objective)
        value = what(on_rank, ranks[0])
        if value is not None:
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value, seen.output.features)[0], wanted)
    monkeypatch.setattr(collectives, "all_gather_rows", lambda one: one)
    objective.update(SCENE, [seen])
    for name, buffer in objective.named_buffers():
        torch.testing.assert_close(on_rank.get_buffer(name), buffer)


def filled_copy(objective: MemoryContrast) -> MemoryContrast:
    copy = build()
    copy.load_state_dict(objective.state_dict())
    return copy


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on this device have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    with torch.device("meta"):
        (output, view), objective = see(), build()
    seen = Seen(output, replace(view, seed=torch.tensor([1, 2])))
    objective.update(SCENE, [seen])
    value = objective(seen)
    assert value.device.type == "meta"
    value.backward()
    assert output.features.grad is not None
