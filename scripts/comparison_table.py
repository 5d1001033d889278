"""What a comparison came to: one row for each recipe and budget, and gaps over tokens and over time as a picture.

A gap is the student's held-out loss less the teacher's, in nats a token. Of several seeds the median is given, and the
lowest and highest behind it. *Remembers* is what a student holds of one sequence as long as the text's block.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from distill.units import count, size
from scripts.measure import Fields

LABEL = 28  # characters of a recipe on a line of the legend
COLOURS, STYLES = 10, ("-", "--", ":")  # matplotlib's cycle, again with another style when it is through


def gap(result: Fields, teacher_loss: float) -> float:
    """Nats a token behind the teacher; infinite where training failed."""
    return math.inf if "failed" in result else result["loss"] - teacher_loss


def table(found: Fields) -> str:
    """Markdown: budgets from the smallest, and in each the smallest gap first."""
    teacher, settings = found["teacher"], found["settings"]
    recall = teacher["recall"] is not None
    head = [
        "budget",
        "recipe",
        "gap, nats",
        "KL",
        "top-1",
        *["recall"] * recall,
        "CPU s",
        "parameters",
        "remembers",
        "lr ×",
        "seeds",
    ]
    lines = [
        f"{teacher['name']}: the teacher's held-out loss is {teacher['loss']:.4f}"
        + (f" and its recall {teacher['recall']:.1%}" if recall else "")
        + f"; attention kept in {settings['keep_attention']}, {settings['evaluation_tokens']:,} held-out tokens.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'|'.join(['---'] * len(head))}|",
    ]
    for budget, recipe, results in _groups(found["results"]):
        trained = [result for result in results if "failed" not in result]
        seeds = str(len(results)) + (f", {len(results) - len(trained)} failed" if len(trained) < len(results) else "")
        cells = [
            count(budget),
            recipe,
            *_numbers(trained, teacher["loss"], recall),
            _factor(results[0], settings),
            seeds,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_rates(found)])


def _rates(found: Fields) -> list[str]:
    """Lines on how each recipe's rates were chosen, if they were."""
    settings, teacher_loss = found["settings"], found["teacher"]["loss"]
    grid = settings["grid"]
    if len(grid) == 1:
        return []
    gaps = {(one["recipe"], one["factor"]): gap(one, teacher_loss) for one in found["tried"]}
    head = [f"gap at {count(settings['tuned_at'])} by factor on the rates", *(f"{factor:g}" for factor in grid)]
    rows = [
        [recipe, *(_shown(gaps[recipe, factor]) for factor in grid)]
        for recipe in dict.fromkeys(name for name, _ in gaps)
    ]
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def _shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "failed"


def draw(found: Fields, path: Path) -> None:
    """The gap of every recipe over tokens and over CPU seconds, the medians of its seeds; both axes logarithmic.

    A line is a run on its way, its last point the end. Larger budgets have thicker lines.
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    curves = [
        (budget, recipe, _median_curve([result["curve"] for result in results], found["teacher"]["loss"]))
        for budget, recipe, results in _groups(found["results"])
    ]
    recipes = list(dict.fromkeys(result["recipe"] for result in found["results"]))
    budgets = sorted({budget for budget, _, _ in curves})
    largest = {recipe: budget for budget, recipe, curve in curves if _points(curve, "tokens")}  # of those drawn
    for budget, recipe, curve in curves:
        for ax, x in zip(axes, ("tokens", "cpu_seconds"), strict=True):
            points = _points(curve, x)
            if points:
                ax.plot(
                    *zip(*points, strict=True),
                    color=f"C{recipes.index(recipe) % COLOURS}",
                    linestyle=STYLES[recipes.index(recipe) // COLOURS % len(STYLES)],
                    linewidth=1 + budgets.index(budget),
                    marker="o",
                    markevery=[-1],
                    label=fill(recipe, LABEL) if budget == largest.get(recipe) else None,
                )
    for ax, label in zip(axes, ("training tokens", "CPU seconds of training"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=label)
        for axis, shown in ((ax.xaxis, count), (ax.yaxis, "{:g}".format)):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _, shown=shown: shown(value)))
            axis.set_minor_formatter(NullFormatter())  # matplotlib writes those over one another
        ax.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("held-out loss behind the teacher, nats a token")
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(_title(found, len(budgets)))
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _title(found: Fields, budgets: int) -> str:
    kept = found["settings"]["keep_attention"]
    layers = "no attention kept" if kept == "[]" else f"attention kept in {kept}"
    return f"{found['teacher']['name']}, {layers}" + ("; thicker lines: larger budgets" if budgets > 1 else "")


def _groups(results: Iterable[Fields]) -> list[tuple[int, str, list[Fields]]]:
    """(budget, recipe, its seeds), the smallest budget and in it the smallest loss first."""
    found: dict[tuple[int, str], list[Fields]] = {}
    for result in results:
        found.setdefault((result["budget"], result["recipe"]), []).append(result)

    def place(item: tuple[tuple[int, str], list[Fields]]) -> tuple[int, float]:
        (budget, _), of_seeds = item
        return budget, median([gap(result, 0.0) for result in of_seeds])

    return [(budget, recipe, of_seeds) for (budget, recipe), of_seeds in sorted(found.items(), key=place)]


def _numbers(results: Sequence[Fields], teacher_loss: float, recall: bool) -> list[str]:
    """Cells of what is measured."""
    return [
        _spread([gap(result, teacher_loss) for result in results], "{:.4f}".format),
        _spread([result["kl"] for result in results], "{:.4f}".format),
        _spread([result["agreement"] for result in results], "{:.1%}".format),
        *([_spread([result["recall"] for result in results], "{:.1%}".format)] if recall else []),
        _spread([result["cpu_seconds"] for result in results], "{:.0f}".format),
        *((count(results[0]["parameters"]), size(results[0]["remembered_bytes"])) if results else ("", "")),
    ]


def _spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """The median, and the range where there are several."""
    if not values:
        return "failed"
    middle = shown(median(values))
    return middle if len(values) == 1 else f"{middle} ({shown(min(values))} to {shown(max(values))})"


def _factor(result: Fields, settings: Fields) -> str:
    """The factor on the learning rates; with a mark at the edge of the grid, beyond which a better one may lie."""
    grid = settings["grid"]
    edge = len(grid) > 1 and result["factor"] in (min(grid), max(grid))
    return f"{result['factor']:g}{', edge' * edge}"


def _points(curve: Sequence[Fields], x: str) -> list[tuple[float, float]]:
    """What of a curve has a place on two logarithmic axes."""
    return [(point[x], point["gap"]) for point in curve if point[x] > 0 and point["gap"] > 0]


def _median_curve(curves: Sequence[Sequence[Fields]], teacher_loss: float) -> list[Fields]:
    """Over seeds, at the tokens where all that did not fail have a loss."""
    at = [{point["tokens"]: point for point in curve} for curve in curves if curve]
    shared = [tokens for tokens in (at[0] if at else {}) if all(tokens in points for points in at)]
    return [
        {
            "tokens": tokens,
            "cpu_seconds": median([points[tokens]["cpu_seconds"] for points in at]),
            "gap": median([points[tokens]["loss"] - teacher_loss for points in at]),
        }
        for tokens in shared
    ]
