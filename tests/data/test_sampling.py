"""Which image, which crop: parity with the reference where it can be measured, and the law of the redraws."""

import numpy as np
import pytest
import torch

from cluda_cli.data import sampling
from cluda_cli.data.index import Item
from cluda_cli.data.labels import CITYSCAPES, IGNORE, ClassTable
from cluda_cli.data.sampling import Crop, RareClasses, class_probabilities, diverse_crop, random_crop, rare_crop
from cluda_cli.settings import RareClass

CLASSES = ClassTable(CITYSCAPES)
CROP = (512, 512)


def items_of(stats: list[dict]) -> list[Item]:
    """The items of a class-statistics file of the reference."""
    return [
        Item(row["file"], row["file"], (1052, 1914), {int(k): n for k, n in row.items() if k != "file"})
        for row in stats
    ]


def chi_square_z(observed: np.ndarray, expected: np.ndarray) -> float:
    """Goodness of fit, as standard deviations above its mean; observed where nothing is expected is infinitely bad."""
    if observed[expected == 0].any():
        return np.inf
    keep = expected > 0
    degrees = keep.sum() - 1
    return float((((observed - expected)[keep] ** 2 / expected[keep]).sum() - degrees) / np.sqrt(2 * degrees))


@pytest.mark.reference
def test_class_probabilities_match_the_reference(golden):
    for case in golden("06_rcs/rcs")[1]["cases"]:
        pixels = [0] * 19
        for item in items_of(case["sample_class_stats"]):
            for train_id, count in item.pixels.items():
                pixels[train_id] += count
        for temperature, result in case["results"].items():
            probabilities = class_probabilities(pixels, float(temperature))
            expected = torch.zeros(19)
            expected[result["classes"]] = torch.tensor(result["probabilities"])
            torch.testing.assert_close(probabilities, expected, rtol=0, atol=5e-6)
            assert not probabilities[expected == 0].any()


@pytest.mark.reference
def test_eligible_images_match_the_reference(golden, capsys):
    description = golden("06_rcs/rcs")[1]
    items = items_of(description["cases"][0]["sample_class_stats"])
    for min_pixels, expected in description["eligible_files_by_min_pixels"].items():
        rare = RareClasses(items, CLASSES, RareClass(min_pixels=int(min_pixels)), CROP)
        for train_id in range(19):
            names = [items[i].image.rsplit("/")[-1] for i in rare.images[train_id]]
            reference = expected.get(str(train_id))
            if reference:  # the reference cannot draw for a class without eligible images
                assert names == reference
            else:
                assert names == [i.image.rsplit("/")[-1] for i in items if train_id in i.pixels]


@pytest.mark.reference
def test_redraws_match_the_reference(golden, monkeypatch):
    for case in golden("06_rcs/rcs")[1]["redraw_behaviour"]["cases"]:
        pixels, drawn = case["class_pixels_in_successive_crops"], []

        def crop_with(*_, pixels=pixels, drawn=drawn):
            drawn.append(pixels[min(len(drawn), len(pixels) - 1)])
            return Crop(len(drawn), 0, 1, drawn[-1])

        monkeypatch.setattr(sampling, "random_crop", crop_with)
        monkeypatch.setattr(sampling, "_is_diverse", lambda *_: True)
        label = torch.zeros(12, max(pixels), dtype=torch.uint8)
        share = case["min_pixels"] * case["min_crop_ratio"] / (CROP[0] * CROP[1])
        section = RareClass(min_pixels=case["min_pixels"], min_crop_share=share)
        rare = RareClasses([Item("a", "a", (1, 1), {0: 9999})], CLASSES, section, CROP)
        crop = rare_crop(np.random.default_rng(0), label, CROP, 0.75, 0, rare.crop_pixels)
        assert len(drawn) == case["crops_drawn"]
        assert crop.top == len(drawn)  # the last one drawn is kept


def test_draws_follow_the_probabilities():
    items = [Item(f"{i}", "x", (9, 9), pixels) for i, pixels in enumerate([{0: 500, 1: 40}, {0: 500, 2: 90}, {1: 50}])]
    rare = RareClasses(items, CLASSES, RareClass(min_pixels=30, temperature=0.5), CROP)
    rng = np.random.default_rng(0)
    counts = np.zeros((19, 3))
    for _ in range(4000):
        counts[rare.draw(rng)] += 1
    expected = np.zeros((19, 3))
    probabilities = class_probabilities([1000, 90, 90, *[0] * 16], 0.5).numpy()
    expected[0, :2], expected[1, [0, 2]], expected[2, 1] = probabilities[0] / 2, probabilities[1] / 2, probabilities[2]
    assert abs(chi_square_z(counts, 4000 * expected)) < 4


def test_scarce_classes_are_announced_once_and_drawn_from_all_their_images(capsys):
    items = [Item("a", "a", (9, 9), {0: 5000, 11: 10}), Item("b", "b", (9, 9), {0: 10, 11: 3000, 5: 1})]
    rare = RareClasses(items, CLASSES, RareClass(min_pixels=3000), CROP)
    assert [rare.images[k].tolist() for k in (0, 5, 11, 3)] == [[0], [1], [0, 1], []]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "pole, person;" in lines[0] and "3000" in lines[0]


