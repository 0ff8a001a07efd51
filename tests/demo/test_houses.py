"""What stands along the streets."""

from collections.abc import Callable

import numpy as np
import pytest

from cluda_cli.demo.canvas import HEIGHT, WIDTH
from cluda_cli.demo.houses import draw_backdrop, draw_frontage
from cluda_cli.demo.objects import LABEL, Brush

Painted = Callable[[], set[str]]


def frontage(brush: Brush, side: int, greenery: float, crossing: tuple[float, float] | None = None) -> np.ndarray:
    """Label ids, H W, of one side of the street, 5 metres from its middle."""
    draw_frontage(brush, side, 5.0 * side, (4.0, 100.0), crossing, greenery, (8.0, 18.0))
    return brush.canvas.finish().make_labels()


def test_the_backdrop_closes_the_horizon(brush: Brush, painted: Painted) -> None:
    draw_backdrop(brush, 140.0, 0.3, (8.0, 18.0))
    assert painted() == {"building", "vegetation"}
    assert (brush.canvas.finish().make_labels()[HEIGHT // 2 - 2] != LABEL["sky"]).mean() > 0.9


@pytest.mark.parametrize("side", [-1, 1])
def test_each_side_keeps_to_its_half(brush: Brush, side: int) -> None:
    _, columns = np.nonzero(frontage(brush, side, 0.5) != LABEL["sky"])
    assert ((columns - WIDTH / 2) * side > -3).all() and len(columns) > 1000


def test_without_greenery_there_are_only_buildings(brush: Brush, painted: Painted) -> None:
    frontage(brush, 1, 0.0)
    assert painted() == {"building"}


def test_greenery_has_no_buildings_but_what_surrounds_a_garden(brush: Brush, painted: Painted) -> None:
    for _ in range(3):
        frontage(brush, 1, 1.0)
    assert painted() == {"vegetation", "wall", "fence"}


@pytest.mark.parametrize(("crossing", "name"), [(None, "building"), ((15.0, 30.0), "sky")])
def test_a_side_street_is_left_free(brush: Brush, crossing: tuple[float, float] | None, name: str) -> None:
    labels = frontage(brush, 1, 0.0, crossing)
    # The foot of the line of houses 22 metres away; the sky stands for unpainted ground.
    scale = brush.canvas.camera.focal * WIDTH / 22
    row, column = HEIGHT / 2 + scale * brush.canvas.camera.height, WIDTH / 2 + scale * 5
    assert labels[int(row) - 2, int(column)] == LABEL[name]
