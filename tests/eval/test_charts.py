import math
import re

import pytest

from eval.charts import HEIGHT, WIDTH, Axis, Series, line_chart, smoothed, spans_decades, thinned
from eval.words import short


def numbers(svg: str, *attributes: str) -> list[float]:
    return [float(value) for name in attributes for value in re.findall(rf' {name}="([-\d.]+)"', svg)]


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline points="([^"]+)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in found]


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "points",
    [
        [(1, 1)],
        [(1, 5), (2, 5), (3, 5)],
        [(1, 1e-9), (1e6, 3e12)],
        [(0.001, 0.97), (0.002, 1.03)],
        [(x, 1 / x) for x in range(1, 500)],
        [(7, 1_000_000), (8, 1_000_001)],
    ],
)
def test_everything_is_drawn_inside_the_chart(points, log_x, log_y):
    chart = line_chart("t", "", [Series("a", "teacher", points)], Axis("x", short, log_x), Axis("y", short, log_y))
    svg = str(chart.svg)
    drawn = [place for line in polylines(svg) for place in line]
    xs = numbers(svg, "x", "x1", "x2", "cx") + [x for x, _ in drawn]
    ys = numbers(svg, "y", "y1", "y2", "cy") + [y for _, y in drawn]
    assert all(0 <= x <= WIDTH for x in xs)
    assert all(0 <= y <= HEIGHT for y in ys)
    assert len(drawn) == (len(points) if len(points) > 1 else 0)
    assert svg.count('class="grid"') >= 1, "there is a tick to read values by"


def test_larger_is_higher_and_later_is_further_right():
    points = [(0, 1), (10, 2), (40, 8)]
    linear, log = (
        polylines(line_chart("t", "", [Series("a", "teacher", points)], Axis("x", short), Axis("y", short, log)).svg)[0]
        for log in (False, True)
    )
    assert linear == sorted(linear, key=lambda place: (place[0], -place[1]))
    assert (linear[1][0] - linear[0][0]) / (linear[2][0] - linear[0][0]) == pytest.approx(0.25, abs=0.01)
    assert (linear[0][1] - linear[1][1]) / (linear[0][1] - linear[2][1]) == pytest.approx(1 / 7, abs=0.01)
    assert (log[0][1] - log[1][1]) / (log[0][1] - log[2][1]) == pytest.approx(1 / 3, abs=0.01)


def test_ticks_stand_where_their_values_are():
    chart = line_chart(
        "t", "", [Series("a", "teacher", [(0, 0), (8, 4)])], Axis("x", short), Axis("y", short, zero=True)
    )
    texts = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)</text>', str(chart.svg)))
    heights = {float(text): float(y) - 3.5 for y, text in texts.items()}
    (start, end) = polylines(chart.svg)[0]
    assert heights[0] == pytest.approx(start[1], abs=0.1)
    assert heights[4] == pytest.approx(end[1], abs=0.1)


def test_what_cannot_be_drawn_is_left_out():
    points = [(1, 1), (2, math.nan), (3, math.inf), (4, 0), (5, 2)]
    linear = line_chart("t", "", [Series("a", "teacher", points)], Axis("x", short), Axis("y", short))
    log = line_chart("t", "", [Series("a", "teacher", points)], Axis("x", short), Axis("y", short, log=True))
    assert [len(polylines(chart.svg)[0]) for chart in (linear, log)] == [3, 2]
    empty = line_chart("t", "", [Series("a", "teacher", points[1:3])], Axis("x", short), Axis("y", short))
    assert (empty.svg, empty.legend) == ("", [])


def test_notes_stay_with_their_points_and_are_escaped():
    points = [(1, math.nan), (2, 2), (3, 3)]
    series = Series("<a>", "teacher", points, notes=["gone", "<b>two</b>", "three"])
    chart = line_chart('"t"', "", [series], Axis("<x>", short), Axis("y", short))
    assert re.findall(r"<title>(.*?)</title>", str(chart.svg)) == ["&lt;b&gt;two&lt;/b&gt;", "three"]
    assert "&lt;x&gt;" in chart.svg
    assert 'aria-label="&#34;t&#34;"' in chart.svg


def test_thinning_keeps_the_mean_and_the_order():
    points = [(float(x), float(x % 7)) for x in range(960)]
    thin = thinned(points, most=240)
    assert len(thin) == 240
    assert thin == sorted(thin)
    assert sum(y for _, y in thin) / 240 == pytest.approx(sum(y for _, y in points) / 960)
    assert thinned(points[:100]) == points[:100]
    assert thinned([]) == []


def test_smoothing_keeps_straight_lines_and_calms_noise():
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])
    noise = [(float(x), float(x % 2)) for x in range(100)]
    assert all(0.3 < y < 0.7 for _, y in smoothed(noise, window=0.1)[10:-10])


def test_a_log_axis_is_for_positive_values_of_many_sizes():
    assert spans_decades([0.1, 5])
    assert not spans_decades([1, 5])
    assert not spans_decades([0, 5])
    assert not spans_decades([])
