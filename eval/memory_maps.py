"""Memory as a picture: a map a model, heads over layers, in tokens on a logarithmic scale."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from distill.layout import ATTENTION
from eval import words
from eval.findings import Fields

LONGEST = 1e6
"""Tokens; what remembers longer, or for ever, is drawn as this."""


def memory_maps(models: Mapping[str, Sequence[Fields]], file: Path) -> None:
    """Draw and save; the file's ending says what it is (.png, .svg, .pdf).

    Args:
        models: each model's layers as ``eval.stability`` records them; layers without a state stay empty.
    """
    depth = max(len(layers) for layers in models.values())
    heads = max(len(sorted_memory(layer)) for layers in models.values() for layer in layers)
    values = [value for layers in models.values() for layer in layers for value in sorted_memory(layer)]
    scale = LogNorm(min(values), max(max(values), 1.01 * min(values)))
    figure = Figure(
        figsize=(2.4 + max(3.0, 0.62 * depth), 1.0 + len(models) * (1.2 + 0.28 * heads)), layout="constrained"
    )
    grid = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axes, (name, layers) in zip(grid, models.items(), strict=True):
        table = [[_at(sorted_memory(layer), row) for layer in layers] for row in range(heads)]
        image = axes.imshow(table, cmap="viridis", norm=scale, origin="lower", aspect="auto")
        figure.colorbar(image, ax=axes, label="tokens", format=lambda value, _: words.short(value))
        axes.set_title(name)
        axes.set_xticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
        axes.set_yticks([])
        axes.set_ylabel("heads, by memory")
        for column, layer in enumerate(layers):
            if not sorted_memory(layer):
                axes.text(column, (heads - 1) / 2, layer["kind"], rotation=90, ha="center", va="center", fontsize=8)
            for row, value in enumerate(sorted_memory(layer)):
                light = scale(value) > 0.6
                text = words.short(float(f"{value:.2g}"))
                axes.text(column, row, text, ha="center", va="center", color="black" if light else "white", fontsize=7)
    grid[-1].set_xlabel("layer")
    figure.suptitle("Memory of each head: tokens until 1/e is left")
    figure.savefig(file, dpi=150)


def sorted_memory(layer: Fields) -> list[float]:
    """A layer's memories in tokens, ascending; none where it has no state. They may be strings, as read from JSON."""
    return sorted(min(float(tokens), LONGEST) for tokens in layer.get("memory", ()))


def without(layer: Fields) -> str:
    """Why a layer has no exponents."""
    return "has no state" if layer["kind"] == ATTENTION else "does not decay by a number a head"


def _at(values: Sequence[float], index: int) -> float:
    return values[index] if index < len(values) else math.nan
