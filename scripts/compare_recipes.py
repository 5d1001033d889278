"""Which recipe keeps most of the teacher for its tokens: each is trained with several seeds on the same text.

    python -m scripts.compare_recipes --teacher stories260k --budget 1M --budget 4M --seeds 3 \\
        --recipe ours --recipe mohawk --recipe "ours student.mixer=mamba2" --output runs/compare/stories260k

Writes results.json, table.md and gap.png into --output. Whatever is finished there is used again and what was killed
goes on, so the same command with more budgets, seeds or recipes only does what is new. How the comparison is made fair,
and where it is not, stands in docs/comparison.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from distill.atomic import replace_file
from distill.errors import UserError
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recipe import load_recipe
from distill.recipe_fields import read_tokens
from scripts.comparison_pool import carried_out, processes
from scripts.comparison_runs import RECIPES, Common, Wanted, check_all, prepare, slug, yaml_text
from scripts.comparison_table import draw, gap, table
from scripts.measure import Fields, record

GRID = (0.3, 1.0, 3.0)


class Teacher(NamedTuple):
    """A teacher with its text.

    Attributes:
        recipe: that names both.
        recall: whether it answers the rows of `distill.recall` in its own ids.
        absent: what to do where its text is not there; None for a text that is everywhere, or not ours to know.
    """

    recipe: Path
    recall: bool = False
    absent: str | None = None


TEACHERS = {
    "stdlib-1m": Teacher(RECIPES / "quickstart.yaml"),
    "stories260k": Teacher(RECIPES / "stories260k.yaml", absent="--teacher-path and --source say where both lie"),
    "recall": Teacher(RECIPES / "recall-hybrid.yaml", True, "python -m scripts.recall_rows writes it"),
}


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        recipes: as given on the command line.
        budgets: tokens, ascending.
        seeds: of each recipe at the smallest budget.
        seeds_above: at the others.
        grid: factors on learning rates to choose from, ascending; None takes them as they are.
        tuned_at: the budget at which they are chosen.
    """

    recipes: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: int
    seeds_above: int
    grid: tuple[float, ...] | None = None
    tuned_at: int | None = None

    def tuning(self) -> list[Wanted]:
        """The runs that decide on factors, if any do."""
        if self.grid is None or self.tuned_at is None:
            return []
        return [Wanted(recipe, self.tuned_at, factor, 0) for recipe in self.recipes for factor in self.grid]

    def at(self, budget: int, factors: dict[str, float]) -> list[Wanted]:
        """The runs with a budget, a seed of all recipes before the next."""
        seeds = self.seeds if budget == self.budgets[0] else self.seeds_above
        return [Wanted(recipe, budget, factors[recipe], seed) for seed in range(seeds) for recipe in self.recipes]

    def kinds(self) -> list[Wanted]:
        """A run of every recipe with every budget: what can be checked before anything is trained."""
        budgets = dict.fromkeys([*self.budgets, *(one.budget for one in self.tuning())])
        return [Wanted(recipe, budget, 1.0, 0) for recipe in self.recipes for budget in budgets]


@report_user_errors()
def main(
    recipe: Annotated[
        list[str],
        typer.Option(
            help="A file, ours (recipes/quickstart.yaml), or a name in recipes/published or recipes; settings may"
            ' follow: "ours seed=1"; may be given again.'
        ),
    ],
    budget: Annotated[list[str], typer.Option(help="Training tokens over all stages, such as 1M; may be given again.")],
    teacher: Annotated[str, typer.Option(help=f"One of {', '.join(TEACHERS)}, or a recipe's file that names one.")],
    output: Annotated[Path, typer.Option(help="Folder of all runs and of what they come to.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each.")] = 1,
    seeds_above: Annotated[
        int | None, typer.Option(min=1, help="Seeds at budgets but the smallest; by default as many.")
    ] = None,
    tune: Annotated[
        bool, typer.Option(help="Choose each recipe's learning rates, × each --factor, by its gap with seed 0.")
    ] = False,
    factor: Annotated[
        list[float] | None,
        typer.Option(min=1e-3, help="What --tune multiplies learning rates by; by default 0.3, 1 and 3."),
    ] = None,
    tune_budget: Annotated[
        str | None, typer.Option(help="Training tokens where --tune chooses; by default the smallest budget.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of the text's block a step, for all; their own unless given.")
    ] = None,
    teacher_path: Annotated[str | None, typer.Option(help="Where the teacher lies, if elsewhere.")] = None,
    source: Annotated[str | None, typer.Option(help="Where its text lies, if elsewhere.")] = None,
    keep_attention: Annotated[str, typer.Option(help="Layers that keep attention, for all: [1] or {count: 1}.")] = "[]",
    evaluation_tokens: Annotated[str, typer.Option(help="Held-out tokens to score.")] = "32K",
    points: Annotated[int, typer.Option(min=1, help="Evaluations on the way, about.")] = 8,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, with one thread each.")] = 1,
) -> None:
    """Train every RECIPE on one teacher within the same budgets, and compare what they come to."""
    quiet_unless_watched()
    asked = teacher_of(teacher)
    if source is None:
        _require_text(teacher, asked)
    moved = {"teacher.path": teacher_path, "data.source": source}
    common = Common(
        teacher=asked.recipe,
        overrides=tuple(f"{key}={yaml_text(place)}" for key, place in moved.items() if place is not None),
        keep_attention=keep_attention,
        evaluation_tokens=read_tokens("--evaluation-tokens", evaluation_tokens),
        points=points,
        recall=asked.recall,
        output=output,
        batch_size=batch_size,
    )
    budgets = tuple(sorted({read_tokens("--budget", given) for given in budget}))
    grid, tuned_at = _tuning(tune, factor, tune_budget, budgets[0])
    plan = Plan(_distinct(recipe), budgets, seeds, seeds_above or seeds, grid, tuned_at)
    check_all(common, plan.kinds())
    facts = prepare(common, plan.kinds()[0])
    told = {"teacher": {"name": teacher, **facts}, "settings": settings(common, plan)}
    with processes(jobs) as pool:
        for found in rounds(plan, facts["loss"], partial(carried_out, pool, common)):
            _write(output, {**told, **found})  # already here: the larger budgets take longest
    print(f"{output}/results.json, table.md, gap.png")


