"""A heat map as inline SVG in the page's colours.

The colour of a cell is one hue over the card's own colour, the denser the further from zero, so it also reads in grey
and by every kind of colour-blindness; a scale with two ends has blue below zero and orange above. report.css resolves
the classes ``heat``, ``above`` and ``below`` for light and dark. Every cell has its value written in it.
"""

import math

from markupsafe import Markup

from eval import words
from eval.sections.section import HeatMap

CELL, ROW, TOP, BOTTOM, EDGE = 34, 26, 6, 40, 14
LETTER = 6.3
"""Width of a character of the labels."""
DENSE = 0.62
"""From here on a cell's text takes the colour that stands out from the full hue."""


def heat_map(one: HeatMap) -> Markup:
    """The whole map; its first row is at the bottom, as on an axis."""
    (left, cell), width, floor = _columns(one), width_of(one), TOP + ROW * len(one.rows)
    shape = f'class="heat-map" viewBox="0 0 {width:g} {floor + BOTTOM}" width="{width:g}" height="{floor + BOTTOM}"'
    parts = [Markup(f'<svg {shape} role="img" aria-label="{{}}">').format(one.title)]
    parts += [_text(left - 6, _middle(one, row), "end", label) for row, label in enumerate(one.rows)]
    parts += [
        _text(left + (column + 0.5) * cell, floor + 14, "middle", label) for column, label in enumerate(one.columns)
    ]
    parts.append(_text(left + cell * len(one.columns) / 2, floor + 29, "middle", one.column_label))
    turned = Markup('<text transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>')
    parts.append(turned.format(f"{(TOP + floor) / 2:g}", one.row_label))
    for row in range(len(one.rows)):
        for column in range(len(one.columns)):
            parts.append(_cell(one, row, column, left + column * cell, cell))
    return Markup("").join([*parts, Markup("</svg>")])


def width_of(one: HeatMap) -> float:
    """In pixels, at which its text has the size of a chart's."""
    left, cell = _columns(one)
    middle = left + cell * len(one.columns) / 2
    return max(left + cell * len(one.columns) + 4, middle + LETTER * len(one.column_label) / 2)


def density(value: float, low: float, high: float, log: bool = False) -> float:
    """How much of the hue a value gets, 0 to 1; what is no number gets none."""
    if value != value or high == low:
        return 0.0
    if log:
        value, low, high = (math.log(max(one, 1e-30)) for one in (value, low, high))
        return min(max((value - low) / (high - low), 0.0), 1.0)
    if low < 0:
        share = value / (high if value > 0 else -low)
        return min(abs(share), 1.0)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def shown(one: HeatMap, value: float) -> str:
    """A cell's text: a whole percentage, or as few digits as the number needs."""
    if value != value:
        return "?"
    if one.percent:
        text = f"{100 * value:.0f}"
        return text.replace("-0", "0") if text == "-0" else text.replace("-", "−")
    return words.short(float(f"{value:.3g}")).replace("-", "−")


def _columns(one: HeatMap) -> tuple[float, float]:
    """Where the first column begins, and how wide each is."""
    longest = (max(map(len, labels), default=0) for labels in (one.rows, one.columns))
    left, cell = (LETTER * letters for letters in longest)
    return EDGE + left + 8, max(CELL, cell + 6)


def _cell(one: HeatMap, row: int, column: int, x: float, width: float) -> Markup:
    y = _middle(one, row) - ROW / 2
    box = f'x="{x + 1:g}" y="{y + 1:g}" width="{width - 2:g}" height="{ROW - 2}" rx="3"'
    value = one.values.get((row, column))
    if value is None:
        return Markup(f'<rect class="none" {box}/>')
    dense = density(value, one.low, one.high, one.log)
    hue = "heat" if one.low >= 0 else "above" if value > 0 else "below"
    note = f"{one.row_label} {one.rows[row]}, {one.column_label} {one.columns[column]}: {shown(one, value)}"
    text = _text(x + width / 2, y + ROW / 2, "middle", shown(one, value), "on" if dense > DENSE else "off")
    fill = Markup(f'<rect class="{hue}" fill-opacity="{dense:.3f}" {box}><title>{{}}</title></rect>')
    return fill.format(note + "%" * one.percent) + text


def _middle(one: HeatMap, row: int) -> float:
    return TOP + ROW * (len(one.rows) - row - 0.5)


def _text(x: float, y: float, anchor: str, text: str, name: str = "") -> Markup:
    named = Markup(' class="{}"').format(name) if name else Markup("")
    return Markup('<text{} x="{:g}" y="{:g}" text-anchor="{}">{}</text>').format(named, x, y + 4, anchor, text)
