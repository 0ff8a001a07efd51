"""The things that stand in a street of the embedded dataset: people, two-wheelers, plants, lamps, signs.

Each `draw_` function draws one thing, far parts first, at x, z on the ground. Lengths are metres.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.demo.canvas import Canvas, Look, Rgb

LABEL = {row.name: row.label_id for row in CITYSCAPES}
UNLABELLED = 0
_DETAIL = 45.0  # metres; beyond, crowns have fewer leaves

Flat = tuple[float, float]
Palette = Mapping[str, Sequence[Rgb]]


@dataclass(frozen=True)
class Brush:
    """What is needed to draw a thing."""

    canvas: Canvas
    random: random.Random
    palette: Palette

    def pick_color(self, name: str) -> Rgb:
        """One of the colours of this name, varied at random."""
        vary, (red, green, blue) = self.random.uniform, self.random.choice(self.palette[name])
        light = vary(0.83, 1.17)
        return light * red, light * green * vary(0.93, 1.07), light * blue * vary(0.93, 1.07)

    def paint_board(self, x: float, z: float, points: Sequence[Flat], label: int, look: Look) -> None:
        """Paint a flat shape that faces the camera. Its points are right and up of the place."""
        self.canvas.paint([(x + right, up, z) for right, up in points], label, look)

    def cast_shadow(self, x: float, z: float, radius: float, height: float) -> None:
        self.canvas.cast_shadow([(x + a, 0.0, z + b) for a, b in make_disc((0, 0), radius, corners=6)], height)


def make_disc(center: Flat, radius: float, squash: float = 1.0, corners: int = 12) -> list[Flat]:
    turn = 2 * math.pi / corners
    return [
        (center[0] + squash * radius * math.cos(i * turn), center[1] + radius * math.sin(i * turn))
        for i in range(corners)
    ]


def make_limb(start: Flat, end: Flat, width: float) -> list[Flat]:
    dx, dy = end[0] - start[0], end[1] - start[1]
    scale = width / 2 / max(math.hypot(dx, dy), 1e-6)
    nx, ny = -dy * scale, dx * scale
    (a, b), (c, d) = start, end
    return [(a + nx, b + ny), (c + nx, d + ny), (c - nx, d - ny), (a - nx, b - ny)]


def make_rectangle(left: float, bottom: float, right: float, top: float) -> list[Flat]:
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def draw_person(brush: Brush, x: float, z: float) -> None:
    """Draw a person on foot."""
    pick = brush.random
    size, stride = pick.choice((0.65, 0.92, 1.0, 1.0, 1.06)), pick.uniform(0.02, 0.3)
    trousers, shoes = Look(brush.pick_color("trousers")), Look(brush.pick_color("tyre"))
    brush.cast_shadow(x, z, 0.25 * size, 1.7 * size)

    def paint_part(points: Sequence[Flat], look: Look) -> None:
        brush.paint_board(x, z, [(size * a, size * b) for a, b in points], LABEL["person"], look)

    for foot in (-stride, stride):
        paint_part(make_limb((foot * 0.3, 0.88), (foot, 0.04), 0.19), trousers)
        paint_part(make_rectangle(foot - 0.1, 0.0, foot + 0.13, 0.09), shoes)
    _draw_upper_body(brush, paint_part, 0.0, 0.82, pick.uniform(-0.25, 0.25))


def _draw_upper_body(
    brush: Brush, paint: Callable[[Sequence[Flat], Look], None], x: float, hip: float, reach: float
) -> None:
    """Draw torso, arms and head above the hip, the hands `reach` in front."""
    shirt, skin = Look(brush.pick_color("shirt")), Look(brush.pick_color("skin"))
    paint([(x - 0.17, hip), (x + 0.17, hip), (x + 0.24, hip + 0.6), (x - 0.24, hip + 0.6)], shirt)
    for shoulder in (-0.25, 0.25):
        hand = (x + shoulder * 1.1 + reach, hip + 0.05)
        paint(make_limb((x + shoulder, hip + 0.56), hand, 0.12), shirt)
        paint(make_disc(hand, 0.06, corners=6), skin)
    paint(make_disc((x, hip + 0.76), 0.125), skin)
    paint([p for p in make_disc((x, hip + 0.78), 0.135) if p[1] > hip + 0.775], Look(brush.pick_color("hair")))


def draw_two_wheeler(brush: Brush, x: float, z: float, squash: float, kind: str, ridden: bool) -> None:
    """Draw a bicycle or motorcycle, seen from the side (`squash` 1) to nearly from behind (0.3)."""
    heavy, facing = kind == "motorcycle", brush.random.choice((-1, 1))
    tyre, rim, frame = Look(brush.pick_color("tyre")), Look(brush.pick_color("rim")), Look(brush.pick_color("frame"))
    radius, base = (0.33, 0.7) if heavy else (0.36, 0.55)
    brush.cast_shadow(x, z, 0.5 * squash, 1.6 if ridden else 0.9)

    def paint_part(points: Sequence[Flat], look: Look, name: str = kind) -> None:
        brush.paint_board(x, z, [(facing * squash * a, b) for a, b in points], LABEL[name], look)

    for axle in (-base, base):
        paint_part(make_disc((axle, radius), radius), tyre)
        paint_part(make_disc((axle, radius), radius * (0.5 if heavy else 0.78)), rim)
        paint_part(make_disc((axle, radius), radius * (0.3 if heavy else 0.12)), tyre)
    if heavy:
        paint_part([(-0.75, 0.72), (-0.3, 0.38), (0.3, 0.32), (0.55, 0.75), (0.3, 1.0), (-0.1, 0.8)], frame)
        paint_part([(-0.85, 0.85), (-0.1, 0.76), (-0.05, 0.9), (-0.8, 0.98)], tyre)
        paint_part(make_limb((base, radius), (0.42, 1.1), 0.12), tyre)
        paint_part(make_disc((0.55, 0.92), 0.14), Look(brush.pick_color("head lamp")))
    else:
        saddle, pedals, head = (-0.15, 0.8), (-0.05, 0.32), (0.4, 0.85)
        tubes = (((-base, radius), saddle), (pedals, saddle), (pedals, head), (saddle, head), ((base, radius), head))
        for start, end in tubes:
            paint_part(make_limb(start, end, 0.09), frame)
        paint_part(make_limb(head, (0.36, 1.05), 0.09), frame)
        paint_part(make_rectangle(-0.33, 0.93, -0.05, 1.01), tyre)
        paint_part(make_limb((0.25, 1.08), (0.45, 1.05), 0.09), tyre)
    if ridden:
        trousers = Look(brush.pick_color("trousers"))
        paint_part(make_limb((-0.18, 0.95), (0.2, 0.72), 0.2), trousers, "rider")
        paint_part(make_limb((0.2, 0.74), (0.02, 0.25), 0.16), trousers, "rider")

        def paint_leaning(points: Sequence[Flat], look: Look) -> None:
            paint_part([(a + 0.3 * (b - 0.9), b) for a, b in points], look, "rider")

        _draw_upper_body(brush, paint_leaning, -0.15, 0.9, 0.35)
        paint_part(make_disc((0.1, 1.72), 0.15), Look(brush.pick_color("helmet")), "rider")


def draw_tree(brush: Brush, x: float, z: float, height: float, radius: float) -> None:
    """Draw trunk and crown, both vegetation."""
    pick, trunk = brush.random, height * brush.random.uniform(0.35, 0.5)
    brush.cast_shadow(x, z, radius * 0.8, height)
    bark = Look(brush.pick_color("trunk"), grain=0.15, scale=0.5)
    brush.paint_board(x, z, [(-0.16, 0), (0.16, 0), (0.1, trunk + 0.5), (-0.1, trunk + 0.5)], LABEL["vegetation"], bark)
    green = brush.pick_color("vegetation")
    clumps = 5 if z < _DETAIL else 3
    for i in range(clumps):
        size = radius * pick.uniform(0.5, 0.75)
        center = (pick.uniform(-0.5, 0.5) * radius, trunk + size + (height - trunk - 2 * size) * i / (clumps - 1))
        draw_foliage(brush, x, z, center, size, green, 0.72 + 0.4 * i / (clumps - 1))


def draw_foliage(brush: Brush, x: float, z: float, center: Flat, size: float, green: Rgb, light: float) -> None:
    """Draw a ragged clump of leaves."""
    pick, corners = brush.random, 18 if z < _DETAIL else 10
    outline = []
    for i in range(corners):
        reach, angle = size * pick.uniform(0.82, 1.14), 2 * math.pi * i / corners
        outline.append((center[0] + reach * math.cos(angle), max(center[1] + reach * math.sin(angle), 0.0)))
    shade = (green[0] * light, green[1] * light, green[2] * light)
    brush.paint_board(x, z, outline, LABEL["vegetation"], Look(shade, grain=0.2, scale=1.2))


def draw_hedge(brush: Brush, x: float, z: float, width: float, height: float) -> None:
    green = brush.pick_color("vegetation")
    for i in range(3):
        draw_foliage(brush, x, z, ((i - 1) * width / 3, height * 0.45), height * 0.55, green, 0.75 + 0.1 * i)


def draw_lamp_post(brush: Brush, x: float, z: float, height: float) -> None:
    """Draw a street lamp, whose arm reaches over the road."""
    metal, width, arm = Look(brush.pick_color("pole")), brush.random.uniform(0.16, 0.24), math.copysign(1.4, -x)
    brush.cast_shadow(x, z, 0.1, height)
    brush.paint_board(x, z, make_rectangle(-width / 2, 0, width / 2, height), LABEL["pole"], metal)
    brush.paint_board(x, z, make_limb((0, height - 0.1), (arm, height + 0.15), 0.14), LABEL["pole"], metal)


def draw_traffic_light(brush: Brush, x: float, z: float) -> None:
    pick, top = brush.random, brush.random.uniform(3.0, 3.6)
    brush.cast_shadow(x, z, 0.15, top)
    brush.paint_board(x, z, make_rectangle(-0.08, 0, 0.08, top), LABEL["pole"], Look(brush.pick_color("pole")))
    label, lit, housing = LABEL["traffic light"], pick.randrange(3), Look(brush.pick_color("light housing"))
    brush.paint_board(x, z, make_rectangle(-0.24, top - 1.15, 0.24, top), label, housing)
    for i, glow in enumerate(((255, 50, 40), (255, 190, 40), (60, 235, 120))):
        share = 1.0 if i == lit else 0.25
        color = (glow[0] * share, glow[1] * share, glow[2] * share)
        brush.paint_board(x, z, make_disc((0, top - 0.2 - 0.37 * i), 0.15, corners=9), label, Look(color))


def draw_traffic_sign(brush: Brush, x: float, z: float) -> None:
    """Draw a sign of one of six shapes on its pole."""
    pick, top, size = brush.random, brush.random.uniform(2.2, 2.9), brush.random.uniform(0.4, 0.52)
    brush.cast_shadow(x, z, 0.15, top)
    brush.paint_board(x, z, make_rectangle(-0.06, 0, 0.06, top), LABEL["pole"], Look(brush.pick_color("pole")))
    red, white, blue, yellow = (brush.pick_color(f"sign {name}") for name in ("red", "white", "blue", "yellow"))
    triangle = [(-0.95, -0.6), (0.95, -0.6), (0.0, 1.05)]
    shapes: list[tuple[list[Flat], Rgb, Rgb, float]] = [
        (make_disc((0, 0), 1.0, corners=14), red, white, 0.7),
        (triangle, red, white, 0.6),
        (make_disc((0, 0), 1.0, corners=8), white, red, 0.87),
        (make_disc((0, 0), 1.0, corners=14), blue, white, 0.45),
        (make_disc((0, 0), 1.1, corners=4), white, yellow, 0.75),
        (make_rectangle(-1.5, -0.6, 1.5, 0.6), white, blue, 0.85),
    ]
    outline, rim, middle, share = pick.choice(shapes)
    for scale, color in ((size, rim), (size * share, middle)):
        points = [(a * scale, top + b * scale) for a, b in outline]
        brush.paint_board(x, z, points, LABEL["traffic sign"], Look(color))


def draw_litter_bin(brush: Brush, x: float, z: float) -> None:
    """Draw a litter bin, which is unlabelled."""
    brush.cast_shadow(x, z, 0.3, 0.9)
    brush.paint_board(x, z, make_rectangle(-0.28, 0, 0.28, 0.9), UNLABELLED, Look(brush.pick_color("bin")))
    brush.paint_board(x, z, make_rectangle(-0.32, 0.9, 0.32, 1.0), UNLABELLED, Look(brush.pick_color("tyre")))