def teacher_of(given: str) -> Teacher:
    """One of TEACHERS by name, or that of a recipe's file; UserError if it is neither."""
    if given not in TEACHERS and not Path(given).is_file():
        raise UserError(f"--teacher {given}: allowed: {', '.join(TEACHERS)}, or the file of a recipe that names one")
    return TEACHERS.get(given) or Teacher(Path(given))


def _require_text(name: str, teacher: Teacher) -> None:
    """UserError where the text of one of TEACHERS is still to be had."""
    missing = [source for source in load_recipe(teacher.recipe).data.source if not Path(source).exists()]
    if teacher.absent and missing:
        raise UserError(f"--teacher {name}: there is no {', '.join(missing)} here; {teacher.absent}")


def _tuning(
    tune: bool, factors: Sequence[float] | None, budget: str | None, smallest: int
) -> tuple[tuple[float, ...] | None, int | None]:
    """The grid and where it is tried, if rates are to be chosen."""
    given = {"--factor": factors, "--tune-budget": budget}
    idle = [option for option, value in given.items() if value]
    if not tune and idle:
        raise UserError(f"{' and '.join(idle)} given without --tune, which alone uses them; add it, or leave them out")
    if not tune:
        return None, None
    return tuple(sorted(set(factors or GRID))), read_tokens("--tune-budget", budget) if budget else smallest


def settings(common: Common, plan: Plan) -> Fields:
    """What a table says of a comparison besides its results."""
    return {
        "keep_attention": common.keep_attention,
        "evaluation_tokens": common.evaluation_tokens,
        "batch_size": common.batch_size,
        "grid": [1.0] if plan.grid is None else list(plan.grid),
        "tuned_at": plan.tuned_at,
    }


def rounds(
    plan: Plan, teacher_loss: float, carry_out: Callable[[Sequence[Wanted]], list[Fields]]
) -> Iterator[dict[str, list[Fields]]]:
    """After each budget all ``results`` so far, and what was ``tried`` for the factors on the learning rates."""
    tuning = plan.tuning()
    tried = carry_out(tuning) if tuning else []
    factors = {recipe: _best(tried, recipe, teacher_loss) if tuning else 1.0 for recipe in plan.recipes}
    results: list[Fields] = []
    for budget in plan.budgets:
        results = results + carry_out(plan.at(budget, factors))
        yield {"tried": tried, "results": results}


def _best(tried: Iterable[Fields], recipe: str, teacher_loss: float) -> float:
    """The factor on a recipe's learning rates with the smallest gap; where all failed, the smallest factor."""
    of_recipe = [result for result in tried if result["recipe"] == recipe]
    return min(of_recipe, key=lambda result: (gap(result, teacher_loss), result["factor"]))["factor"]


def _write(output: Path, found: Fields) -> None:
    record(output / "results.json", found)
    text = table(found)
    replace_file(output / "table.md", f"{text}\n".encode())
    draw(found, output / "gap.png")
    print(f"{text}\n", flush=True)


def _distinct(recipes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(recipes))
    if len({slug(name) for name in names}) < len(names):
        raise UserError(f"--recipe: {', '.join(names)}: two would have the same folder")
    return names


if __name__ == "__main__":
    typer.run(main)
