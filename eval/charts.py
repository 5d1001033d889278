"""Line charts as inline SVG that takes its colours and font from the page around it.

Colours are classes (``c-teacher``, ``c-logits``) that report.css resolves for light and dark; text is real
text. A chart is WIDTH units wide, which the page shows at about one pixel each, on a phone as on a desktop.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 348, 232
RIGHT, TOP, BOTTOM = 12, 24, 36

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One thing drawn: points that are not finite (or not positive on a log axis) are left out.

    Attributes:
        colour: of the page's palette: ``"teacher"`` or a stage's name.
        look: a plain line, a faint one, a dashed one, or points alone.
        notes: what each point says when pointed at; as many as points, or none.
    """

    label: str
    colour: str
    points: Sequence[Point]
    look: Literal["line", "faint", "dashed", "points"] = "line"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis says and how it scales.

    Attributes:
        text: of a tick's value.
        ticks: where ticks stand; chosen for the data unless given.
        zero: a linear axis begins at 0.
    """

    label: str
    text: Callable[[float], str]
    log: bool = False
    ticks: Sequence[float] | None = None
    zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A titled chart; ``svg`` is empty where no point could be drawn."""

    title: str
    note: str
    svg: Markup
    legend: list[Series] = field(default_factory=list)


def line_chart(
    title: str, note: str, series: Sequence[Series], x: Axis, y: Axis, *, bands: Sequence[Point] = ()
) -> Chart:
    """Draw ``series`` over common axes.

    Args:
        note: one sentence under the title that says how to read it.
        bands: (from, to) intervals of x that are shaded.
    """
    drawn = [_drawable(one, x, y) for one in series]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return Chart(title, note, Markup(""))
    y_scale = _Scale(y, [point[1] for one in drawn for point in one.points], HEIGHT - BOTTOM, TOP)
    left = 14 + 6.5 * max(len(y.text(tick)) for tick in y_scale.ticks)
    x_scale = _Scale(x, [point[0] for one in drawn for point in one.points], left, WIDTH - RIGHT)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title),
        *(_band(x_scale, *band) for band in bands),
        *_frame(x_scale, y_scale),
        *(_draw(one, x_scale, y_scale) for one in drawn),
        Markup("</svg>"),
    ]
    return Chart(title, note, Markup("").join(parts), [one for one in drawn if one.label])


def spans_decades(values: Sequence[float], ratio: float = 12) -> bool:
    """Whether positive values differ enough that a linear axis would press the small ones flat."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return bool(positive) and len(positive) == len(values) and max(positive) / min(positive) > ratio


def byte_ticks(series: Sequence[Series]) -> list[float]:
    """Round binary sizes, at most six."""
    values = [value for one in series for _, value in one.points if value > 0]
    ticks = [4.0**power for power in range(40) if min(values, default=1) <= 4.0**power <= max(values, default=1)]
    return ticks[:: -(-len(ticks) // 6) or 1]


def thinned(points: Sequence[Point], most: int = 240) -> list[Point]:
    """At most ``most`` points, each the mean of its neighbours, so that long runs stay small files."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def smoothed(points: Sequence[Point], window: float = 0.05) -> list[Point]:
    """A centred moving average over ``window`` of all points, narrower at both ends."""
    reach = int(len(points) * window / 2)
    result = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        group = [y for _, y in points[index - near : index + near + 1]]
        result.append((x, sum(group) / len(group)))
    return result


class _Scale:
    """From data to SVG units along one axis, with its ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        low, high = min(values), max(values)
        if axis.zero and not axis.log:
            low, high = min(low, 0.0), max(high, 0.0)
        if high == low:
            low, high = (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
        choose = _log_ticks if axis.log else _linear_ticks
        self.low, self.high = low, high
        if start > end:  # the vertical axis: room above, and the lowest tick on the floor
            step = choose(low, high)
            if axis.log:
                self.low, self.high = low / 1.15, high * 1.15
            elif len(step) > 1:
                self.low = low if axis.zero and low == 0 else low - 0.04 * (high - low)
                self.high = high + 0.06 * (high - low)
        within = axis.ticks if axis.ticks is not None else choose(self.low, self.high)
        slack = 1e-9 * (abs(self.high) + abs(self.low))
        self.ticks = [tick for tick in within if self.low - slack <= tick <= self.high + slack]

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.axis.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def _linear_ticks(low: float, high: float, about: int = 4) -> list[float]:
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * multiple for multiple in (1, 2, 2.5, 5, 10) if unit * multiple >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [multiple * 10.0**decade for decade in decades for multiple in multiples]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def _drawable(one: Series, x: Axis, y: Axis) -> Series:
    def fits(point: Point) -> bool:
        return all(
            math.isfinite(value) and (value > 0 or not axis.log) for value, axis in zip(point, (x, y), strict=True)
        )

    kept = [index for index, point in enumerate(one.points) if fits(point)]
    notes = [one.notes[index] for index in kept] if one.notes else []
    return Series(one.label, one.colour, [one.points[index] for index in kept], one.look, notes)


def _frame(x: _Scale, y: _Scale) -> list[Markup]:
    grid = Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    left, floor = x.start, HEIGHT - BOTTOM
    parts = [grid.format(left, y(tick), WIDTH - RIGHT, y(tick)) for tick in y.ticks]
    parts += [text.format(left - 6, y(tick) + 3.5, "end", y.axis.text(tick)) for tick in y.ticks]
    parts += [Markup('<line class="floor" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(left, floor, WIDTH - RIGHT, floor)]
    for tick in x.ticks:
        # Labels at the edges turn inwards, or they would leave the drawing.
        anchor = "end" if x(tick) > WIDTH - RIGHT - 12 else "middle"
        parts.append(text.format(x(tick), floor + 14, anchor, x.axis.text(tick)))
    label = Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>')
    parts.append(label.format(6, 12, "start", y.axis.label))
    parts.append(label.format(WIDTH - RIGHT, HEIGHT - 5, "end", x.axis.label))
    return parts


def _band(x: _Scale, start: float, end: float) -> Markup:
    left, right = (min(max(x(edge), x.start), WIDTH - RIGHT) for edge in (start, end))
    return Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
        left, TOP, round(right - left, 1), HEIGHT - BOTTOM - TOP
    )


def _draw(one: Series, x: _Scale, y: _Scale) -> Markup:
    places = [(x(a), y(b)) for a, b in one.points]
    notes = one.notes or [""] * len(places)
    dot = Markup('<circle cx="{}" cy="{}" r="{}">{}</circle>')
    title = Markup("<title>{}</title>")
    inner = Markup("")
    if one.look != "points" and len(places) > 1:
        inner += Markup('<polyline points="{}"/>').format(" ".join(f"{a:g},{b:g}" for a, b in places))
    if one.look == "points" or one.notes or len(places) == 1:
        size = 3.2 if len(places) <= 24 else 2.2
        inner += Markup("").join(
            dot.format(a, b, size, title.format(note) if note else "")
            for (a, b), note in zip(places, notes, strict=True)
        )
    return Markup('<g class="c-{} {}">{}</g>').format(escape(one.colour), one.look, inner)
