"""Polygons on the canvas: exact labels, what hides what, and what the camera does not see."""

import numpy as np
import pytest

from cluda_cli.demo.canvas import FINE, HEIGHT, WIDTH, Camera, Canvas, Floats, Light, Look
from cluda_cli.demo.objects import LABEL
from cluda_cli.demo.shading import shade

GREY = Look((90.0, 90.0, 90.0))


def test_labels_follow_the_outlines_of_the_image(camera: Camera, light: Light, noise: Floats) -> None:
    canvas = Canvas(camera, light, LABEL["sky"])
    canvas.paint([(-1, 0.5, 5), (1, 0.5, 5), (1, 2.5, 5), (-1, 2.5, 5)], LABEL["car"], Look((255.0, 0.0, 0.0)))
    scene = canvas.finish()
    red = shade(scene, camera, light, noise, {LABEL["road"]})
    car = scene.make_labels() == LABEL["car"]
    inside = (red[..., 0] > 250) & (red[..., 1] < 5)
    assert car.sum() == pytest.approx((2 / 5 * 0.8 * WIDTH) ** 2, rel=0.05)
    assert (inside & ~car).sum() == 0
    assert (car & ~inside).sum() <= 4 * np.sqrt(car.sum())  # only the smoothed rim


def test_nearer_things_hide_farther_ones_and_what_is_behind_the_camera_is_cut(camera: Camera, light: Light) -> None:
    canvas = Canvas(camera, light, LABEL["sky"])
    canvas.paint([(-3, 0, -5), (3, 0, -5), (3, 0, 50), (-3, 0, 50)], LABEL["road"], Look((90.0, 90.0, 90.0)))
    canvas.paint([(-1, 0, -9), (1, 0, -9), (1, 3, -9), (-1, 3, -9)], LABEL["bus"], Look((0.0, 0.0, 0.0)))
    canvas.paint([(-1, 0, 6), (1, 0, 6), (1, 1, 6), (-1, 1, 6)], LABEL["car"], Look((0.0, 0.0, 0.0)))
    labels = canvas.finish().make_labels()
    assert not (labels == LABEL["bus"]).any()
    assert (labels[-1] == LABEL["road"]).all()
    assert (labels[0] == LABEL["sky"]).all()
    assert labels[HEIGHT // 2 + 30, WIDTH // 2] == LABEL["car"]


def test_with_outward_only_the_side_towards_the_camera_is_painted(camera: Camera, light: Light) -> None:
    corners = [(-1.0, 0.0, 6.0), (1.0, 0.0, 6.0), (1.0, 1.0, 6.0), (-1.0, 1.0, 6.0)]
    canvas = Canvas(camera, light, LABEL["sky"])
    canvas.paint(corners[::-1], LABEL["car"], GREY, outward=True)
    assert canvas.finish().labels == [LABEL["sky"]]
    canvas.paint(corners, LABEL["car"], GREY, outward=True)
    assert canvas.finish().labels == [LABEL["sky"], LABEL["car"]]


def test_a_camera_turned_right_sees_things_farther_left(light: Light) -> None:
    columns = []
    for yaw in (0.0, 0.1):
        canvas = Canvas(Camera(1.5, 0.5, 0.8, yaw), light, LABEL["sky"])
        canvas.paint([(-1, 0, 6), (1, 0, 6), (1, 1, 6), (-1, 1, 6)], LABEL["car"], GREY)
        columns.append(np.nonzero(canvas.finish().make_labels() == LABEL["car"])[1].mean())
    assert columns[0] - columns[1] == pytest.approx(np.tan(0.1) * 0.8 * WIDTH, rel=0.05)


def test_sizes(camera: Camera, light: Light) -> None:
    painting = Canvas(camera, light, LABEL["sky"]).finish()
    assert painting.index.shape == (FINE * HEIGHT, FINE * WIDTH)
    assert painting.make_labels().shape == painting.shadow.shape == (HEIGHT, WIDTH)
