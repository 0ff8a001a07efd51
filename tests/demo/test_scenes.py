"""The layout of whole streets."""

import dataclasses
import random

import numpy as np
import pytest

from cluda_cli.demo.canvas import HEIGHT, WIDTH, Canvas
from cluda_cli.demo.domains import DOMAINS
from cluda_cli.demo.objects import LABEL, Brush
from cluda_cli.demo.scenes import Street, StreetStyle, draw_street

STYLE = DOMAINS["render"].streets


def draw_labels(brush: Brush, style: StreetStyle, seed: int) -> np.ndarray:
    canvas = Canvas(brush.canvas.camera, brush.canvas.light, LABEL["sky"])
    draw_street(Brush(canvas, random.Random(seed), brush.palette), style)
    return canvas.finish().make_labels()


def test_a_seed_gives_one_street(brush: Brush) -> None:
    first = draw_labels(brush, STYLE, 0)
    assert np.array_equal(first, draw_labels(brush, STYLE, 0))
    assert not np.array_equal(first, draw_labels(brush, STYLE, 1))


def test_the_camera_is_over_the_road_and_the_street_ends_below_the_sky(brush: Brush) -> None:
    empty = dataclasses.replace(STYLE, gap=(500, 500), people=(0, 0), two_wheelers=(0, 0), crossing=0.0)
    for seed in range(4):
        labels = draw_labels(brush, empty, seed)
        assert (labels[-1, WIDTH // 2 - 20 : WIDTH // 2 + 20] == LABEL["road"]).all()
        assert (labels[HEIGHT // 2 - 1] != LABEL["sky"]).all()


@pytest.mark.parametrize(
    ("field", "value", "classes"),
    [
        ("heavy", 0.0, ("truck", "bus")),
        ("two_wheelers", (0, 0), ("bicycle", "motorcycle", "rider")),
        ("greenery", 0.0, ("wall", "fence")),
    ],
)
def test_what_a_style_excludes_does_not_occur(
    brush: Brush, field: str, value: object, classes: tuple[str, ...]
) -> None:
    def count(style: StreetStyle) -> int:
        ids = [LABEL[name] for name in classes]
        return sum(int(np.isin(draw_labels(brush, style, seed), ids).sum()) for seed in range(5))

    assert count(STYLE) > 0
    assert count(dataclasses.replace(STYLE, **{field: value})) == 0


def test_the_pavement_ends_behind_kerb_verge_and_walk() -> None:
    street = Street(left=-5.0, right=3.0, parking=(True, False), verge=(1.0, 0.0), walk=(2.0, 4.0), crossing=None)
    assert (street.kerb(-1), street.frontage(-1)) == (-5.0, -8.0)
    assert (street.kerb(1), street.frontage(1)) == (3.0, 7.0)