def test_unset_threshold_follows_the_crop():
    items = [Item("a", "a", (9, 9), {0: 751}), Item("b", "b", (9, 9), {0: 750})]
    assert RareClasses(items, CLASSES, RareClass(), (256, 256)).images[0].tolist() == [0]
    assert RareClasses(items, CLASSES, RareClass(), (256, 256)).crop_pixels == 375


def test_random_crop_reaches_every_position_equally():
    rng = np.random.default_rng(0)
    counts = np.zeros((4, 3))
    for _ in range(3000):
        crop = random_crop(rng, (8, 7), (5, 5))
        counts[crop.top, crop.left] += 1
    assert abs(chi_square_z(counts, np.full((4, 3), 250.0))) < 4
    assert random_crop(rng, (4, 30), (5, 5)).height == 4


def law_of_redraws(law: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """The law of a draw that is repeated up to ten times until accepted, the eleventh being kept."""
    rejected = law[~accepted].sum()
    return law * accepted * sum(rejected**k for k in range(10)) + law * rejected**10


def label_with_patches() -> torch.Tensor:
    """24 x 30, half of it ignored at the right end, mostly class 0, with a patch of 1 and one of 2."""
    label = torch.zeros(24, 30, dtype=torch.uint8)
    label[14:22, 4:9], label[2:12, 12:20], label[:, 26:] = 1, 2, IGNORE
    return label


def test_crops_have_the_law_of_repeating_the_whole_pipeline():
    """Exact law of drawing, testing and repeating as section 3.3 of DAFormer and its data pipeline define it."""
    label, size, share, min_pixels, draws = label_with_patches(), (10, 10), 0.75, 19, 3000
    windows = label.unfold(0, 10, 1).unfold(1, 10, 1)  # 15 21 10 10
    counts = torch.stack([(windows == k).sum((2, 3)) for k in range(3)]).numpy()  # 3 15 21
    present = (counts > 0).sum(0)
    diverse = (present > 1) & (counts.max(0) / counts.sum(0).clip(1) < share)
    uniform = np.full(diverse.shape, 1 / diverse.size)
    for train_id in (1, 2):
        law = law_of_redraws(law_of_redraws(uniform, diverse), counts[train_id] > min_pixels)
        rng, observed = np.random.default_rng(train_id), np.zeros(diverse.shape)
        for _ in range(draws):
            crop = rare_crop(rng, label, size, share, train_id, min_pixels)
            observed[crop.top, crop.left] += 1
        # Positions that are nearly never drawn would need more draws than a test can make: sum them.
        frequent = law * draws >= 5
        pooled = [np.append(x[frequent], x[~frequent].sum()) for x in (observed, law * draws)]
        assert abs(chi_square_z(*pooled)) < 4


def rare_crop_by_histograms(rng, label, size, max_share, train_id, min_pixels) -> Crop:
    """The definition: each crop is judged by the histogram of its label."""
    for _ in range(11):
        for _ in range(11):
            crop = random_crop(rng, label.shape, size)
            counts = torch.bincount(crop.of(label).flatten(), minlength=256)[:IGNORE]
            if counts.max() < max_share * counts.sum():
                break
        if counts[train_id] > min_pixels:
            break
    return crop


@pytest.mark.parametrize("max_share", [0.3, 0.75, 1.0])
def test_equal_draws_give_the_crops_that_histograms_would(max_share):
    generator, redrawn = torch.Generator().manual_seed(0), 0
    for seed in range(60):
        # Blocks of few or many classes, from coarser to finer than the grid on which common classes are found.
        block, num_classes = 1 + seed % 13, 1 + seed % 7
        coarse = torch.randint(0, num_classes, (80 // block, 90 // block), generator=generator, dtype=torch.uint8)
        coarse[torch.rand(coarse.shape, generator=generator) < 0.3] = IGNORE
        label = coarse.repeat_interleave(block, 0).repeat_interleave(block, 1)
        for train_id, min_pixels in [(0, -1), (0, 40), (min(num_classes, 3) - 1, 60)]:
            arguments = (label, (20, 22), max_share, train_id, min_pixels)
            ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
            assert rare_crop(ours, *arguments) == rare_crop_by_histograms(theirs, *arguments)
            assert ours.bit_generator.state == theirs.bit_generator.state
            first = random_crop(np.random.default_rng(seed), label.shape, (20, 22))
            redrawn += rare_crop(np.random.default_rng(seed), *arguments) != first
    assert redrawn > 20


def test_one_class_or_nothing_labelled_is_not_diverse(monkeypatch):
    drawn = []
    monkeypatch.setattr(sampling, "random_crop", lambda *_: drawn.append(1) or Crop(0, 0, 2, 2))
    rng = np.random.default_rng(0)
    for rows, tries in [
        ([[5, 5], [5, 255]], 11),
        ([[255, 255], [255, 255]], 11),
        ([[5, 5], [5, 6]], 11),  # a share of 0.75 is too much
        ([[5, 5], [6, 255]], 1),  # ignored pixels do not count
    ]:
        drawn.clear()
        diverse_crop(rng, torch.tensor(rows, dtype=torch.uint8), (2, 2), 0.75)
        assert len(drawn) == tries
