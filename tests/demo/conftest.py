"""A camera on a straight road in even light, and what is needed to draw there."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.demo.canvas import Camera, Canvas, Floats, Light
from cluda_cli.demo.domains import DOMAINS
from cluda_cli.demo.objects import LABEL, Brush
from cluda_cli.demo.shading import make_noise


@pytest.fixture
def light() -> Light:
    return Light(
        sun=(0.0, 1.0, 0.0), sun_color=(0.0, 0.0, 0.0), ambient=(1.0, 1.0, 1.0), shadow=0.5,
        zenith=(90.0, 150.0, 220.0), skyline=(200.0, 220.0, 240.0), fog=0.0, grain=0.0, lit=0.0,
    )  # fmt: skip


@pytest.fixture
def camera() -> Camera:
    return Camera(height=1.5, horizon=0.5, focal=0.8, yaw=0.0)


@pytest.fixture(scope="session")
def noise() -> Floats:
    return make_noise(np.random.default_rng(0))


@pytest.fixture
def brush(camera: Camera, light: Light) -> Brush:
    """A brush on a canvas that shows nothing but sky."""
    return Brush(Canvas(camera, light, LABEL["sky"]), random.Random(0), DOMAINS["render"].palette)


@pytest.fixture
def painted(brush: Brush) -> Callable[[], set[str]]:
    """The names of the classes that the brush has painted so far."""
    names = {row.label_id: row.name for row in CITYSCAPES} | {0: "unlabelled"}
    return lambda: {names[i] for i in np.unique(brush.canvas.finish().make_labels()).tolist()} - {"sky"}
