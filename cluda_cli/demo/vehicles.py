"""Vehicles of the embedded dataset, made of boxes: body, cabin, windows, wheels, lamps.

Each `draw_` function draws one vehicle around x, z on the ground, metres; heading 0 drives away from the camera.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluda_cli.demo.canvas import Look, Point
from cluda_cli.demo.objects import LABEL, Brush, make_disc

_DETAIL = 45.0  # metres; lamps and wheels beyond are too small and left out


def make_box(
    width: float, bottom: float, top: float, back: float, front: float,
    rake: tuple[float, float] = (0.0, 0.0), lean: float = 0.0,
) -> dict[str, list[Point]]:  # fmt: skip
    """Five sides with corners in the order of `Canvas.paint`. The top is shorter by `rake` and narrower by `lean`."""
    x, tx, tb, tf = width / 2, width / 2 - lean, back + rake[0], front - rake[1]
    return {
        "rear": [(-x, bottom, back), (x, bottom, back), (tx, top, tb), (-tx, top, tb)],
        "front": [(x, bottom, front), (-x, bottom, front), (-tx, top, tf), (tx, top, tf)],
        "right": [(x, bottom, back), (x, bottom, front), (tx, top, tf), (tx, top, tb)],
        "left": [(-x, bottom, front), (-x, bottom, back), (-tx, top, tb), (-tx, top, tf)],
        "top": [(-tx, top, tb), (tx, top, tb), (tx, top, tf), (-tx, top, tf)],
    }


def cut_inset(side: Sequence[Point], left: float, right: float, bottom: float, top: float) -> list[Point]:
    """A part of a four-cornered side, in shares of its width and height."""

    def interpolate(across: float, up: float) -> Point:
        low = [a + across * (b - a) for a, b in zip(side[0], side[1], strict=True)]
        high = [a + across * (b - a) for a, b in zip(side[3], side[2], strict=True)]
        x, y, z = (a + up * (b - a) for a, b in zip(low, high, strict=True))
        return x, y, z

    return [interpolate(x, y) for x, y in ((left, bottom), (right, bottom), (right, top), (left, top))]


@dataclass(frozen=True)
class Vehicle:
    """A vehicle in its own axes: z forward, the origin on the ground below its middle."""

    brush: Brush
    label: int
    x: float
    z: float
    heading: float
    length: float
    width: float

    def place(self, points: Sequence[Point]) -> list[Point]:
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return [(self.x + x * cos + z * sin, y, self.z - x * sin + z * cos) for x, y, z in points]

    def paint_side(self, points: Sequence[Point], look: Look) -> None:
        self.brush.canvas.paint(self.place(points), self.label, look, outward=True)

    def paint_sides(self, body: Mapping[str, Sequence[Point]], look: Look) -> None:
        for points in body.values():
            self.paint_side(points, look)

    def paint_underside(self, height: float) -> None:
        """Paint shadow and underbody."""
        half, length = self.width / 2, self.length / 2
        base: list[Point] = [(-half, 0, -length), (half, 0, -length), (half, 0, length), (-half, 0, length)]
        self.brush.canvas.cast_shadow(self.place(base), height)
        body = make_box(self.width * 0.92, 0.0, 0.4, -length * 0.94, length * 0.94)
        self.paint_sides(body, Look(self.brush.pick_color("tyre")))

    def paint_wheels(self, radius: float, axles: Sequence[float]) -> None:
        if self.z > _DETAIL:
            return
        tyre, rim = Look(self.brush.pick_color("tyre")), Look(self.brush.pick_color("rim"))
        for axle in axles:
            for side in (-1, 1):
                for size, look in ((radius, tyre), (radius * 0.55, rim)):
                    outline = make_disc((side * axle * self.length / 2, radius), size)
                    self.paint_side([(side * self.width / 2, y, side * z) for z, y in outline], look)

    def paint_lamps(self, body: Mapping[str, Sequence[Point]], bottom: float, top: float) -> None:
        if self.z > _DETAIL:
            return
        for end, name in (("rear", "rear lamp"), ("front", "head lamp")):
            for left, right in ((0.03, 0.2), (0.8, 0.97)):
                self.paint_side(cut_inset(body[end], left, right, bottom, top), Look(self.brush.pick_color(name)))
            self.paint_side(cut_inset(body[end], 0.36, 0.64, 0.15, 0.38), Look(self.brush.pick_color("plate")))


def draw_car(brush: Brush, x: float, z: float, heading: float) -> None:
    """Draw a body and a cabin, from saloon to van."""
    pick, paint = brush.random, Look(brush.pick_color("paint"), grain=0.03, scale=2.0)
    length, height, rear_rake = pick.uniform(3.8, 4.7), pick.uniform(1.4, 1.75), pick.uniform(0.1, 0.9)
    vehicle = Vehicle(brush, LABEL["car"], x, z, heading, length, pick.uniform(1.7, 1.85))
    half, belt = length / 2, height * 0.58
    body = make_box(vehicle.width, 0.25, belt, -half, half, rake=(0.08, 0.15), lean=0.05)
    start = -half + (0.6 if rear_rake > 0.6 else 0.12)
    cabin = make_box(vehicle.width * 0.92, belt, height, start, half * 0.48, rake=(rear_rake * 0.7, 0.75), lean=0.17)
    vehicle.paint_underside(height)
    vehicle.paint_sides(body, paint)
    vehicle.paint_wheels(0.33, (-0.62, 0.62))
    vehicle.paint_lamps(body, 0.5, 0.85)
    vehicle.paint_sides(cabin, paint)
    glass = Look(brush.pick_color("glass"))
    for end in ("rear", "front"):
        vehicle.paint_side(cut_inset(cabin[end], 0.07, 0.93, 0.1, 0.88), glass)
    for end in ("left", "right"):
        for left, right in ((0.08, 0.48), (0.53, 0.93)):
            vehicle.paint_side(cut_inset(cabin[end], left, right, 0.12, 0.86), glass)


def draw_truck(brush: Brush, x: float, z: float, heading: float) -> None:
    """Draw a cab and a ribbed load."""
    pick, paint, cargo = brush.random, Look(brush.pick_color("paint")), brush.pick_color("cargo")
    length, height = pick.uniform(6.0, 8.5), pick.uniform(2.8, 3.5)
    vehicle = Vehicle(brush, LABEL["truck"], x, z, heading, length, pick.uniform(2.2, 2.45))
    half, glass = length / 2, Look(brush.pick_color("glass"))
    ribs = Look(cargo, (0.86 * cargo[0], 0.86 * cargo[1], 0.86 * cargo[2]), (0.6, 9.0), (0.12, 1.0))
    load = make_box(vehicle.width, 0.75, height, -half, half - 2.0)
    cab = make_box(vehicle.width * 0.94, 0.4, height * 0.82, half - 1.9, half, rake=(0.0, 0.25))

    def paint_load() -> None:
        vehicle.paint_sides(load, Look(cargo, grain=0.04, scale=3.0))
        for end in ("left", "right", "rear"):
            vehicle.paint_side(cut_inset(load[end], 0.04, 0.96, 0.06, 0.94), ribs)

    def paint_cab() -> None:
        vehicle.paint_sides(cab, paint)
        vehicle.paint_side(cut_inset(cab["front"], 0.08, 0.92, 0.5, 0.9), glass)
        for end in ("left", "right"):
            vehicle.paint_side(cut_inset(cab[end], 0.35, 0.88, 0.5, 0.88), glass)

    vehicle.paint_underside(height)
    for part in (paint_load, paint_cab) if math.cos(heading) < 0 else (paint_cab, paint_load):
        part()
    bumper = make_box(vehicle.width * 0.95, 0.4, 0.75, -half, half)
    vehicle.paint_side(bumper["rear"], Look(brush.pick_color("tyre")))
    vehicle.paint_lamps(bumper, 0.2, 0.9)
    vehicle.paint_wheels(0.48, (-0.7, -0.35, 0.68))


def draw_bus(brush: Brush, x: float, z: float, heading: float) -> None:
    """Draw a long box with a band of windows and a display above."""
    pick, paint = brush.random, brush.pick_color("bus")
    vehicle = Vehicle(brush, LABEL["bus"], x, z, heading, pick.uniform(9.0, 11.5), 2.5)
    half, glass, height = vehicle.length / 2, brush.pick_color("glass"), pick.uniform(2.9, 3.2)
    body = make_box(vehicle.width, 0.3, height, -half, half, lean=0.05)
    vehicle.paint_underside(height)
    vehicle.paint_sides(body, Look(paint, grain=0.03, scale=3.0))
    panes = Look(paint, glass, (1.4, 9.0), (0.9, 1.0))
    for end in ("left", "right"):
        vehicle.paint_side(cut_inset(body[end], 0.03, 0.97, 0.42, 0.85), panes)
        vehicle.paint_side(cut_inset(body[end], 0.0, 1.0, 0.2, 0.27), Look(brush.pick_color("stripe")))
    vehicle.paint_side(cut_inset(body["front"], 0.05, 0.95, 0.35, 0.82), Look(glass))
    vehicle.paint_side(cut_inset(body["rear"], 0.12, 0.88, 0.5, 0.82), Look(glass))
    display = Look((30, 30, 30), (250, 170, 40), (0.22, 0.3), (0.6, 0.6))
    for end in ("front", "rear"):
        vehicle.paint_side(cut_inset(body[end], 0.2, 0.8, 0.86, 0.96), display)
    vehicle.paint_lamps(make_box(vehicle.width, 0.35, 1.1, -half, half), 0.45, 0.8)
    vehicle.paint_wheels(0.48, (-0.55, 0.6))
