"""What the mixers do: the report's section of ``eval.ablation``, and the same in sentences for a terminal."""

from collections.abc import Iterator

from eval import words
from eval.charts import Axis, Chart, Series, line_chart
from eval.findings import Fields, Findings
from eval.sections.section import Section, Table

NOTHING = 0.01
"""Nats a token: an ablation that changes the loss by less changed nothing."""

NOTHING_RECALLED = 0.02
"""The same for a share of answers written."""


def section(found: Findings) -> Section:
    """What is wrong or that nothing is, a table of all that was ablated, and the change of the loss over the layers."""
    return Section(
        title="What the mixers do",
        lead=" ".join(f"{text[0].upper()}{text[1:]}." for text in _lead(found.results)),
        tables=[_table(found)],
        figures=[_chart(found.results)] if len(_single(found.results)) > 1 else [],
    )


def sentences(results: Fields) -> list[str]:
    """What was found, the alarming first."""
    return [*_idle(results), *_together(results), *_beside_the_baseline(results)]


def _lead(results: Fields) -> list[str]:
    """The sentences that matter most; of many idle mixers one that counts them."""
    idle = list(_idle(results))
    if len(idle) > 2:
        single = _single(results)
        layers = [layer for layer, by in single.items() if any(_is_nothing(results, one) for one in by.values())]
        one = f"ablating one of the mixers of layers {words.runs(layers)} changes next to nothing"
        idle = [f"{one}: {len(layers)} of {len(single)} mixers do nothing that the others do not"]
    return [*idle, *_beside_the_baseline(results)]


def _idle(results: Fields) -> Iterator[str]:
    """Mixers that do nothing, or nothing but add a constant; or that none is idle."""
    idle = 0
    for layer, by in _single(results).items():
        zero, mean = (_change(results, by[name]) for name in ("zero", "mean"))
        if _is_nothing(results, by["zero"]):
            idle += 1
            yield f"ablating layer {layer}'s mixer changes the loss by {signed(zero)}: it does nothing"
        elif _is_nothing(results, by["mean"]):
            idle += 1
            yield (
                f"replacing what layer {layer}'s mixer puts out by its mean changes the loss by {signed(mean)}: it adds"
                " a constant and mixes nothing"
            )
    if not idle:
        changes = {layer: _change(results, by["mean"]) for layer, by in _single(results).items()}
        least = min(changes, key=lambda layer: abs(changes[layer]))
        yield (
            f"every mixer is missed when it is ablated; least layer {least}'s, whose mean in its place changes the loss"
            f" by {signed(changes[least])}"
        )


def _together(results: Fields) -> Iterator[str]:
    """What attention does alone, and what mixers do alone."""
    intact = words.plain(results["intact"]["loss"])
    for entry in results["ablated"]:
        if entry["by"] == "mean" and entry["what"] in ("all mixers", "all attention"):
            what = {"all mixers": "mixer", "all attention": "attention"}[entry["what"]]
            yield f"without any {what} the loss is {words.plain(entry['loss'])} instead of {intact}"


def _beside_the_baseline(results: Fields) -> Iterator[str]:
    """Whether distillation beats what needs none."""
    if "baseline" not in results:
        return
    ours, theirs = results["intact"], results["baseline"]
    losses = [words.plain(scores["loss"]) for scores in (theirs, ours, results["teacher"])]
    better = ours["loss"] < theirs["loss"]
    yield (
        f"untrained, {theirs['name']} in the same layers has a loss of {losses[0]}, the student {losses[1]}, the"
        f" teacher as it was {losses[2]}: the student {'beats' if better else 'does not beat'} what needs no training"
    )
    for task, scores in ours.get("recall", {}).items():
        shares = [words.percent(share) for share in (theirs["recall"][task]["written"], scores["written"])]
        yield f"in {task} the baseline writes {shares[0]} of the answers, the student {shares[1]}"


def _single(results: Fields) -> dict[int, dict[str, Fields]]:
    """Ablations of one layer's mixer alone, by layer and by what took its output's place."""
    found: dict[int, dict[str, Fields]] = {}
    for entry in results["ablated"]:
        if entry["what"].startswith("layer "):
            found.setdefault(entry["layers"][0], {})[entry["by"]] = entry
    return found


def _change(results: Fields, entry: Fields) -> float:
    return entry["loss"] - results["intact"]["loss"]


def _is_nothing(results: Fields, entry: Fields) -> bool:
    """Neither the loss nor a task knows that anything was ablated."""
    recall = results["intact"].get("recall", {})
    changes = [entry["recall"][task]["written"] - scores["written"] for task, scores in recall.items()]
    return abs(_change(results, entry)) < NOTHING and all(abs(change) < NOTHING_RECALLED for change in changes)


def _table(found: Findings) -> Table:
    results = found.results
    tasks = list(results["intact"].get("recall", {}))
    rows = [_row(results, "intact", results["intact"], tasks)]
    for entry in results["ablated"]:
        what = f"{entry['what']}'s mixer" if entry["what"].startswith("layer ") else entry["what"]
        put = "zero" if entry["by"] == "zero" else "its mean" if len(entry["layers"]) == 1 else "their means"
        rows.append(_row(results, f"{what} → {put}", entry, tasks))
    if "baseline" in results:
        rows.append(_row(results, results["baseline"]["name"], results["baseline"], tasks))
        rows.append(_row(results, "teacher", results["teacher"], tasks))
    return Table(
        headings=[
            "what is replaced by what",
            "loss",
            "change",
            "KL",
            "top-1 agreement",
            *(f"{task}, written" for task in tasks),
        ],
        rows=rows,
        note="Changes are against the intact student. A mixer that its own mean can stand in for does not mix.",
    )


def _row(results: Fields, name: str, scores: Fields, tasks: list[str]) -> list[str]:
    change = "" if scores is results["intact"] else signed(_change(results, scores))
    recall = [words.percent(scores["recall"][task]["written"]) for task in tasks]
    return [
        name,
        words.plain(scores["loss"]),
        change,
        words.plain(scores["kl"]),
        words.percent(scores["agreement"]),
        *recall,
    ]


def _chart(results: Fields) -> Chart:
    single = _single(results)
    looks = (("zero", "output → zero", "other"), ("mean", "output → its mean", "logits"))
    series = [
        Series(
            label,
            colour,
            [(layer, _change(results, by[name])) for layer, by in single.items()],
            "points",
            [f"layer {layer}: {signed(_change(results, by[name]))}" for layer, by in single.items()],
        )
        for name, label, colour in looks
    ]
    return line_chart(
        "What each mixer is worth",
        "How much the loss grows without it; at 0 it does nothing.",
        series,
        Axis("layer", lambda layer: f"{layer:.0f}", ticks=list(single)),
        Axis("change of loss, nats", words.short, zero=True),
    )


def signed(value: float) -> str:
    """With its sign, three decimals."""
    return f"{value:+.3f}".replace("-", "−")
