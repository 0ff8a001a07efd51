"""Line charts as inline SVG, without a script and without a font of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 10, 34
COLORS = 8
"""Lines with a colour of their own; the style sheet of the page defines --line-0 to --line-7."""


@dataclass(frozen=True)
class Line:
    """A named line through (x, y) points; NaN breaks it."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int
    dashed: bool = False


def draw_lines(lines: Sequence[Line], x_label: str, *, description: str) -> str:
    """An SVG element with axes, grid and a legend of the lines. Without a finite point it says so."""
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return "<p>Nothing was measured.</p>"
    xs, ys = _axis([x for x, _ in finite]), _axis([y for _, y in finite])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}" class="chart">',
        *(_tick(xs, x, vertical=False) for x in xs),
        *(_tick(ys, y, vertical=True) for y in ys),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>',
        *(_path(line, xs, ys) for line in lines),
        "</svg>",
        '<p class="legend">',
        *(f'<span class="{_style(line)}">{escape(line.name)}</span>' for line in lines),
        "</p>",
    ]
    return "".join(parts)


def _axis(values: Sequence[float], wanted: int = 5) -> list[float]:
    """Round numbers at even distances that enclose the values: at least two."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _place(axis: Sequence[float], value: float, start: float, end: float) -> float:
    return start + (value - axis[0]) / (axis[-1] - axis[0]) * (end - start)


def _tick(axis: Sequence[float], value: float, *, vertical: bool) -> str:
    """A grid line with its number."""
    text = f"{value:.10g}"
    if vertical:
        y = _place(axis, value, HEIGHT - BOTTOM, TOP)
        line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    x = _place(axis, value, LEFT, WIDTH - RIGHT)
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return f'{line}<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>'


def _path(line: Line, xs: Sequence[float], ys: Sequence[float]) -> str:
    """The line, and a dot where a point has no neighbour to be joined with."""
    pieces: list[list[str]] = [[]]
    for x, y in line.points:
        if math.isfinite(y):
            pieces[-1].append(f"{_place(xs, x, LEFT, WIDTH - RIGHT):.1f},{_place(ys, y, HEIGHT - BOTTOM, TOP):.1f}")
        else:
            pieces.append([])
    drawn = [f'<polyline class="{_style(line)}" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    dots = [piece[0].split(",") for piece in pieces if len(piece) == 1]
    return "".join(drawn + [f'<circle class="{_style(line)}" cx="{x}" cy="{y}" r="3"/>' for x, y in dots])


def _style(line: Line) -> str:
    return f"line-{line.color % COLORS}" + (" dashed" if line.dashed else "")
