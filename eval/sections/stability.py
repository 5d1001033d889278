"""What ``eval.stability`` found, for the report: memory by layer and head, exponents, and how disturbances die out."""

import math
from typing import Any

from distill.layout import NAMES
from eval import words
from eval.charts import Axis, Chart, Point, Series, line_chart
from eval.figures import model_colour
from eval.findings import Findings
from eval.memory_maps import sorted_memory, without
from eval.sections.section import HeatMap, Section, Table

Fields = dict[str, Any]


def section(found: Findings) -> Section:
    """Findings of the kind ``stability`` as a section."""
    students = {name: one for name, one in found.results.items() if _stateful(one)}
    return Section(
        title="Stability and memory",
        lead=" ".join([*(_lead(name, one) for name, one in students.items()), _spread(found.results)]),
        tables=[_table(found.results)],
        figures=[_curves(found, students)],
        maps=[_map(name, one["layers"]) for name, one in students.items()],
    )


def _lead(name: str, one: Fields) -> str:
    """Which layer remembers longest, and what its exponent means."""
    layer = max(_stateful(one), key=lambda layer: max(sorted_memory(layer)))
    largest = max(float(layer["exponent"]) for layer in _stateful(one))
    tokens = words.plain(max(sorted_memory(layer)), 0)
    told = f"Layer {layer['layer']} of {name} remembers longest, {tokens} tokens in its slowest head"
    sign = "so what disturbs its states dies out" if largest < 0 else "so a disturbance of its states need not die out"
    return f"{told}; the largest exponent is {_exponent(largest)} a token, {sign}."


def _spread(results: Fields) -> str:
    """What is left of a disturbance far behind it."""
    last = {name: one["deviations"][-1] for name, one in results.items()}
    told = [f"{name} {_share(span, 'mean')} (at most {_share(span, 'largest')})" for name, span in last.items()]
    first = min(span["first"] for span in last.values())
    return f"What one disturbed token still moves {first} tokens on and farther: {words.listed(told)}."


def _share(span: Fields, which: str) -> str:
    """Of the disturbance."""
    return words.percent(float(span[which]))


def _table(results: Fields) -> Table:
    rows = []
    for name, one in results.items():
        for layer in one["layers"]:
            memory = sorted_memory(layer)
            if memory:
                shown = [_exponent(float(layer["exponent"])), words.plain(memory[0], 0), words.plain(memory[-1], 0)]
            else:
                shown = [without(layer), words.NONE, words.NONE]
            rows.append([f"{name}, layer {layer['layer']}", NAMES.get(layer["kind"], layer["kind"]), *shown])
    note = "The exponent is the largest of a layer's heads, in nats a token; below zero a disturbance dies out."
    return Table(["", "mixer", "largest exponent", "shortest memory", "longest memory"], rows, note)


def _curves(found: Findings, students: Fields) -> Chart:
    colours = {name: model_colour(place) for place, name in enumerate(students)}
    series = []
    for name, one in found.results.items():
        spans = [span for span in one["deviations"] if span["first"]]
        notes, colour = [_note(span) for span in spans], colours.get(name, "teacher")
        series.append(Series(name, colour, _points(spans, "mean"), notes=notes))
        series.append(Series(f"{name}, largest", colour, _points(spans, "largest"), "dashed", notes))
    return line_chart(
        "What one disturbed token moves",
        "Change of the last hidden states behind it, relative to the disturbance: mean and largest; logarithmic axes.",
        series,
        Axis("tokens behind it", words.short, log=True),
        Axis("relative change", words.short, log=True),
    )


def _points(spans: list[Fields], which: str) -> list[Point]:
    return [(span["last"], float(span[which])) for span in spans]


def _note(span: Fields) -> str:
    at = f"{span['first']}" if span["first"] == span["last"] else f"{span['first']} to {span['last']}"
    return f"{at} tokens on: {words.plain(float(span['mean']))}, at most {words.plain(float(span['largest']))}"


def _map(name: str, layers: list[Fields]) -> HeatMap:
    memory = [sorted_memory(layer) for layer in layers]
    values = {(row, column): value for column, of_layer in enumerate(memory) for row, value in enumerate(of_layer)}
    return HeatMap(
        title=f"Memory of {name} in tokens, until 1/e is left",
        rows=[str(row + 1) for row in range(max(map(len, memory)))],
        columns=[str(layer["layer"]) for layer in layers],
        row_label="head, by memory",
        column_label="layer",
        values=values,
        low=min(values.values()),
        high=max(values.values()),
        percent=False,
        log=True,
    )


def _stateful(one: Fields) -> list[Fields]:
    return [layer for layer in one["layers"] if sorted_memory(layer)]


def _exponent(value: float) -> str:
    """With two digits that say something."""
    digits = 2 if value == 0 else max(2, 1 - math.floor(math.log10(abs(value))))
    return words.plain(value, digits)
