"""What an exhaustive search of layers came to: a table of methods, and a picture of scores beside outcomes.

A choice's outcome is KL(teacher ‖ student) on held-out text after its training, in nats a token, which is what all of
them trained to lower; of several seeds the mean. Its place is its rank among all choices of as many layers. The gap, a
student's loss less the teacher's, stands beside it: a teacher that has not learned all it could is beaten by students
that are nearer to the text than to it, so that choices are not ranked by it.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from distill.selection.measures import named
from distill.units import count
from scripts.measure import Fields
from scripts.rank_correlation import kendall, spearman


def means(size: Fields, metric: str) -> dict[str, float]:
    """Over seeds, by the choice's name."""
    by_set: dict[str, list[float]] = {}
    for result in size["results"]:
        by_set.setdefault(named(tuple(result["layers"])), []).append(result[metric])
    return {name: mean(values) for name, values in by_set.items()}


def table(found: Fields) -> str:
    """Markdown: for each number of layers kept, a row a method."""
    settings = found["settings"]
    lines = [
        f"{settings['recipe']}, {settings['teacher']}: {settings['n_layers']} layers, the teacher's held-out loss is"
        f" {found['teacher']['loss']:.4f}; each choice trained for {count(settings['tokens'])} tokens,"
        f" {settings['evaluation_tokens']:,} held-out tokens.",
    ]
    for size in found["sizes"]:
        outcome, losses = means(size, "kl"), means(size, "loss")
        best = min(outcome, key=lambda name: outcome[name])
        lines += [
            "",
            f"{size['keep']} kept, {len(outcome)} choices: the lowest KL has {best} ({outcome[best]:.4f}), the mean of"
            f" all is {mean(outcome.values()):.4f}, the worst {max(outcome.values()):.4f}.",
            "",
            "| method | layers | KL | place | gap, nats | Spearman | Kendall | tokens | of the distillation's |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        gaps = {name: loss - found["teacher"]["loss"] for name, loss in losses.items()}
        lines += [_row(method, outcome, gaps, settings["distillation"]) for method in size["methods"]]
    return "\n".join(lines)


def _row(method: Fields, outcome: dict[str, float], gaps: dict[str, float], distillation: int) -> str:
    name = named(tuple(method["layers"]))
    kl = outcome.get(name)
    place = None if kl is None else 1 + sum(other < kl for other in outcome.values())
    scores = method["scores"]
    pairs = [] if scores is None else [(scores[one], -outcome[one]) for one in outcome]
    x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    cells = [
        method["method"],
        name,
        _shown(kl, ".4f"),
        "" if place is None else f"{place} of {len(outcome)}",
        _shown(gaps.get(name), ".4f"),
        _shown(spearman(x, y) if pairs else None, "+.2f"),
        _shown(kendall(x, y) if pairs else None, "+.2f"),
        count(method["tokens"]),
        f"{method['tokens'] / distillation:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def draw(found: Fields, path: Path) -> None:
    """A panel for each number of layers and each method with scores: outcomes over scores, a point a choice."""
    sizes = found["sizes"]
    shown = [[method for method in size["methods"] if method["scores"]] for size in sizes]
    columns = max(map(len, shown))
    figure = Figure(figsize=(2.6 * columns, 2.8 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), columns, squeeze=False)
    for row, (size, methods) in enumerate(zip(sizes, shown, strict=True)):
        outcome = means(size, "kl")
        for ax, method in zip(axes[row], methods, strict=False):
            _panel(ax, method, outcome)
        for ax in axes[row][len(methods) :]:
            ax.axis("off")
        axes[row][0].set_ylabel(f"{size['keep']} kept: KL after training, nats")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _panel(ax: Any, method: Fields, outcome: dict[str, float]) -> None:
    names: Sequence[str] = list(outcome)
    chosen = named(tuple(method["layers"]))
    for name in names:
        ax.plot(method["scores"][name], outcome[name], "o", color="C0" if name == chosen else "0.6", markersize=4)
        if len(names) <= 10 or name == chosen:
            ax.annotate(name, (method["scores"][name], outcome[name]), fontsize="xx-small")
    ax.set_title(method["method"], fontsize="small")
    ax.tick_params(labelsize="xx-small")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
