"""What lm-evaluation-harness found: a row a task and metric, a column a model."""

from collections.abc import Mapping
from typing import Any

from eval import words
from eval.findings import Findings
from eval.sections.section import Section, Table

KINDS = {
    "multiple_choice": "chosen among answers",
    "generate_until": "written",
    "loglikelihood": "likelihood",
    "loglikelihood_rolling": "text",
}
Scores = Mapping[str, Mapping[str, Any]]
"""By model, as ``eval.harness.scores.Score`` has them."""


def section(found: Findings) -> Section:
    models, tasks = list(found.models), found.results
    rows = [
        [task, metric, KINDS.get(kind, kind), *(_cell(by_model.get(model), metric) for model in models)]
        for task, by_model in tasks.items()
        for kind, metrics in [_shape(by_model)]
        for metric in metrics
    ]
    asked = sorted({score["samples"] for by_model in tasks.values() for score in by_model.values()})
    many = f"{asked[0]:,}" if asked[0] == asked[-1] else f"{asked[0]:,} to {asked[-1]:,}"
    note = f"{many} questions a task; ± is a standard error. Perplexities and bits: lower is better."
    return Section(
        title="Tasks",
        lead=_lead(models, tasks),
        tables=[Table(["task", "metric", "asked how", *models], rows, note)],
    )


def _shape(by_model: Scores) -> tuple[str, list[str]]:
    first = next(iter(by_model.values()))
    return first["kind"], list(first["metrics"])


def _cell(score: Mapping[str, Any] | None, metric: str) -> str:
    if score is None or metric not in score["metrics"]:
        return words.NONE
    value, error = score["metrics"][metric], score["errors"].get(metric)
    if not is_share(score, metric):
        return words.plain(value)
    return words.percent(value) + (f" ± {words.plain(100 * error, 1)}" if error else "")


def is_share(score: Mapping[str, Any], metric: str) -> bool:
    """Whether a metric is a share of questions, where more is better."""
    value = score["metrics"][metric]
    return value is not None and score["higher_is_better"][metric] and 0 <= value <= 1


def _lead(models: list[str], tasks: Mapping[str, Scores]) -> str:
    """Means over the tasks that all models have, of each task's first metric where that is a share."""
    means = {model: _mean(model, [by for by in tasks.values() if set(models) <= set(by)]) for model in models}
    first, *others = models
    if means[first] is None:
        return f"{words.listed(list(tasks))}: no task here counts right answers; see the table."
    told = [
        f"{name} {words.percent(means[name])}, which is {words.percent(_part(means[name], means[first]))} of that"
        for name in others
    ]
    beside = f"; {words.listed(told)}" if told else ""
    return f"On average over its tasks {first} is right {words.percent(means[first])} of the time{beside}."


def _part(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _mean(model: str, tasks: list[Scores]) -> float | None:
    shares = []
    for by_model in tasks:
        metric = next(iter(by_model[model]["metrics"]), None)
        if metric is not None and all(is_share(score, metric) for score in by_model.values()):
            shares.append(by_model[model]["metrics"][metric])
    return sum(shares) / len(shares) if shares else None
