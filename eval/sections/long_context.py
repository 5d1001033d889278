"""Loss by position: where a model stands when a text goes on far beyond what it was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval import words
from eval.charts import Axis, Chart, Series, line_chart
from eval.findings import Findings
from eval.sections.colours import colours
from eval.sections.section import Section, Table

Measured = Mapping[str, Any]


def section(found: Findings) -> Section:
    trained = found.settings["trained"]
    models: dict[str, Measured] = found.results
    edges = sorted({bucket["to"] for model in models.values() for bucket in model["buckets"]})
    shown = _doublings(trained, edges)
    rows = [[f"{to:,}", *(_loss(model, to) for model in models.values())] for to in shown]
    limits = [f"{name} knows {model['limit']:,} positions" for name, model in models.items() if model["limit"]]
    note = "Nats a token, of predictions from so much context or little less; ± is a standard error over documents."
    return Section(
        title="Long context",
        lead=" ".join(filter(None, [_lead(models, trained), f"{words.listed(limits)}." if limits else ""])),
        tables=[Table(["context up to", *models], rows, note)],
        figures=[
            _by_position(models, trained, shown),
            _by_context(models, trained, shown, found.settings["last"]),
        ],
    )


def _lead(models: Mapping[str, Measured], trained: int) -> str:
    """Where each model stands at the end, and where it stood at the length trained on."""
    told = []
    for name, model in models.items():
        inside = [bucket["loss"] for bucket in model["buckets"] if bucket["to"] <= trained]
        end = model["buckets"][-1]
        if inside and end["to"] > trained:
            losses = words.plain(inside[-1], 2), words.plain(end["loss"], 2)
            told.append(f"{name} goes from {losses[0]} nats a token to {losses[1]} at {end['to']:,} tokens")
    if not told:
        return f"Nothing was measured beyond the {trained:,} tokens trained on."
    return f"Beyond the {trained:,} tokens trained on, {words.listed(told)}."


def _doublings(trained: int, edges: Sequence[int]) -> list[int]:
    """The length trained on, halved and doubled, as far as was measured; and the end."""
    powers = {round(trained * 2.0**power) for power in range(-20, 21)}
    return [to for to in edges if to in powers or to == edges[-1]]


def _loss(model: Measured, to: int) -> str:
    for bucket in model["buckets"]:
        if bucket["to"] == to:
            error = f" ± {words.plain(bucket['error'], 2)}" if bucket["error"] else ""
            return f"{words.plain(bucket['loss'])}{error}"
    return words.NONE


def _by_position(models: Mapping[str, Measured], trained: int, ticks: Sequence[int]) -> Chart:
    of_model = colours(models)
    series = [
        Series(name, of_model[name], [(bucket["to"], bucket["loss"]) for bucket in model["buckets"]])
        for name, model in models.items()
    ]
    return _chart(
        "Loss by position",
        "Real documents, each read from its beginning; lower is better.",
        series,
        trained,
        ticks,
        "tokens read",
    )


def _by_context(models: Mapping[str, Measured], trained: int, ticks: Sequence[int], last: int) -> Chart:
    of_model = colours(models)
    series = [
        Series(name, of_model[name], [(context, loss) for context, loss in model["by_context"]])
        for name, model in models.items()
    ]
    note = f"The same {last:,} tokens at the end of each document, from more and more of what stands before them."
    return _chart("Loss by available context", note, series, trained, ticks, "tokens of context")


def _chart(title: str, note: str, series: Sequence[Series], trained: int, ticks: Sequence[int], label: str) -> Chart:
    """With a line at the length trained on, through all heights."""
    heights = [y for one in series for _, y in one.points]
    reach = max((x for one in series for x, _ in one.points), default=0)
    mark = [Series("trained on", "other", [(trained, min(heights)), (trained, max(heights))], "dashed")]
    shown = [*series, *(mark if heights and trained <= reach else [])]
    return line_chart(
        title,
        note,
        shown,
        Axis(label, lambda value: words.context(round(value)), log=True, ticks=ticks[::-2]),
        Axis("nats a token", words.short),
    )
