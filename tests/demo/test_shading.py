"""Light, fog, shadows and patterns on the painted surfaces."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from cluda_cli.demo.canvas import HEIGHT, WIDTH, Camera, Canvas, Floats, Light, Look
from cluda_cli.demo.objects import LABEL
from cluda_cli.demo.shading import shade


def test_noise_is_standardised_and_repeats_without_seams(noise: Floats) -> None:
    assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=1e-4)
    seam = np.abs(noise[0] - noise[-1]).mean()
    assert seam < 1.5 * np.abs(np.diff(noise, axis=0)).mean()


def test_the_sky_turns_from_skyline_to_zenith(camera: Camera, light: Light, noise: Floats) -> None:
    image = shade(Canvas(camera, light, LABEL["sky"]).finish(), camera, light, noise, set())
    assert image[HEIGHT // 2 - 1, 9] == pytest.approx(np.array(light.skyline), abs=8)
    assert (np.diff(image[: HEIGHT // 2, 9, 0]) >= 0).all()


def make_street(camera: Camera, light: Light) -> Canvas:
    """A grey road with a wall in the middle of the view."""
    canvas = Canvas(camera, light, LABEL["sky"])
    canvas.paint([(-9, 0, 1), (9, 0, 1), (9, 0, 90), (-9, 0, 90)], LABEL["road"], Look((90.0, 90.0, 90.0)))
    canvas.paint([(0, 0, 5), (1, 0, 5), (1, 4, 5), (0, 4, 5)], LABEL["building"], Look((50.0, 50.0, 50.0)))
    return canvas


def test_fog_hides_distance(camera: Camera, light: Light, noise: Floats) -> None:
    weathers = (light, dataclasses.replace(light, fog=0.05))
    clear, fog = (
        shade(make_street(camera, weather).finish(), camera, weather, noise, set())[:, WIDTH // 2 - 9, 0]
        for weather in weathers
    )
    far, near = HEIGHT // 2 + 8, HEIGHT - 1  # 41 and 3.6 metres away
    assert (clear[far], clear[near]) == pytest.approx((90, 90), abs=1)
    assert fog[far] > 180
    assert 95 < fog[near] < 120


def test_shadows_fall_on_the_ground_only(camera: Camera, light: Light, noise: Floats) -> None:
    sunny = dataclasses.replace(light, sun=(0.6, 0.8, 0.0))
    canvas = make_street(camera, sunny)
    before = shade(canvas.finish(), camera, sunny, noise, {LABEL["road"]})
    canvas.cast_shadow([(0, 0, 5), (1, 0, 5), (1, 0, 6), (0, 0, 6)], 4.0)
    painting = canvas.finish()
    changed = np.abs(shade(painting, camera, sunny, noise, {LABEL["road"]}) - before).max(-1) > 1
    assert changed.sum() > 100
    assert (painting.make_labels()[changed] == LABEL["road"]).all()
    assert np.nonzero(changed)[1].mean() < WIDTH / 2  # away from a sun in the right


def test_pattern_of_windows_is_on_the_wall_only_and_blurs_to_its_mean_in_the_distance(
    camera: Camera, light: Light, noise: Floats
) -> None:
    def wall(distance: float) -> NDArray[np.float32]:
        canvas = Canvas(camera, light, LABEL["sky"])
        side = distance / 2
        corners = [(-side, -side, distance), (side, -side, distance), (side, side, distance), (-side, side, distance)]
        canvas.paint(corners, LABEL["building"], Look((200.0,) * 3, (100.0,) * 3, (1.0, 1.0), (0.5, 1.0)))
        image = shade(canvas.finish(), camera, light, noise, set())
        return image[HEIGHT // 2, WIDTH // 2 - 60 : WIDTH // 2 + 60, 0]

    assert (wall(8).min(), wall(8).max()) == pytest.approx((100, 200), abs=5)
    assert np.abs(wall(800) - 150).max() < 5
