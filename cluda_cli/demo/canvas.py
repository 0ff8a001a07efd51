"""The canvas of the embedded dataset, part of a small deferred renderer.

Polygons are painted far to near into one map of surface numbers. A table of classes turns this map into labels, which
therefore fit the image to the pixel. `shading.py` turns it into colours, patterns, light and fog.

World axes: x right, y up, z forward, metres, the camera above the origin. H W size of the image, pixels; S surfaces.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

HEIGHT, WIDTH = 288, 432
FINE = 2  # the canvas is this much finer than the image, which smooths outlines
_NEAR = 0.4  # metres; nearer parts of polygons are cut off
SKY_DISTANCE = 2000.0
_FAINT = 0.012  # a shadow is left out if its strength times height is below this share of its distance

Floats = NDArray[np.float32]
Point = tuple[float, float, float]
Rgb = tuple[float, float, float]


class Look(NamedTuple):
    """The material of a surface. Distances are metres on the surface, colours 0..255."""

    color: Rgb
    accent: Rgb = (0.0, 0.0, 0.0)
    """Colour of the rectangles of the pattern: windows, bricks, tiles, gaps between bars."""
    pitch: tuple[float, float] = (1.0, 1.0)
    """Distance of the rectangles, along and across."""
    fill: tuple[float, float] = (0.0, 0.0)
    """Share of the pitch that a rectangle takes; 0 for no pattern."""
    bond: float = 0.0
    """Shift of every other row, in pitches."""
    glass: float = 0.0
    """1 if rectangles are window panes, which vary in brightness and may be lit."""
    grain: float = 0.0
    """Standard deviation of the noise, as a share of the brightness."""
    scale: float = 1.0
    """Size of the coarsest noise."""


@dataclass(frozen=True)
class Camera:
    """Position and lens."""

    height: float
    """Metres above the road."""
    horizon: float
    """Row of the horizon, 0 at the top to 1 at the bottom."""
    focal: float
    """Focal length in image widths."""
    yaw: float
    """Radians to the right."""


@dataclass(frozen=True)
class Light:
    """Light, sky and fog. Colours of light are factors around 1, those of sky and fog 0..255."""

    sun: Point
    """Unit vector towards the sun."""
    sun_color: Rgb
    ambient: Rgb
    shadow: float
    """Share of the light that a shadow takes from the ground."""
    zenith: Rgb
    skyline: Rgb
    fog: float
    """Extinction per metre; fog has the colour of the skyline."""
    grain: float
    """Factor on the grain of all looks."""
    lit: float
    """Share of lit windows."""


@dataclass(frozen=True)
class Painting:
    """The surfaces that a canvas shows. Surface 0 is the sky."""

    index: NDArray[np.intp]
    """Surface at each fine pixel, FINE*H FINE*W."""
    labels: list[int]
    looks: list[Look]
    frames: Floats
    """Origin, a point along u and a point towards v of each surface, in the camera's axes, S 3 3."""
    shadow: Floats
    """0 in the sun to 1 in shadow, for ground at every pixel, H W."""

    def reduce_index(self) -> NDArray[np.intp]:
        """Surface at each pixel of the image, H W."""
        return np.ascontiguousarray(self.index[FINE - 1 :: FINE, FINE - 1 :: FINE])

    def make_labels(self) -> NDArray[np.uint8]:
        """Label ids, H W."""
        return np.array(self.labels, np.uint8)[self.reduce_index()]


class Canvas:
    """Polygons are painted onto it, far to near."""

    def __init__(self, camera: Camera, light: Light, sky_label: int) -> None:
        self.camera, self.light = camera, light
        self._index = Image.new("I;16", (WIDTH * FINE, HEIGHT * FINE), 0)
        self._shadow = Image.new("L", (WIDTH, HEIGHT), 0)
        self._draw, self._draw_shadow = ImageDraw.Draw(self._index), ImageDraw.Draw(self._shadow)
        self._cos, self._sin = math.cos(camera.yaw), math.sin(camera.yaw)
        self._labels = [sky_label]
        self._looks = [Look(light.skyline, grain=0.03, scale=1500.0)]
        far = SKY_DISTANCE
        self._frames: list[tuple[Point, Point, Point]] = [((0.0, 0.0, far), (1.0, 0.0, far), (0.0, 1.0, far))]

    def paint(self, points: Sequence[Point], label: int, look: Look, outward: bool = False) -> None:
        """Paint a flat polygon. Its first edge is the pattern's u axis, its last edge the v axis.

        With `outward` it is painted only if the camera sees its corners as bottom left, bottom right, top right.
        """
        seen = [self.to_camera(p) for p in points]
        if outward and not _faces_camera(seen[0], seen[1], seen[2]):
            return
        outline = self._project(seen, FINE)
        if not outline:
            return
        self._draw.polygon(outline, fill=len(self._labels))
        self._labels.append(label)
        self._looks.append(look)
        self._frames.append((seen[0], seen[1], seen[-1]))

    def cast_shadow(self, base: Sequence[Point], height: float) -> None:
        """Darken the ground in the shadow of a thing of this height, metres, that stands on the polygon `base`."""
        if self.light.shadow * height < _FAINT * min(z for _, _, z in base):
            return
        reach = height / max(self.light.sun[1], 0.05)
        east, north = self.light.sun[0] * reach, self.light.sun[2] * reach
        near = [self.to_camera(p) for p in base]
        far = [self.to_camera((x - east, y, z - north)) for x, y, z in base]
        sides = [(near[i - 1], near[i], far[i], far[i - 1]) for i in range(len(base))]
        for polygon in (near, far, *sides):
            outline = self._project(polygon, 1)
            if outline:
                self._draw_shadow.polygon(outline, fill=255)

    def finish(self) -> "Painting":
        """The painted surfaces."""
        index = np.asarray(self._index).astype(np.intp)
        frames, shadow = np.array(self._frames, np.float32), self._shadow.filter(ImageFilter.BoxBlur(1))
        return Painting(index, self._labels, self._looks, frames, np.asarray(shadow, np.float32) / 255)

    def to_camera(self, point: Point) -> Point:
        x, y, z = point
        return x * self._cos - z * self._sin, y - self.camera.height, x * self._sin + z * self._cos

    def _project(self, points: Sequence[Point], zoom: int) -> list[tuple[float, float]]:
        """Pixels, zoomed, of the part of a polygon in front of the camera; empty if there is none."""
        front = points if min(p[2] for p in points) >= _NEAR else _cut_near(points)
        focal, x0, y0 = self.camera.focal * WIDTH * zoom, WIDTH / 2 * zoom, self.camera.horizon * HEIGHT * zoom
        return [(x0 + focal * x / z, y0 - focal * y / z) for x, y, z in front]


def _cut_near(points: Sequence[Point]) -> list[Point]:
    """The part of a polygon beyond the near plane."""
    kept: list[Point] = []
    for i, (x, y, z) in enumerate(points):
        px, py, pz = points[i - 1]
        if (z >= _NEAR) != (pz >= _NEAR):
            share = (_NEAR - pz) / (z - pz)
            kept.append((px + share * (x - px), py + share * (y - py), _NEAR))
        if z >= _NEAR:
            kept.append((x, y, z))
    return kept


def _faces_camera(a: Point, b: Point, c: Point) -> bool:
    (ux, uy, uz), (vx, vy, vz) = (b[0] - a[0], b[1] - a[1], b[2] - a[2]), (c[0] - b[0], c[1] - b[1], c[2] - b[2])
    return a[0] * (uy * vz - uz * vy) + a[1] * (uz * vx - ux * vz) + a[2] * (ux * vy - uy * vx) > 0
