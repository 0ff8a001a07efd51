"""The layout of the streets of the embedded dataset: ground, both frontages, and what stands and drives between them.

World axes as in `canvas.py`: x right, z forward, the camera above the origin, metres.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluda_cli.demo import objects, vehicles
from cluda_cli.demo.canvas import Look
from cluda_cli.demo.houses import Range, draw_backdrop, draw_frontage
from cluda_cli.demo.objects import LABEL, Brush

_END = 100.0  # the street ends in a backdrop beyond
_BEHIND = -4.0
_WIDE = 200.0
_LANE = 3.2
_PARKING = 2.2
_QUEUE_END = 65.0
_ROW_END = 70.0
_VEHICLES = (vehicles.draw_car, vehicles.draw_truck, vehicles.draw_bus)
_HALF_LENGTHS = (2.3, 4.2, 5.7)  # of these vehicles

# Distance of the near side, the function that draws it, the arguments of that function after the brush.
Thing = tuple[float, Callable[..., None], tuple[Any, ...]]


@dataclass(frozen=True)
class StreetStyle:
    """Layout of the streets of a domain. Ranges are drawn from once per image or thing."""

    camera_height: Range
    horizon: Range
    focal: Range
    yaw: float
    """Largest turn of the camera, radians."""
    gap: Range
    """Metres between vehicles of one lane."""
    heavy: float
    """Share of trucks, and of buses."""
    people: Range
    """People on foot."""
    two_wheelers: Range
    greenery: float
    """Share of frontages without a building."""
    building_height: Range
    crossing: float
    """Share of streets with a side street in view."""


@dataclass(frozen=True)
class Street:
    """The ground plan of one image."""

    left: float
    """x of the left kerb, negative."""
    right: float
    parking: tuple[bool, bool]
    verge: tuple[float, float]
    """Width of the strips of grass left and right; 0 for none."""
    walk: tuple[float, float]
    crossing: Range | None
    """z range of a side street."""

    def kerb(self, side: int) -> float:
        return self.left if side < 0 else self.right

    def frontage(self, side: int) -> float:
        """x of the end of the pavement."""
        i = (side + 1) // 2
        return self.kerb(side) + side * (self.verge[i] + self.walk[i])


def draw_street(brush: Brush, style: StreetStyle) -> None:
    """Draw one whole scene, far to near."""
    street = _choose_street(brush, style)
    _paint_ground(brush, street)
    draw_backdrop(brush, _END + 40, style.greenery, style.building_height)
    for side in (-1, 1):
        x, reach = street.frontage(side), (_BEHIND, _END)
        draw_frontage(brush, side, x, reach, street.crossing, style.greenery, style.building_height)
    # The camera is over the road, so a farther thing on road or pavement never hides a nearer one.
    things = [*_plan_pavement(brush, style, street), *_plan_traffic(brush, style, street)]
    for _, draw, arguments in sorted(things, key=lambda thing: -thing[0]):
        draw(brush, *arguments)


def _choose_street(brush: Brush, style: StreetStyle) -> Street:
    pick = brush.random
    parking = (pick.random() < 0.5, pick.random() < 0.6)
    start = pick.uniform(18, 40)
    return Street(
        left=-_LANE * (0.5 + pick.choice((1, 1, 2))) - _PARKING * parking[0],
        right=_LANE * 0.55 + _PARKING * parking[1],
        parking=parking,
        verge=(pick.choice((0, 0, 1.8)), pick.choice((0, 0, 1.8))),
        walk=(pick.uniform(2, 4.5), pick.uniform(2, 4.5)),
        crossing=(start, start + 7) if pick.random() < style.crossing else None,
    )


def _paint_strip(brush: Brush, x0: float, x1: float, z0: float, z1: float, label: str, look: Look) -> None:
    brush.canvas.paint([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], LABEL[label], look)


def _paint_ground(brush: Brush, street: Street) -> None:
    tarmac = Look(brush.pick_color("road"), grain=0.1, scale=1.5)
    kerb = Look(brush.pick_color("kerb"))
    joint, slab = brush.pick_color("joint"), brush.pick_color("sidewalk")
    paving = Look(joint, slab, (1.2, 1.2), (0.94, 0.94), bond=0.5, grain=0.07, scale=2.0)
    grass = Look(brush.pick_color("terrain"), grain=0.16, scale=2.0)
    _paint_strip(brush, -_WIDE, _WIDE, _BEHIND, _WIDE * 3, "terrain", grass)
    for side, verge, walk in zip((-1, 1), street.verge, street.walk, strict=True):
        edge = street.kerb(side)
        _paint_strip(brush, edge, edge + side * (verge + walk), _BEHIND, _END, "sidewalk", paving)
        if verge:
            _paint_strip(brush, edge + side * 0.3, edge + side * verge, _BEHIND, _END, "terrain", grass)
        _paint_strip(brush, edge, edge + side * 0.25, _BEHIND, _END, "sidewalk", kerb)
    if street.crossing:
        near, far = street.crossing
        for strip in ((near - 3, near), (far, far + 3)):
            _paint_strip(brush, -_WIDE, _WIDE, *strip, "sidewalk", paving)
        _paint_strip(brush, -_WIDE, _WIDE, near, far, "road", tarmac)
    _paint_strip(brush, street.left, street.right, _BEHIND, _END * 1.2, "road", tarmac)
    _paint_markings(brush, street)


def _paint_markings(brush: Brush, street: Street) -> None:
    """Paint dashes between lanes, solid lines at parked rows, a zebra crossing before the side street."""
    white = Look(brush.pick_color("marking"), grain=0.1, scale=1.0)
    offset = brush.random.uniform(0, 6)
    lines = [-_LANE * (i + 0.5) for i in range(int(-street.left / _LANE))]
    stop = street.crossing[0] - 1.5 if street.crossing else _END
    for x in lines:
        for i in range(-1, 9):
            start = offset + 6 * i
            if not street.crossing or start + 3 < stop or start > street.crossing[1]:
                _paint_strip(brush, x - 0.08, x + 0.08, start, start + 3, "road", white)
    for parked, x in zip(street.parking, (street.left + _PARKING, street.right - _PARKING), strict=True):
        if parked:
            _paint_strip(brush, x - 0.07, x + 0.07, _BEHIND, stop, "road", white)
    if street.crossing and brush.random.random() < 0.7:
        x = street.left + 0.4
        while x < street.right - 0.5:
            _paint_strip(brush, x, x + 0.5, stop - 3, stop, "road", white)
            x += 1.0


def _plan_pavement(brush: Brush, style: StreetStyle, street: Street) -> list[Thing]:
    """Things and people beside the road."""
    pick = brush.random
    things: list[Thing] = []
    for side in (-1, 1):
        kerb, front = street.kerb(side), street.frontage(side)
        things += _plan_row(brush, kerb + side * 0.7)
        for _ in range(pick.choice((1, 2, 2, 3))):
            z = pick.uniform(6, 32)
            things.append((z, objects.draw_traffic_sign, (kerb + side * pick.uniform(0.4, 0.9), z)))
        if pick.random() < 0.25:
            z = pick.uniform(6, 25)
            things.append((z, objects.draw_litter_bin, (front - side * 0.6, z)))
        lights = [street.crossing[0] - 1] if street.crossing else []
        for z in lights + [pick.uniform(7, 22)] * (pick.random() < 0.45):
            things.append((z, objects.draw_traffic_light, (kerb + side * 0.5, z)))
        for _ in range(round(pick.uniform(*style.people) / 2)):
            z = 4.5 + 30 * pick.random() ** 1.5
            things.append((z, objects.draw_person, (pick.uniform(kerb + side * 0.5, front - side * 0.3), z)))
        for _ in range(round(pick.uniform(*style.two_wheelers) * 0.4)):
            z, kind = pick.uniform(5, 18), pick.choices(("bicycle", "motorcycle"), (3, 1))[0]
            things.append((z, objects.draw_two_wheeler, (kerb + side * 1.1, z, pick.uniform(0.45, 1), kind, False)))
    return things


def _plan_row(brush: Brush, x: float) -> list[Thing]:
    """Street lamps or trees at even distances, or nothing."""
    pick = brush.random
    kind, z, step = pick.choices(("lamps", "trees", ""), (4, 3, 2))[0], pick.uniform(5, 16), pick.uniform(9, 16)
    places = [z + i * step for i in range(int((_ROW_END - z) / step) + 1)]
    if kind == "lamps":
        return [(z, objects.draw_lamp_post, (x, z, pick.uniform(6, 8.5))) for z in places]
    if kind == "trees":
        return [(z, objects.draw_tree, (x, z, pick.uniform(4.5, 7.5), pick.uniform(1.3, 2.2))) for z in places]
    return []


def _plan_traffic(brush: Brush, style: StreetStyle, street: Street) -> list[Thing]:
    """Vehicles, two-wheelers and people on the road."""
    pick = brush.random
    things: list[Thing] = []
    lanes = [(0.0, 0.0), *((-_LANE * (i + 1), math.pi) for i in range(int(-street.left / _LANE - 0.4)))]
    for x, heading in lanes:
        start = pick.uniform(8, 18) if x == 0 else pick.uniform(4, 14)
        things += _plan_queue(brush, x, heading, start, style.gap, style.heavy)
    parked = ((street.parking[0], street.left + 1.15, math.pi), (street.parking[1], street.right - 1.15, 0.0))
    for occupied, x, heading in parked:
        if occupied:
            things += _plan_queue(brush, x, heading, pick.uniform(4, 14), (0.8, 5), style.heavy / 10)
    edges = (
        street.left + _PARKING * street.parking[0] + 0.5,
        -_LANE / 2,
        street.right - _PARKING * street.parking[1] - 0.5,
    )
    for _ in range(round(pick.uniform(*style.two_wheelers))):
        z, kind, ridden = pick.uniform(5, 20), pick.choices(("bicycle", "motorcycle"), (5, 4))[0], pick.random() < 0.85
        things.append((z, objects.draw_two_wheeler, (pick.choice(edges), z, pick.uniform(0.35, 0.8), kind, ridden)))
    if street.crossing and pick.random() < 0.6:
        z, heading = street.crossing[0] + pick.choice((1.8, 5.0)), pick.choice((-1, 1)) * math.pi / 2
        things.append((z - 1.2, _choose_vehicle(brush, style.heavy), (pick.uniform(-12, 8), z, heading)))
    if pick.random() < 0.3:
        z = street.crossing[0] - 3 if street.crossing else pick.uniform(8, 20)
        for _ in range(pick.choice((1, 2, 3))):
            things.append((z, objects.draw_person, (pick.uniform(street.left + 1, street.right - 1), z)))
    return things


def _plan_queue(brush: Brush, x: float, heading: float, z: float, gap: Range, heavy: float) -> list[Thing]:
    """Vehicles one behind the other."""
    pick = brush.random
    things: list[Thing] = []
    while z < _QUEUE_END:
        vehicle = _choose_vehicle(brush, heavy)
        half = _HALF_LENGTHS[_VEHICLES.index(vehicle)]
        things.append((z, vehicle, (x + pick.gauss(0, 0.12), z + half, heading + pick.gauss(0, 0.02))))
        z += 2 * half + pick.uniform(*gap)
    return things


def _choose_vehicle(brush: Brush, heavy: float) -> Callable[..., None]:
    return brush.random.choices(_VEHICLES, (1 - 2 * heavy, heavy, heavy))[0]
