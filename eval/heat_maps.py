"""Recall as a picture: a row a model; what it wrote, what it preferred and the gap, over lengths and items."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from distill.recall.sweep import Cell
from eval import words

SCORES = {"written": "Written by the model", "chosen": "Preferred to the others", "gap": "Gap"}
COLOURS = {"written": "viridis", "chosen": "viridis", "gap": "RdBu_r"}
RANGE = {"written": (0, 1), "chosen": (0, 1), "gap": (-1, 1)}


def heat_maps(title: str, models: Mapping[str, Sequence[Cell]], file: Path) -> None:
    """Draw and save; the file's ending says what it is (.png, .svg, .pdf)."""
    cells = [cell for found in models.values() for cell in found]
    lengths, items = sorted({cell.length for cell in cells}), sorted({cell.items for cell in cells})
    size = (1.6 + 3 * max(2.4, 0.75 * len(lengths)), 1.2 + len(models) * max(1.9, 0.5 * len(items) + 0.9))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(models), len(SCORES), squeeze=False, sharex=True, sharey=True)
    for axes, (name, found) in zip(grid, models.items(), strict=True):
        for place, score in zip(axes, SCORES, strict=True):
            image = _map(
                place, {(cell.items, cell.length): getattr(cell, score) for cell in found}, items, lengths, score
            )
            figure.colorbar(image, ax=place, shrink=0.8, format=lambda value, _: f"{100 * value:.0f}%")
        axes[0].set_ylabel(f"{name}\n\nitems")
    for place, heading in zip(grid[0], SCORES.values(), strict=True):
        place.set_title(heading)
    for place in grid[-1]:
        place.set_xlabel("length in tokens")
    chance = sum(cell.chance for cell in cells) / len(cells)
    figure.suptitle(f"{title} (a guess is preferred {words.percent(chance)} of the time)")
    figure.savefig(file, dpi=150)


def _map(
    axes: Axes, values: Mapping[tuple[int, int], float], items: Sequence[int], lengths: Sequence[int], score: str
) -> AxesImage:
    """One map; where there is no cell it stays empty."""
    table = [[values.get((number, length), math.nan) for length in lengths] for number in items]
    low, high = RANGE[score]
    image = axes.imshow(table, cmap=COLOURS[score], vmin=low, vmax=high, origin="lower", aspect="auto")
    axes.set_xticks(range(len(lengths)), [words.context(length) if length else "short" for length in lengths])
    axes.set_yticks(range(len(items)), [str(number) for number in items])
    for row, line in enumerate(table):
        for column, value in enumerate(line):
            if not math.isnan(value):
                light = abs(value) < 0.6 if score == "gap" else value > 0.6
                text = f"{100 * value:.0f}"
                axes.text(column, row, text, ha="center", va="center", color="black" if light else "white", fontsize=8)
    return image
