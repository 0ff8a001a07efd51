"""Vehicles: one class each, seen from the right side, smaller in the distance."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from cluda_cli.demo.canvas import Canvas
from cluda_cli.demo.domains import DOMAINS
from cluda_cli.demo.objects import LABEL, Brush
from cluda_cli.demo.vehicles import cut_inset, draw_bus, draw_car, draw_truck, make_box


def seen(brush: Brush, name: str, draw: Callable[..., None], z: float, heading: float) -> np.ndarray:
    """Where a vehicle alone on a fresh canvas is seen, H W bool."""
    canvas = Canvas(brush.canvas.camera, brush.canvas.light, LABEL["sky"])
    draw(Brush(canvas, random.Random(1), DOMAINS["camera"].palette), 0.0, z, heading)
    labels = canvas.finish().make_labels()
    assert set(np.unique(labels).tolist()) == {LABEL["sky"], LABEL[name]}
    return labels == LABEL[name]


@pytest.mark.parametrize(("name", "draw"), [("car", draw_car), ("truck", draw_truck), ("bus", draw_bus)])
def test_a_vehicle_is_long_from_the_side_and_small_in_the_distance(
    brush: Brush, name: str, draw: Callable[..., None]
) -> None:
    def width(z: float, heading: float) -> int:
        return int(seen(brush, name, draw, z, heading).any(axis=0).sum())

    assert width(20, math.pi / 2) > 1.7 * width(20, 0)
    assert width(80, 0) < 0.4 * width(20, 0)
    assert width(20, math.pi) > 0.8 * width(20, 0)  # also seen from the front


@pytest.mark.parametrize(("heading", "lamp"), [(0.0, "rear lamp"), (math.pi, "head lamp")])
def test_lamps_are_seen_from_their_own_side_only(brush: Brush, heading: float, lamp: str) -> None:
    pure = {"rear lamp": ((255, 0, 0),), "head lamp": ((0, 0, 255),)}
    draw_car(Brush(brush.canvas, brush.random, {**brush.palette, **pure}), 0.0, 12.0, heading)
    looks = [look.color for look in brush.canvas.finish().looks]
    of_lamps = {name for name, color in (("rear lamp", 0), ("head lamp", 2)) for c in looks if c[color] and not c[1]}
    assert of_lamps == {lamp}


def test_a_box_is_shorter_and_narrower_at_the_top() -> None:
    box = make_box(2.0, 0.5, 1.5, -3.0, 3.0, rake=(0.5, 1.0), lean=0.25)
    assert box["top"] == [(-0.75, 1.5, -2.5), (0.75, 1.5, -2.5), (0.75, 1.5, 2.0), (-0.75, 1.5, 2.0)]
    assert {point for side in box.values() for point in side if point[1] == 0.5} == {
        (x, 0.5, z) for x in (-1.0, 1.0) for z in (-3.0, 3.0)
    }


def test_an_inset_is_a_share_of_its_side() -> None:
    side = make_box(2.0, 0.0, 1.0, 0.0, 4.0)["right"]
    assert cut_inset(side, 0, 1, 0, 1) == side
    assert cut_inset(side, 0.25, 0.5, 0.0, 0.5) == [(1, 0, 1), (1, 0, 2), (1, 0.5, 2), (1, 0.5, 1)]
