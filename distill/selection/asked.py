"""A selection as it is asked for: everything that can be wrong with it is found before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.engines import processes
from distill.errors import UserError
from distill.mixers import KINDS
from distill.recipe import Recipe, load_recipe
from distill.run import open_run
from distill.selection.budget import METHODS, Budget, divide
from distill.selection.ranking import BASELINES, Layers
from distill.selection.runs import aligned_settings

BORDERLINE = 4  # layers that are doubtful where choices are refined
SETS = BORDERLINE * (BORDERLINE - 1) // 2  # the most choices that they leave


@dataclass(frozen=True)
class Asked:
    """A selection, checked.

    Attributes:
        path: of the recipe, as given.
        overrides: settings that replace the recipe's, as given.
        recipe: what they say.
        n_layers: the teacher's depth.
        candidates: layers that may keep attention, ascending.
        keep: how many shall.
        method: one of ``METHODS``.
        budget: what it may cost.
        output: where everything is written.
    """

    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    n_layers: int
    candidates: Layers
    keep: int
    method: str
    budget: Budget
    output: Path

    @property
    def aligned(self) -> list[str]:
        """Settings of the run that aligns the student without attention."""
        return [*self.overrides, *aligned_settings(self.recipe, self.output, self.budget.align)]


def ask(
    path: Path,
    overrides: Sequence[str],
    *,
    keep: int,
    output: Path,
    method: str = "greedy",
    among: str = "",
    total: int | None = None,
    score: int | None = None,
    refine: int = 0,
    refined: int = BORDERLINE,
) -> Asked:
    """Check a selection; nothing heavy is loaded and nothing is written.

    Args:
        path, overrides: of the recipe.
        keep: layers that shall keep attention.
        method: one of ``METHODS``.
        among: the layers that may, ``"2,5,8"``; all where it is empty.
        total, score, refine, refined: tokens and choices, as ``distill.selection.budget.divide`` takes them.

    Raises:
        UserError: the recipe, the method, K, the layers or the tokens do not fit.
    """
    if method not in METHODS:
        raise UserError(f"--method is {method!r}; allowed are {', '.join(METHODS)}")
    if refine and method in BASELINES:
        raise UserError(f"--refine is for a ranking with scores, and {method} has none; leave it out")
    recipe = load_recipe(path, overrides)
    if method == "mixing":
        _require_matrix(recipe)
    if recipe.student.keep_heads:
        raise UserError("student.keep_heads keeps single heads, and selection is of whole layers; leave it out")
    if recipe.student.window_layers:
        raise UserError(
            "student.window_layers sets layers apart before any is chosen, and selection is among all layers of one"
            " mixer; leave it out, and name it beside the keep_attention that is found"
        )
    # Of all layers, which are those of the aligned student: a layer that cannot be converted is refused here.
    facts = open_run(path, [*overrides, *aligned_settings(recipe, output, {})]).facts
    if processes.world() > 1:
        raise UserError("selection runs in one process; start it without a launcher")
    candidates = _candidates(among, facts.n_layers)
    most = min(len(candidates), facts.n_layers - 1)
    if not 1 <= keep <= most:
        raise UserError(
            f"--keep is {keep}; allowed are 1 to {most}: of {facts.n_layers} layers {len(candidates)} may keep"
            " attention, and one at least is converted"
        )
    budget = divide(
        recipe,
        method=method,
        candidates=len(candidates),
        keep=keep,
        total=total,
        score=score,
        refine=refine,
        refined=refined,
        sets=SETS,
    )
    asked = Asked(path, tuple(overrides), recipe, facts.n_layers, candidates, keep, method, budget, output)
    if budget.align:
        open_run(path, asked.aligned)  # what is wrong with the recipe of alignment shows now
    return asked


def _candidates(among: str, n_layers: int) -> Layers:
    if not among:
        return tuple(range(n_layers))
    parts = among.replace(" ", "").split(",")
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(f"--among is {among!r}; give different layers such as 2,5,8")
    outside = [part for part in parts if int(part) >= n_layers]
    if outside:
        raise UserError(
            f"--among names layer {', '.join(outside)}; the teacher has {n_layers} layers, numbered 0 to {n_layers - 1}"
        )
    return tuple(sorted(map(int, parts)))


def _require_matrix(recipe: Recipe) -> None:
    made: Any = KINDS[recipe.student.mixer]
    if made.without_factors is not None:
        raise UserError(
            f"--method mixing is not for {recipe.student.mixer}: {made.without_factors}; take restore or hidden"
        )
