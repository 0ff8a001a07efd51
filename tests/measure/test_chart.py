"""Line charts as inline SVG."""

import math
from xml.etree import ElementTree

import pytest

from cluda_cli.measure.chart import HEIGHT, LEFT, RIGHT, WIDTH, Line, draw_lines


def draw(*lines: Line) -> ElementTree.Element:
    """The drawing, parsed; it has to be well-formed."""
    return ElementTree.fromstring(f"<div>{draw_lines(lines, 'step', description='losses')}</div>")


def test_the_ends_of_a_line_lie_on_the_axes():
    polyline = draw(Line("a", ((0, 1.0), (100, 3.0)), 0)).find(".//polyline")
    (x0, y0), (x1, y1) = [tuple(map(float, point.split(","))) for point in polyline.get("points").split()]
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    assert 0 <= y1 < y0 <= HEIGHT


def test_numbers_of_the_axes_are_round_and_enclose_the_values():
    drawn = draw(Line("a", ((13, 0.11), (487, 0.93)), 0))
    texts = [element.text for element in drawn.iter("text")]
    assert {"0", "100", "500", "0.2", "1"} <= set(texts)


def test_nan_breaks_a_line_and_a_lone_point_is_a_dot():
    drawn = draw(Line("a", ((0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0)), 0))
    assert len(drawn.findall(".//polyline")) == 1
    assert len(drawn.findall(".//circle")) == 1


@pytest.mark.parametrize("points", [(), ((0, math.nan),)])
def test_nothing_to_draw_is_said(points):
    assert draw_lines([Line("a", points, 0)], "step", description="x") == "<p>Nothing was measured.</p>"


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-12, 1e12])
def test_a_constant_has_an_axis_too(value):
    drawn = draw(Line("a", ((0, value), (1, value)), 0))
    numbers = [number for line in drawn.iter("line") for number in line.attrib.values()]
    assert len(numbers) >= 16
    assert all(math.isfinite(float(number)) for number in numbers)


def test_names_are_escaped():
    drawn = draw(Line("<b>&", ((0, 1.0), (1, 2.0)), 9, dashed=True))
    legend = drawn.find(".//p/span")
    assert legend.text == "<b>&"
    assert legend.get("class") == "line-1 dashed"
