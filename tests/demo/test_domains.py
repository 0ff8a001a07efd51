"""The two domains: all colours and ranges make sense, the classes agree, and there is a gap between the pictures."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.demo.canvas import Floats
from cluda_cli.demo.dataset import draw
from cluda_cli.demo.domains import DOMAINS
from cluda_cli.demo.objects import LABEL


@pytest.fixture(scope="module")
def scenes(noise: Floats) -> dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]]:
    return {domain: [draw(domain, seed, noise) for seed in range(16)] for domain in DOMAINS}


def test_palettes_name_the_same_parts_in_colors() -> None:
    first, second = (style.palette for style in DOMAINS.values())
    assert first.keys() == second.keys()
    channels = [c for palette in (first, second) for colors in palette.values() for color in colors for c in color]
    assert min(channels) >= 0 and max(channels) <= 255


@pytest.mark.parametrize("domain", DOMAINS)
def test_ranges_go_upward(domain: str) -> None:
    values = vars(DOMAINS[domain]) | vars(DOMAINS[domain].streets)
    ranges = {name: value for name, value in values.items() if isinstance(value, tuple)}
    fields = (*dataclasses.fields(DOMAINS[domain]), *dataclasses.fields(DOMAINS[domain].streets))
    assert len(ranges) == sum(field.type == tuple[float, float] for field in fields)
    assert [name for name, (low, high) in ranges.items() if low > high] == []


@pytest.mark.parametrize("domain", ["render", "camera"])
def test_big_classes_are_common_and_most_rare_ones_occur(domain: str, scenes: dict) -> None:
    labels = np.stack([label for _, label in scenes[domain]])
    for name in ("road", "sidewalk", "building", "vegetation", "sky", "car"):
        assert (labels == LABEL[name]).any(axis=(1, 2)).mean() > 0.8, name
    rare = set(LABEL) - {"road", "sidewalk", "building", "vegetation", "sky", "car", "train"}
    assert len([name for name in rare if (labels == LABEL[name]).sum() > 100]) >= 10
    assert (labels == 0).mean() < 0.02


def test_domains_differ_in_color_but_not_in_classes(scenes: dict) -> None:
    def saturation(domain: str) -> float:
        images = np.stack([image for image, _ in scenes[domain]]).astype(float)
        return float((images.max(-1) - images.min(-1)).mean())

    def brightness(domain: str) -> float:
        return float(np.mean([image.mean() for image, _ in scenes[domain]]))

    def shares(domain: str) -> NDArray[np.float64]:
        labels = np.stack([label for _, label in scenes[domain]])
        return np.array([(labels == row.label_id).mean() for row in CITYSCAPES])

    assert saturation("render") > 1.3 * saturation("camera")
    assert brightness("render") > brightness("camera") + 10
    assert np.abs(shares("render") - shares("camera")).sum() < 0.4
