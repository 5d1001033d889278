"""Loss by position: where a model stands when a text goes on far beyond what it was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval import words
from eval.charts import Axis, Chart, Series, line_chart
from eval.findings import Findings
from eval.sections.colours import COLOURS
from eval.sections.section import Section, Table

Measured = Mapping[str, Any]


def section(found: Findings) -> Section:
    trained = found.settings["trained"]
    models: dict[str, Measured] = found.results
    edges = sorted({bucket["to"] for model in models.values() for bucket in model["buckets"]})
    rows = [[f"{to:,}", *(_loss(model, to) for model in models.values())] for to in edges]
    limits = [f"{name} knows {model['limit']:,} positions" for name, model in models.items() if model["limit"]]
    note = "Nats a token, of the predictions from so much context and less, down to the row above."
    return Section(
        title="Long context",
        lead=" ".join(filter(None, [_lead(models, trained), f"{words.listed(limits)}." if limits else ""])),
        tables=[Table(["context up to", *models], rows, note)],
        figures=[_by_position(models, trained), _by_context(models, trained, found.settings["last"])],
    )


def _lead(models: Mapping[str, Measured], trained: int) -> str:
    """What each model loses or gains from the length trained on to the end."""
    told = []
    for name, model in models.items():
        inside = [bucket["loss"] for bucket in model["buckets"] if bucket["to"] <= trained]
        beyond = [bucket for bucket in model["buckets"] if bucket["to"] > trained]
        if inside and beyond:
            change = beyond[-1]["loss"] - inside[-1]
            way = "worse" if change > 0 else "better"
            told.append(f"{name} is {words.plain(abs(change), 2)} nats a token {way} at {beyond[-1]['to']:,} tokens")
    if not told:
        return f"Nothing was measured beyond the {trained:,} tokens trained on."
    return f"Against its loss at the {trained:,} tokens trained on, {words.listed(told)}."


def _loss(model: Measured, to: int) -> str:
    for bucket in model["buckets"]:
        if bucket["to"] == to:
            error = f" ± {words.plain(bucket['error'], 2)}" if bucket["error"] else ""
            return f"{words.plain(bucket['loss'])}{error}"
    return words.NONE


def _by_position(models: Mapping[str, Measured], trained: int) -> Chart:
    series = [
        Series(name, colour, [(bucket["to"], bucket["loss"]) for bucket in model["buckets"]])
        for (name, model), colour in zip(models.items(), COLOURS, strict=False)
    ]
    return _chart(
        "Loss by position",
        "Real documents, each read from its beginning; lower is better.",
        series,
        trained,
        "tokens read",
    )


def _by_context(models: Mapping[str, Measured], trained: int, last: int) -> Chart:
    series = [
        Series(name, colour, [(context, loss) for context, loss in model["by_context"]])
        for (name, model), colour in zip(models.items(), COLOURS, strict=False)
    ]
    note = f"The same {last:,} tokens at the end of each document, from more and more of what stands before them."
    return _chart("Loss by available context", note, series, trained, "tokens of context")


def _chart(title: str, note: str, series: Sequence[Series], trained: int, label: str) -> Chart:
    """With a line at the length trained on, through all heights."""
    heights = [y for one in series for _, y in one.points]
    reach = max((x for one in series for x, _ in one.points), default=0)
    mark = [Series("trained on", "other", [(trained, min(heights)), (trained, max(heights))], "dashed")]
    shown = [*series, *(mark if heights and trained <= reach else [])]
    return line_chart(
        title,
        note,
        shown,
        Axis(label, lambda value: words.context(round(value)), log=True),
        Axis("nats a token", words.short),
    )
