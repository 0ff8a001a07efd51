"""Blocks that hide parts of an image. B batch, H W pixels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.adaptation.masking import block_mask

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
