"""Blocks that hide parts of an image, all alike or by importance. B batch, H W pixels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation import masking
from cluda_cli.adaptation.masking import block_importance, block_mask, hiding_probability, importance_ratio

Size = tuple[int, int]


def mask(count: int = 2, size: Size = (64, 96), block: int = 16, ratio: float = 0.7, seed: int = 0) -> Tensor:
    generators = [torch.Generator().manual_seed(100 * seed + i) for i in range(count)]
    return block_mask(size, block, ratio, generators)


@pytest.mark.reference
def test_masks_of_recorded_draws(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, description = golden("13_mic/block_mask")
    for case in description["settings"]["cases"]:
        key, size = case["key"], tuple(case["size"])
        grid = vectors[f"in.{key}.uniform_grid"]
        # The draws of a seed are no contract; these are what the masks were made of.
        rows = iter(grid.flatten(0, grid.dim() - 3))  # one for each image
        monkeypatch.setattr(torch, "rand", lambda *shape, generator, rows=rows: next(rows).view(shape))
        found = mask(case["batch"], size, case["block"], case["mask_ratio"])
        assert torch.equal(found, vectors[f"out.{key}.mask"][:, 0].bool()), key
    rows, image = iter(vectors["in.image_uniform_grid"].flatten(0, -3)), vectors["in.image"]
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: next(rows).view(shape))
    assert torch.equal(image * mask(2, (40, 56))[:, None], vectors["out.masked_image"])


def test_blocks_are_hidden_or_visible_as_a_whole() -> None:
    visible = mask(3)
    assert visible.shape == (3, 64, 96) and visible.dtype == torch.bool
    blocks = visible.unfold(1, 16, 16).unfold(2, 16, 16).flatten(3)  # 3 4 6 256
    assert torch.equal(blocks.all(3), blocks.any(3))
    assert 0 < blocks.all(3).float().mean() < 1
    assert not torch.equal(visible[0], visible[1])  # each image has blocks of its own


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_share_of_hidden_blocks_is_the_ratio(ratio: float) -> None:
    hidden = 1 - mask(10, (512, 512), 16, ratio).float().mean().item()
    assert hidden == pytest.approx(ratio, abs=5 * (ratio * (1 - ratio) / 10240) ** 0.5)


def test_extreme_ratios() -> None:
    assert mask(ratio=0.0).all() and not mask(ratio=1.0).any()


@pytest.mark.parametrize(
    ("size", "block", "blocks"),
    [
        ((40, 56), 16, (2, 4)),
        ((70, 100), 16, (4, 6)),
        ((61, 90), 32, (2, 3)),
        ((8, 8), 16, (1, 1)),
        ((20, 20), 1, (20, 20)),
    ],
)
def test_any_side_has_a_whole_number_of_blocks_of_nearly_equal_sides(size: Size, block: int, blocks: Size) -> None:
    for axis in range(2):
        borders = set()
        for seed in range(60):  # a border between two blocks shows where they differ
            visible = mask(1, size, block, 0.5, seed)[0].movedim(axis, 0)
            changes = (visible[1:] != visible[:-1]).any(dim=1).nonzero().flatten() + 1
            borders |= set(changes.tolist())
        edges = [0, *sorted(borders), size[axis]]
        assert len(edges) == blocks[axis] + 1
        sides = {after - before for before, after in zip(edges, edges[1:], strict=False)}
        assert max(sides) - min(sides) <= 1


def test_mask_follows_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(mask(seed=1), mask(seed=1)) and not torch.equal(mask(seed=1), mask(seed=2))
    assert torch.equal(torch.get_rng_state(), before)


# By importance


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["n04_drop_1248", "n05_drop_blocks", "n06_drop_uniform"])
def test_probabilities_of_the_reference(name: str, dtype: torch.dtype, golden: Any) -> None:
    """The consistent form: with equal importance the released code divides 0 by 0."""
    tensors, description = golden(f"29_gca/{name}")
    s, bounds = description["settings"], description["tolerance_demanded"]["bounds"]
    importance, realised = tensors["in.importance"].to(dtype), []
    for p in s["p"]:
        for cap in s["cap"]:
            key = f"prob_p{p}_cap{cap}"
            found = hiding_probability(importance, p, cap)
            realised.append(found.mean().item())
            bound = bounds[f"consistent.{key}"][f"{str(dtype)[6:]}_max_abs"]
            assert (found - tensors[f"out64_consistent.{key}"]).abs().max() <= bound, key
    assert realised == pytest.approx(tensors["out64_consistent.realised_mean_probability"].tolist(), abs=1e-6)
    hidden = tensors["in.uniform"].to(dtype) < hiding_probability(importance, 0.7, 0.9)
    assert torch.equal(hidden, tensors["out_consistent.masked_prob_p0.7_cap0.9"].bool())


@pytest.mark.reference
def test_probabilities_on_a_graph_of_the_reference(golden: Any) -> None:
    """Its centralities have no counterpart in an image; they serve as importance. An edge has that of its sink."""
    tensors, description = golden("29_gca/n07_graph_6x6")
    bounds, sink = description["tolerance_demanded"]["bounds"], tensors["in.edge_index"][1]
    degree = torch.zeros(description["settings"]["nodes"], dtype=torch.float64)
    degree.index_add_(0, sink, torch.ones(len(sink), dtype=torch.float64))
    for p in (0.3, 0.6):
        found = hiding_probability(degree[sink], p, 0.7)
        key = f"degree.edge_prob_p{p}"
        assert (found - tensors[f"out64.{key}"]).abs().max() <= bounds[key]["float64_max_abs"]
    features = tensors["in.features"].double().abs()
    key = "degree.feature_prob_p0.3"
    found = hiding_probability(features.T @ degree, 0.3, 0.7)
    assert (found - tensors[f"out64.{key}"]).abs().max() <= bounds[key]["float64_max_abs"]
    weights = {
        "out64.degree.edge_weights": degree[sink],
        "out64.degree.feature_weights_dense": features.T @ degree,
        "out64.degree.feature_weights_binary": (features > 0).double().T @ degree,
        "out64.pr.edge_weights_200": tensors["out64.pr.node_200"][sink],
        "out64_consistent.pr.edge_weights_200": tensors["out64_consistent.pr.node_200"][sink],
    }
    for key, importance in weights.items():  # a ratio of 1 without a cap gives the weights
        bound = bounds[key.replace("out64_", "").replace("out64.", "")]["float64_max_abs"]
        assert (hiding_probability(importance, 1.0, 99.0) - tensors[key]).abs().max() <= bound, key
    # The eigenvector is an iterate, stored less exactly than its weights.
    found = hiding_probability(tensors["out64.evc.node"][sink], 1.0, 99.0)
    assert (found - tensors["out64.evc.edge_weights"]).abs().max() <= bounds["evc.edge_weights"]["float32_max_abs"]


def test_the_most_important_block_stays_and_the_mean_is_the_ratio_below_the_cap() -> None:
    importance = torch.tensor([[1.0, 2, 4, 8], [3, 3, 3, 3]])
    found = hiding_probability(importance, 0.3, 0.7)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.4, 0.2, 0], [0.3] * 4]))
    torch.testing.assert_close(hiding_probability(importance, 0.5, 0.7)[0], torch.tensor([0.7, 2 / 3, 1 / 3, 0]))
    assert hiding_probability(torch.zeros(1, 5), 0.95, 0.9).tolist() == [pytest.approx([0.9] * 5)]
    nearly = torch.full((1, 9), 0.1) + 1e-9 * torch.arange(9)
    torch.testing.assert_close(hiding_probability(nearly, 0.3, 0.7), torch.full((1, 9), 0.3))
    finely = 1 + 1e-9 * torch.arange(5, dtype=torch.float64)[None]  # in float64 these differ by more than rounding
    assert hiding_probability(finely, 0.3, 0.7)[0].tolist() == pytest.approx([0.6, 0.45, 0.3, 0.15, 0], abs=1e-5)


def test_blocks_are_hidden_as_often_as_their_probability_says() -> None:
    probability = torch.tensor([[0.0, 0.3], [0.6, 0.9]]).expand(400, 2, 2)
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    hidden = 1 - block_mask((8, 8), 4, probability, generators)[:, ::4, ::4].float().mean(dim=0)
    assert hidden[0, 0] == 0
    assert torch.all((hidden - probability[0]).abs() < 5 * (0.25 / 400) ** 0.5)


LABEL = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [2, 2, 255, 255], [2, 2, 255, 255]])[None]
PROBABILITY = torch.tensor([[0.5, 0.7, 1, 1], [0.9, 0, 1, 1], [0.25, 0.25, 1, 1], [0.25, 0.25, 1, 1]])[None]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Blocks of 2 x 2; one pixel of the first has no pseudo-label, and the last has no label, so it has the mean.
        ("uncertainty", [[0.3, 0.0], [0.75, None]]),
        ("boundary", [[1 / 3, 0.5], [0, None]]),
        ("rarity", [[11 / 6, 0.75 * 11 / 6 + 0.25 * 11], [11 / 4, None]]),
    ],
)
def test_importance_of_blocks(kind: str, expected: list[list[float | None]]) -> None:
    found = block_importance(kind, LABEL, PROBABILITY, (2, 2))[0]
    known = [value for row in expected for value in row if value is not None]
    assert found.flatten()[:3].tolist() == pytest.approx(known, rel=1e-5)
    pixels = sum(value * count for value, count in zip(known, (3, 4, 4), strict=True))
    assert found[1, 1].item() == pytest.approx(pixels / 11, rel=1e-5)


def test_rarity_counts_the_pixels_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.zeros(256, dtype=torch.int64)
    other[1] = 9
    monkeypatch.setattr(masking.collectives, "all_reduce_sum", lambda count: count + other)
    found = block_importance("rarity", LABEL, PROBABILITY, (2, 2))[0]
    assert found[0].tolist() == pytest.approx([20 / 6, 0.75 * 20 / 6 + 0.25 * 2])


def test_the_important_stays_or_goes_as_the_settings_say() -> None:
    """Uncertainty on the right half; two of eight blocks are the least and the most uncertain."""
    probability = torch.full((1, 8, 16), 0.9)
    probability[:, :4, :4], probability[:, 4:, 12:] = 0.99, 0.1
    label = torch.zeros(1, 8, 16, dtype=torch.long)
    section = settings.Masking(block=4, ratio=0.5, importance="uncertainty")
    keep = importance_ratio(section, label, probability)
    hide = importance_ratio(section.model_copy(update={"hide_important": True}), label, probability)
    assert keep.shape == hide.shape == (1, 2, 4)
    assert keep[0, 1, 3] == 0 and keep[0, 0, 0] == pytest.approx(0.9) and keep[0, 0, 0] > keep[0, 0, 1] > 0
    assert hide[0, 0, 0] == 0 and hide[0, 1, 3] == pytest.approx(0.9) and hide[0, 1, 3] > hide[0, 0, 1] > 0
