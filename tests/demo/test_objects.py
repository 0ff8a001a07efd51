"""The things in a street: each paints its own classes, stands on the ground, and shrinks with distance."""

from collections.abc import Callable

import numpy as np
import pytest

from cluda_cli.demo import objects
from cluda_cli.demo.canvas import HEIGHT, WIDTH
from cluda_cli.demo.objects import LABEL, Brush, make_disc, make_limb

Painted = Callable[[], set[str]]


@pytest.mark.parametrize(
    ("draw", "arguments", "classes"),
    [
        (objects.draw_person, (0, 8), {"person"}),
        (objects.draw_two_wheeler, (0, 8, 0.8, "bicycle", True), {"bicycle", "rider"}),
        (objects.draw_two_wheeler, (0, 8, 0.8, "motorcycle", False), {"motorcycle"}),
        (objects.draw_tree, (0, 12, 6, 2), {"vegetation"}),
        (objects.draw_hedge, (0, 8, 2.2, 1.6), {"vegetation"}),
        (objects.draw_lamp_post, (1, 15, 7), {"pole"}),
        (objects.draw_traffic_light, (0, 8), {"pole", "traffic light"}),
        (objects.draw_traffic_sign, (0, 8), {"pole", "traffic sign"}),
        (objects.draw_litter_bin, (0, 8), {"unlabelled"}),
    ],
)
def test_a_thing_paints_its_own_classes(
    brush: Brush, painted: Painted, draw: Callable[..., None], arguments: tuple, classes: set[str]
) -> None:
    draw(brush, *arguments)
    assert painted() == classes


@pytest.mark.parametrize("draw", [objects.draw_person, objects.draw_traffic_light, objects.draw_litter_bin])
def test_a_thing_stands_on_the_ground_at_its_place(brush: Brush, draw: Callable[..., None]) -> None:
    draw(brush, 1.0, 9.0)
    rows, columns = np.nonzero(brush.canvas.finish().make_labels() != LABEL["sky"])
    focal = brush.canvas.camera.focal * WIDTH
    assert rows.max() == pytest.approx(HEIGHT / 2 + focal * brush.canvas.camera.height / 9, abs=1.5)
    assert columns.mean() == pytest.approx(WIDTH / 2 + focal * 1 / 9, abs=4)


def test_the_arm_of_a_lamp_reaches_over_the_road(brush: Brush) -> None:
    objects.draw_lamp_post(brush, 3.0, 15.0, 7.0)
    rows, columns = np.nonzero(brush.canvas.finish().make_labels() == LABEL["pole"])
    assert columns[rows < rows.min() + 5].min() < columns[rows > rows.max() - 5].min() - 10


def test_colors_of_a_name_vary(brush: Brush) -> None:
    colors = [brush.pick_color("marking") for _ in range(5)]  # one colour in the palette
    assert len(set(colors)) == 5
    assert all(abs(c / 245 - 1) < 0.27 for color in colors for c in color)


def test_outlines() -> None:
    disc = np.array(make_disc((2.0, 1.0), 0.5, corners=7))
    assert len(disc) == 7 and np.linalg.norm(disc - (2, 1), axis=1) == pytest.approx(np.full(7, 0.5))
    a, b, c, d = (np.array(p) for p in make_limb((0.0, 0.0), (3.0, 4.0), 0.5))
    assert np.linalg.norm(a - d) == pytest.approx(0.5) and np.linalg.norm(a - b) == pytest.approx(5)
    assert (a + d) / 2 == pytest.approx((0, 0)) and (b + c) / 2 == pytest.approx((3, 4))
