"""What models write beside what they prefer, how much their samples repeat themselves, and what they wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval import words
from eval.charts import Axis, Chart, Series, line_chart
from eval.findings import Fields, Findings
from eval.sections.colours import colours
from eval.sections.recall import reference
from eval.sections.section import Quote, Score, Section, Table

Rows = Sequence[Mapping[str, Any]]
"""A model's, one a length."""


def section(found: Findings) -> Section:
    continued, repetition = found.results["continued"], found.results["repetition"]
    return Section(
        title="Generation",
        lead=_lead(continued),
        tables=[_continued(continued), _repetition(repetition, found.settings)],
        figures=[_chart(continued)],
        quotes=[
            Quote(f"{name}, prompt {number}", sample["prompt"], text)
            for number, sample in enumerate(found.results["samples"], start=1)
            for name, text in sample["texts"].items()
        ],
        scores=_scores(continued, reference(found)),
    )


def _scores(continued: Mapping[str, Rows], of: str) -> list[Score]:
    """At the same length as the lead: writing, which no guess does, and preferring, which some do."""
    at = _telling(continued[of])
    chance = continued[of][at]["chance"]
    return [
        Score(f"generation: {says}", of, guessed, {name: rows[at][key] for name, rows in continued.items()})
        for says, key, guessed in (("text written", "written", 0.0), ("text preferred", "preferred", chance))
    ]


def _lead(continued: Mapping[str, Rows]) -> str:
    """What likelihood and what writing say each model has kept of the first one."""
    (first, rows), *others = continued.items()
    at = _telling(rows)
    of = rows[at]
    if not others:
        return (
            f"{first} prefers the text {words.percent(of['preferred'])} of the time and writes it"
            f" {words.percent(of['written'])} of the time, over {_next(of['tokens'])}."
        )
    told = [
        f"{name} prefers the text {words.percent(own[at]['preferred'])} of the time ({first}:"
        f" {words.percent(of['preferred'])}), writes it {words.percent(own[at]['written'])} of the time"
        f" ({words.percent(of['written'])}) and writes what {first} writes {words.percent(own[at]['same'])} of the time"
        for name, own in others
    ]
    return f"Over {_next(of['tokens'])}, {words.listed(told)}."


def _next(tokens: int) -> str:
    return "the next token" if tokens == 1 else f"the next {tokens} tokens"


def _telling(rows: Rows) -> int:
    """The longest length at which the first model still writes the text now and then: beyond, all write it never."""
    return max((place for place, row in enumerate(rows) if row["written"] >= 0.1), default=0)


def _continued(continued: Mapping[str, Rows]) -> Table:
    first = next(iter(continued))
    keys = ("written", "preferred", "gap", "same")
    rows = [
        [name, f"{row['tokens']}", *(words.percent(row[key]) for key in keys), words.plain(row["log_probability"])]
        for name, own in continued.items()
        for row in own
    ]
    chance = words.percent(next(iter(continued.values()))[-1]["chance"])
    return Table(
        ["model", "tokens", "writes the text", "prefers the text", "gap", f"writes as {first}", "log p a token"],
        rows,
        f"Greedy continuations of prompts from the text, every token right; preferred to what follows other prompts,"
        f" which a guess would do {chance} of the time.",
    )


def _repetition(repetition: Mapping[str, Fields], settings: Fields) -> Table:
    rows = [
        [
            name,
            *(words.percent(own["repeated"][n]) for n in ("1", "4")),
            words.plain(own["longest_repeat"], 1),
            *(words.percent(own["distinct"][n]) for n in ("1", "2", "3")),
            words.plain(own["tokens"], 0),
        ]
        for name, own in repetition.items()
    ]
    return Table(
        ["samples of", "repeated tokens", "repeated 4-grams", "longest repeat", "distinct-1", "-2", "-3", "tokens"],
        rows,
        f"Sampled at temperature {settings['temperature']:g}. Repeated: inside one text. Distinct: over all texts."
        " Both should be near those of the text itself.",
    )


def _chart(continued: Mapping[str, Rows]) -> Chart:
    series, of_model = [], colours(continued)
    for name, own in continued.items():
        for key, look in (("preferred", "dashed"), ("written", "line")):
            points = [(row["tokens"], row[key]) for row in own]
            series.append(Series(f"{name}, {key}", of_model[name], points, look))  # type: ignore[arg-type]
    ticks = sorted({row["tokens"] for own in continued.values() for row in own})
    return line_chart(
        "Preferred and written",
        "Share of prompts whose text a model prefers (dashed) and writes, by how many tokens of it.",
        series,
        Axis("tokens", words.short, log=True, ticks=ticks),
        Axis("share", words.percent, zero=True),
    )
