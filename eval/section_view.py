"""What the template shows of a section, and of all sections' scores together: kept and lost at a glance."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from eval import words
from eval.figures import model_colour
from eval.heat_map_svg import heat_map, shown, width_of
from eval.sections.section import HeatMap, Quote, Score, Section

View = dict[str, Any]

NARROW = 190
"""Two maps that are no wider still read well beside each other on a phone."""


def section_view(section: Section) -> View:
    """A section with its maps drawn and grouped."""
    return {
        "title": section.title,
        "lead": section.lead,
        "tables": section.tables,
        "figures": [chart for chart in section.figures if chart.svg],
        "groups": [_group(name, list(maps)) for name, maps in groupby(section.maps, key=lambda one: one.group)],
        "prompts": [{"prompt": prompt, "quotes": list(of)} for prompt, of in groupby(section.quotes, _prompt)],
    }


def _prompt(quote: Quote) -> str:
    return quote.prompt


def _group(name: str, maps: Sequence[HeatMap]) -> View:
    """Maps with one colour scale; where they have several, each says its own numbers and none is shown."""
    first = maps[0]
    one_scale = all(
        (one.low, one.high, one.percent, one.log) == (first.low, first.high, first.percent, first.log) for one in maps
    )
    ends = [shown(first, end) + "%" * first.percent for end in (first.low, first.high)]
    return {
        "name": name,
        "narrow": all(width_of(one) <= NARROW for one in maps),
        "maps": [{"title": one.title, "svg": heat_map(one)} for one in maps],
        "scale": {"low": ends[0], "high": ends[1], "two": first.low < 0, "log": first.log} if one_scale else None,
    }


def glance(scores: Sequence[Score]) -> list[View]:
    """A row a task: what its teacher scores, and the share of that which each student kept.

    Tasks of the same models share a table; tables in which no share is known are left out.
    """
    sets = dict.fromkeys((one.of, tuple(one.by_model)) for one in scores)
    tables = [_table(of, [one for one in scores if (one.of, tuple(one.by_model)) == (of, who)]) for of, who in sets]
    return [table for table in tables if any(cell["share"] for row in table["rows"] for cell in row["cells"])]


def _table(of: str, scores: Sequence[Score]) -> View:
    models = [name for name in scores[0].by_model if name != of]
    return {
        "of": of,
        "models": [{"name": name, "colour": model_colour(place)} for place, name in enumerate(models)],
        "rows": [
            {
                "task": one.task,
                "teacher": words.percent(one.by_model[of]) if of in one.by_model else words.NONE,
                "chance": f"{100 * one.chance:.0f}%" if one.chance else "",
                "cells": [_kept(one, name) for name in models],
            }
            for one in scores
        ],
    }


def glance_numbers(scores: Sequence[Score]) -> list[View]:
    """The same for report.json."""
    return [
        {
            "task": one.task,
            "compared_with": one.of,
            "chance": one.chance,
            "scores": dict(one.by_model),
            "kept": {name: one.kept(name) for name in one.by_model if name != one.of},
        }
        for one in scores
    ]


def _kept(one: Score, name: str) -> View:
    share, score = one.kept(name), one.by_model[name]
    return {
        "share": None if share is None else f"{min(max(share, 0), 1):.3f}",
        "text": words.NONE if share is None else f"{100 * share:.0f}%".replace("-", "−"),
        "score": words.percent(score),
    }
