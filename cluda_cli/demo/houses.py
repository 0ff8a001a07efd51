"""Both sides of the streets of the embedded dataset: houses, gardens with walls, fences and hedges, a far backdrop."""

from collections.abc import Mapping, Sequence

from cluda_cli.demo import objects
from cluda_cli.demo.canvas import Look, Point
from cluda_cli.demo.objects import LABEL, Brush, make_rectangle
from cluda_cli.demo.vehicles import cut_inset, make_box

Range = tuple[float, float]
_DEPTH = 12.0  # metres from the street to the back of a house
_FAR = 40.0  # metres; gardens beyond have fewer trees


def draw_backdrop(brush: Brush, z: float, greenery: float, heights: Range) -> None:
    """Draw a far row of houses and trees, so that the street does not end in the sky."""
    pick, x = brush.random, -170.0
    while x < 170:
        width = pick.uniform(9, 22)
        if pick.random() < greenery + 0.25:
            objects.draw_hedge(brush, x, z + 5, width * 1.4, pick.uniform(6, 13))
        else:
            outline = make_rectangle(-width / 2, 0, width / 2, pick.uniform(*heights))
            brush.paint_board(x, z, outline, LABEL["building"], _choose_facade(brush, width))
        x += width * 0.8


def draw_frontage(
    brush: Brush, side: int, x: float, reach: Range, crossing: Range | None, greenery: float, heights: Range
) -> None:
    """Draw one side (-1 left, 1 right) of the street, from x outward, over the z range `reach`, far to near."""
    pick = brush.random
    for start, end in reversed(_plan_plots(brush, reach, crossing)):
        if pick.random() < greenery:
            _draw_garden(brush, x, side, start, end)
        else:
            _draw_house(brush, pick.uniform(*heights), x, side, start, end)


def _plan_plots(brush: Brush, reach: Range, crossing: Range | None) -> list[Range]:
    """z ranges of the plots, none on the side street."""
    pick, plots, z = brush.random, [], reach[0]
    gap = (crossing[0] - 3, crossing[1] + 3) if crossing else (reach[1] + 99, reach[1] + 99)
    while z < reach[1]:
        end = z + pick.uniform(8, 18)
        if z < gap[1] and end > gap[0]:
            if gap[0] > z + 2:
                plots.append((z, gap[0]))
            z = gap[1]
            continue
        plots.append((z, end))
        z = end + (pick.uniform(1, 4) if pick.random() < 0.3 else 0)
    return plots


def _choose_facade(brush: Brush, length: float) -> Look:
    pick = brush.random
    pitch = (length / max(round(length / pick.uniform(2.2, 3.4)), 1), pick.uniform(2.8, 3.3))
    fill = (pick.uniform(0.35, 0.62), pick.uniform(0.45, 0.62))
    return Look(brush.pick_color("building"), brush.pick_color("window"), pitch, fill, glass=1.0, grain=0.09, scale=5.0)


def _draw_house(brush: Brush, height: float, x: float, side: int, start: float, end: float) -> None:
    facade, street_side, far = _choose_facade(brush, end - start), "left" if side > 0 else "right", x + side * _DEPTH
    brush.canvas.cast_shadow([(x, 0, start), (far, 0, start), (far, 0, end), (x, 0, end)], height)

    def paint(body: Mapping[str, Sequence[Point]], look: Look, *names: str) -> None:
        for name in names:
            points = [((x + far) / 2 + a, b, c) for a, b, c in body[name]]
            brush.canvas.paint(points, LABEL["building"], look, outward=True)

    if height < 11 and brush.random.random() < 0.7:
        roof = make_box(_DEPTH, height, height + 3, start, end, rake=(0.8, 0.8), lean=3.5)
        paint(roof, Look(brush.pick_color("roof"), grain=0.1, scale=1.5), street_side, "rear")
    body = make_box(_DEPTH, 0, height, start, end)
    paint(body, facade, "rear", street_side)
    if brush.random.random() < 0.5:
        shop = facade._replace(color=brush.pick_color("building"), pitch=(3.0, 3.4), fill=(0.75, 0.7))
        paint(make_box(_DEPTH, 0, 3.4, start, end), shop, street_side)
    ledge = {street_side: cut_inset(body[street_side], 0, 1, 1 - 0.4 / height, 1)}
    paint(ledge, Look(brush.pick_color("kerb")), street_side)


def _draw_garden(brush: Brush, x: float, side: int, start: float, end: float) -> None:
    """Draw trees on grass, often behind a wall, a fence or a hedge."""
    pick, depth = brush.random, end - start
    trees = 3 if start < _FAR else 1
    for i in range(trees):
        z = end - depth * (i + pick.random()) / trees
        objects.draw_tree(brush, x + side * pick.uniform(2.5, 8), z, pick.uniform(5, 10), pick.uniform(1.8, 3.2))
    kind = pick.choices(("wall", "fence", "hedge", "open"), (3, 3.5, 2, 1.5))[0]
    if kind == "hedge":
        for i in range(int(depth / 2.5), -1, -1):
            objects.draw_hedge(brush, x + side * 0.8, start + 2.5 * i, 2.2, 1.6)
    elif kind == "wall":
        joint, brick = brush.pick_color("joint"), brush.pick_color("wall")
        bricks = Look(joint, brick, (0.9, 0.42), (0.93, 0.88), 0.5, grain=0.1, scale=2.0)
        _draw_barrier(brush, kind, bricks, pick.uniform(1.5, 2.6), x, side, (start, end))
    elif kind == "fence":
        pitch, fill = pick.choice((((0.3, 9.0), (0.5, 1.0)), ((0.45, 0.45), (0.7, 0.7))))
        bars = Look(brush.pick_color("fence"), brush.pick_color("fence gap"), pitch, fill)
        _draw_barrier(brush, kind, bars, pick.uniform(1.1, 1.9), x, side, (start, end))


def _draw_barrier(brush: Brush, kind: str, look: Look, height: float, x: float, side: int, reach: Range) -> None:
    """Draw a wall or fence along the pavement, with a return at its near end and a rail on top."""
    start, end = reach
    thin = x + 0.1 * side
    brush.canvas.cast_shadow([(x, 0, start), (thin, 0, start), (thin, 0, end), (x, 0, end)], height)
    near = [(x, 0.0, start), (x + side * 7, 0.0, start), (x + side * 7, height, start), (x, height, start)]
    brush.canvas.paint(near, LABEL[kind], look)
    for low, painted in ((0.0, look), (height - 0.12, Look(look.color))):
        brush.canvas.paint([(x, low, start), (x, low, end), (x, height, end), (x, height, start)], LABEL[kind], painted)
