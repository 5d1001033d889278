"""Speed and memory: the report's section of ``eval.speed``, and the same in sentences for a terminal."""

from collections.abc import Callable, Sequence

from distill import units
from eval import words
from eval.charts import Axis, Chart, Series, byte_ticks, line_chart, spans_decades
from eval.findings import Fields, Findings
from eval.sections.colours import colours
from eval.sections.section import Section, Table


def section(found: Findings) -> Section:
    """How the others compare with the first model at the longest context; three charts and a table."""
    names, rows = list(found.models), found.results["rows"]
    machine = found.results["measured_on"]
    device = machine["cuda"] or f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'} of a CPU"
    return Section(
        title="Speed and memory",
        lead=" ".join(f"{text[0].upper()}{text[1:]}." for text in sentences(names, found.results)),
        tables=[_table(names, rows, f"Medians of {found.settings['runs']} runs that took turns, on {device}.")],
        figures=[
            _chart(names, rows, "Reading a prompt", "tokens a second", lambda row: row["prefill"], words.short),
            _chart(names, rows, "Writing behind it", "tokens a second", lambda row: row["decode"], words.short),
            _chart(names, rows, "State and cache", "bytes", held, units.size),
        ],
    )


def sentences(names: Sequence[str], results: Fields) -> list[str]:
    """Each model beside the first, at the longest context."""
    longest = max(row["context"] for row in results["rows"])
    first, *others = [_row(results["rows"], name, longest) for name in names]
    if not others:
        return [
            f"behind {longest:,} tokens {names[0]} reads {words.short(first['prefill'])} and writes"
            f" {words.short(first['decode'])} tokens a second and holds {units.size(held(first))}"
        ]
    return [
        f"behind {longest:,} tokens {row['model']} reads {words.plain(row['prefill'] / first['prefill'], 2)} times and"
        f" writes {words.plain(row['decode'] / first['decode'], 2)} times as fast as {names[0]} and holds"
        f" {words.percent(held(row) / held(first))} of its bytes"
        for row in others
    ]


def held(row: Fields) -> int:
    """Bytes of state and cache."""
    return row["state_bytes"] + row["key_value_bytes"]


def _row(rows: Sequence[Fields], name: str, context: int) -> Fields:
    return next(row for row in rows if row["model"] == name and row["context"] == context)


def _table(names: Sequence[str], rows: Sequence[Fields], note: str) -> Table:
    lines = []
    for row in rows:
        first = _row(rows, names[0], row["context"])
        lines.append(
            [
                f"{row['model']} at {row['context']:,}",
                words.plain(row["prefill"], 0),
                words.times(row["prefill"] / first["prefill"]),
                words.plain(row["decode"], 1),
                words.times(row["decode"] / first["decode"]),
                units.size(row["state_bytes"]),
                units.size(row["key_value_bytes"]),
                words.percent(held(row) / held(first)),
            ]
        )
    headings = ["", "read, tokens/s", "", "written, tokens/s", "", "state", "keys and values", "of the first's"]
    return Table(headings, lines, note)


def _chart(
    names: Sequence[str],
    rows: Sequence[Fields],
    title: str,
    label: str,
    value: Callable[[Fields], float],
    text: Callable[[float], str],
) -> Chart:
    of_model = colours(names)
    series = [
        Series(
            name,
            of_model[name],
            [(row["context"], value(row)) for row in rows if row["model"] == name],
            "line" if index else "dashed",
            [f"{name} at {row['context']:,}: {text(value(row))}" for row in rows if row["model"] == name],
        )
        for index, name in enumerate(names)
    ]
    ticks = sorted({row["context"] for row in rows})
    x = Axis("tokens of context", lambda tokens: words.context(int(tokens)), log=True, ticks=ticks)
    log = spans_decades([value(row) for row in rows])
    round_sizes = (byte_ticks(series) or None) if label == "bytes" and log else None
    return line_chart(
        title, f"{label.capitalize()}, by length of context.", series, x, Axis(label, text, log, round_sizes, True)
    )
